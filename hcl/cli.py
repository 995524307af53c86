"""The command line: hcl book, run, sweep, runs, data."""

import argparse
import itertools
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hcl import project_root
from hcl.arguments import assignment, grid_axis, seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, do, and turn a user's error into one line; hands back the exit status."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the workers on either
    try:
        return int(args.do(args) or 0)
    except KeyboardInterrupt:
        print("hcl: stopped", file=sys.stderr)
        return 130
    except (KeyError, IndexError):
        raise  # ours, not the user's
    except (ValueError, OSError, LookupError, ArithmeticError) as error:
        print(f"hcl: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ not in ("NotebookError", "RenderError"):
            raise
        print(f"hcl: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hcl", description="Contrastive learning with hard negatives: the study and its book."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_book(commands)
    _add_run(commands)
    _add_sweep(commands)
    _add_runs(commands)
    data = _command(commands, "data", _data, "download a data set into data/ (or $HCL_DATA)")
    data.add_argument("name", help="e.g. cifar10 or mutag")
    return parser


def _command(commands: Any, name: str, do: Any, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(do=do)
    return parser


def _add_book(commands: Any) -> None:
    book = _command(commands, "book", _book, "execute what changed, then render _build/html")
    book.add_argument("--profile", default="quick", help="quick (default), lab or paper")
    book.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NOTEBOOK",
        help="execute this one alone, e.g. images/hardness; may be repeated",
    )
    _add_workers(book, default=2)
    book.add_argument("--force", action="store_true", help="execute notebooks that are up to date")


def _add_run(commands: Any) -> None:
    run = _command(commands, "run", _run, "execute one notebook with other parameters")
    _add_notebook(run)
    run.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="OUT",
        help="executed notebook (default: _build/runs/NAME-PARAMETERS.ipynb)",
    )


def _add_sweep(commands: Any) -> None:
    sweep = _command(commands, "sweep", _sweep, "a notebook over a grid, or a study's runs")
    _add_notebook(sweep, "a notebook, or a study file of book/profiles (.yml)")
    sweep.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="e.g. beta=0,0.5,1 or seed=0:5; several span a product",
    )
    sweep.add_argument(
        "--budget", metavar="TIME", help="study: stop after e.g. 9m, with checkpoints"
    )
    sweep.add_argument(
        "--embeddings",
        type=int,
        default=0,
        metavar="N",
        help="study: keep the embeddings of N test points a run",
    )
    sweep.add_argument(
        "--compile", action="store_true", help="study: torch.compile the models, faster on a GPU"
    )
    _add_workers(sweep, default=1)


def _add_notebook(
    parser: argparse.ArgumentParser, about: str = "a notebook's path or name"
) -> None:
    parser.add_argument("notebook", metavar="NOTEBOOK", help=about)
    parser.add_argument(
        "-p",
        dest="given",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter; may be repeated",
    )
    parser.add_argument("--profile", help="start from this profile's parameters")


def _add_workers(parser: argparse.ArgumentParser, *, default: int) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        default=default,
        metavar="N",
        help=f"side by side (default: {default})",
    )


def _add_runs(commands: Any) -> None:
    runs = _command(commands, "runs", _runs, "the recorded runs under data/runs")
    what = runs.add_subparsers(dest="what", required=True, metavar="list|show|table|verify|merge")
    what.add_parser("list", help="every Record, a line each")
    what.add_parser("show", help="one Record in full").add_argument("digest", help="or its start")
    what.add_parser("table", help="a study's Records as a table").add_argument("study")
    what.add_parser("verify", help="is every Record whole and unedited?")
    merge = what.add_parser("merge", help="bring in Records made on another machine")
    merge.add_argument("source", type=Path, metavar="DIR", help="a store, or one study's folder")
    merge.add_argument("--study", metavar="NAME", help="only this study")
    merge.add_argument("--dry-run", action="store_true", help="say what would be done, do nothing")


def _book(args: argparse.Namespace) -> None:
    from hcl.book import build

    build(
        project_root(),
        profile=args.profile,
        only=args.only,
        workers=args.workers,
        force=args.force,
    )


def _run(args: argparse.Namespace) -> None:
    _execute(args, [{}], out=args.out, workers=1, live=True)


def _sweep(args: argparse.Namespace) -> None:
    if args.notebook.endswith((".yml", ".yaml")):
        return _sweep_study(args)
    if not args.grid:
        raise ValueError("sweep: give at least one --grid NAME=VALUES")
    from hcl import notebooks

    known = notebooks.parameters(notebooks.find(project_root(), args.notebook))
    axes = dict(grid_axis(text, known) for text in args.grid)
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    _execute(args, points, out=None, workers=args.workers, live=False)


