"""Cells of the book's notebooks, run one by one: what the tests of pages have in common."""

import ast
import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple
from unittest import mock

import matplotlib.pyplot as plt
import nbformat

from hcl import notebooks, project_root, sweeps
from hcl.runs import Record, Run

Variables = dict[str, object]


class Output(NamedTuple):
    """What the reader sees below a cell."""

    value: object  # of its last line (None if that is a statement or ends in ';'); text of Markdown
    text: str  # of all Markdown and HTML that was displayed, the last line's included
    drawn: bool  # whether there is a figure


class Page:
    """The code cells of a notebook by their ids; name is its path under book/, without suffix.

    start: the cells that every run begins with; body: the ids of all others.
    """

    def __init__(self, name: str, *, start: tuple[str, ...] = ("parameters", "imports")) -> None:
        self.name = name
        self.path = project_root() / "book" / f"{name}.ipynb"
        self.cells = nbformat.read(self.path, as_version=4).cells
        self.code = {cell.id: cell.source for cell in self.cells if cell.cell_type == "code"}
        self.text = {cell.id: cell.source for cell in self.cells if cell.cell_type == "markdown"}
        self.prose = "\n".join(self.text.values())
        self.start = start
        self.body = [name for name in self.code if name not in start]
        self._displayed: list[object] = []

    def run(self, *names: str, into: Variables | None = None, **given: object) -> Variables:
        """Execute cells after the parameters (changed to what is given) and the imports.

        into: variables of an earlier run to go on with; the two first cells are then left out.
        Hands back all variables.
        """
        return self.outputs(*names, into=into, **given)[0]

    def show(
        self, *names: str, into: Variables | None = None, **given: object
    ) -> tuple[Variables, dict[str, object]]:
        """As run; hands back also what each cell showed last, Output.value."""
        variables, shown = self.outputs(*names, into=into, **given)
        return variables, {name: output.value for name, output in shown.items()}

    def outputs(
        self, *names: str, into: Variables | None = None, **given: object
    ) -> tuple[Variables, dict[str, Output]]:
        """As run; hands back also all that each cell showed."""
        variables = self._start(given) if into is None else into
        return variables, {name: self._output(name, variables) for name in names}

    def define(self, *names: str, **given: object) -> Variables:
        """As run, but of the named cells the functions, classes and CONSTANTS alone."""
        variables = self._start(given)
        for name in names:
            kept = [node for node in ast.parse(self.code[name]).body if _defines(node)]
            exec(compile(ast.Module(kept, []), f"{self.name}:{name}", "exec"), variables)
        return variables

    def solutions(self, name: str = "exercises") -> list[str]:
        """The indented blocks of code in a markdown cell, ready for exec."""
        blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", self.text[name] + "\n", re.MULTILINE)
        return [textwrap.dedent(block).strip() for block in blocks if block.strip()]

    def unused_parameters(self) -> set[str]:
        """Names of parameters that no other code cell reads."""
        rest = "\n".join(source for name, source in self.code.items() if name != "parameters")
        names = (node for node in ast.walk(ast.parse(rest)) if isinstance(node, ast.Name))
        read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        return set(notebooks.parameters(self.path)) - read

    def _start(self, given: dict[str, object]) -> Variables:
        variables: Variables = {"display": self._display}  # as a kernel has it
        for name in self.start:
            self._output(name, variables)
            if name == "parameters":
                assert given.keys() <= variables.keys(), f"{self.name} lacks {given.keys()}"
                variables.update(given)
        return variables

    def _output(self, name: str, variables: Variables) -> Output:
        tree, where, value = ast.parse(self.code[name]), f"{self.name}:{name}", None
        silent = self.code[name].rstrip().endswith(";") or not isinstance(tree.body[-1], ast.Expr)
        last = None if silent else ast.Expression(tree.body.pop().value)
        self._displayed = []
        with mock.patch("IPython.display.display", self._display):
            exec(compile(tree, where, "exec"), variables)
            if last is not None:
                value = eval(compile(last, where, "eval"), variables)
        data = [getattr(x, "data", None) for x in (*self._displayed, value)]
        drawn = bool(plt.get_fignums())
        plt.close("all")
        text = "\n".join(x for x in data if isinstance(x, str))
        return Output(getattr(value, "data", value), text, drawn)

    def _display(self, *shown: object, **options: object) -> mock.Mock | None:
        """Stands in for IPython's; what updates a display later is not kept."""
        self._displayed += shown
        return mock.Mock() if "display_id" in options else None


def _defines(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]).isupper()
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


def study(name: str = "cifar10-lab") -> list[Run]:
    """All Runs of a study under book/profiles."""
    return sweeps.load_study(project_root() / "book" / "profiles" / f"{name}.yml")


def made_up_record(
    run: Run, metrics: dict[str, float], history: Sequence[dict[str, float]] = ()
) -> Record:
    """A Record of a Run that was never trained, with a cost and a provenance of no meaning."""
    return Record(
        run=run, metrics=metrics, history=list(history),
        cost={"seconds": 60.0, "images_per_second": 1.0, "peak_memory_bytes": 1},
        provenance={"code": "abc", "commit": "1234567" + 33 * "0", "clean": True, "torch": "2",
                    "device": "CPU of the test", "date": "2026-01-02T00:00:00"},
    )  # fmt: skip