def _sweep_study(args: argparse.Namespace) -> None:
    from hcl import sweeps

    if args.grid or args.given or args.profile:
        raise ValueError("sweep: --grid, -p and --profile are for notebooks; edit the study file")
    wanted = sweeps.load_study(args.notebook)
    budget_s = seconds(args.budget) if args.budget else float("inf")
    kept = sweeps.record(
        wanted, workers=args.workers, embeddings=args.embeddings, budget_s=budget_s,
        compile=args.compile,
    )  # fmt: skip
    print(f"{len(kept)} of {len(wanted)} runs of {args.notebook} are recorded")


def _execute(
    args: argparse.Namespace,
    points: list[dict[str, Any]],
    *,
    out: Path | None,
    workers: int,
    live: bool,
) -> None:
    """Check every point of a grid, then execute them all."""
    from hcl import execution, notebooks

    root = project_root()
    source = notebooks.find(root, args.notebook)
    base = _profile_entry(root, source, args.profile) | dict(map(assignment, args.given))
    jobs = []
    for point in points:
        given = notebooks.checked(source, {**base, **point})
        name = source.stem + notebooks.slug(given)
        output = (out or root / "_build" / "runs" / f"{name}.ipynb").absolute()
        if output == source:
            raise ValueError(f"{output}: would overwrite the notebook itself; name another")
        jobs.append(execution.Job(source, output, given, name))
    execution.execute_all(
        jobs,
        root=root,
        workers=workers,
        keep_going=True,
        live=live,
        done=lambda job, took: print(f"{job.output}  ({took:.0f} s)", flush=True),
    )


def _profile_entry(root: Path, source: Path, profile: str | None) -> dict[str, Any]:
    from hcl import notebooks

    if not profile:
        return {}
    entries = notebooks.profile(root, profile)
    book = (root / "book").resolve()
    name = source.relative_to(book).as_posix() if source.is_relative_to(book) else source.name
    if name not in entries and profile != "quick":
        raise ValueError(f"profile={profile!r}: has no entry for {name}")
    return entries.get(name, {})


def _data(args: argparse.Namespace) -> None:
    from hcl import graphs, vision
    from hcl.graphs.sets import TU
    from hcl.imagesets import SOURCES

    if args.name not in (known := [*SOURCES, *TU]):
        raise ValueError(f"name={args.name!r}: choose one of {', '.join(known)}")
    print((graphs if args.name in TU else vision).download(args.name))


def _runs(args: argparse.Namespace) -> int:
    from hcl import runs

    if args.what == "verify":
        problems = runs.verify()
        print("\n".join(problems) or "every Record is whole and as it was recorded")
        return 1 if problems else 0
    if args.what == "merge":
        return _merge(args)
    if args.what == "show":
        print(_one(args.digest))
    elif args.what == "table":
        print(_table(args.study))
    else:
        print("\n".join(map(_line, runs.records())) or "no run is recorded yet")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from hcl.merge import merge

    done = merge(args.source, study=args.study, dry_run=args.dry_run)
    would = "would be " * args.dry_run
    lines = [f"{would}added: {path.parent.name}/{path.name}" for path in done.added]
    lines += [f"refused: {why}" for why in done.refused.values()]
    if done.skipped:
        lines.append(f"skipped: {len(done.skipped)} files of {done.skipped[0].parent}, a cache")
    counts = f"{len(done.already_there)} already there, {len(done.refused)} refused"
    print("\n".join([*lines, f"{len(done.added)} {would}added, {counts}"]))
    return 1 if done.refused else 0


def _line(record: Any) -> str:
    from hcl.compare import label

    run, kept = record.run, record.metrics
    scores = "  ".join(f"{k} {kept[k]:.3f}" for k in ("knn", "linear") if k in kept)
    what = f"{run.study:20} {run.data:10} {run.encoder:10} {label(record):18}"
    code = record.provenance.get("code", "unknown")[:7]
    return f"{run.digest}  {what} seed {run.seed}  {scores}  {code}  {record.provenance['date']}"


def _one(digest: str) -> str:
    from hcl import runs

    found = [p for p in runs.store_root().glob(f"*/{digest}*.json") if digest]
    if len({p.stem for p in found}) != 1:
        raise ValueError(f"digest={digest!r}: {len(found)} Records match; `hcl runs list`")
    return f"{found[0]}\n{found[0].read_text()}" if runs.read(found[0]) else ""


def _table(study: str) -> str:
    from hcl import compare, runs

    df = compare.frame(runs.records(study))
    varies = [c for c in df.columns if df[c].astype(str).nunique() > 1 or len(df) == 1]
    return str(df[varies].to_string(index=False))
