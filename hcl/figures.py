"""The book's figures: one style, transparent, readable on a light and on a dark page.

Every function draws with pyplot and returns the Figure or Axes; in a notebook, end the cell's
last line with a semicolon, or the picture appears twice.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hcl.compare import LABELS as METHOD_LABELS
from hcl.geometry import overlap

Array = np.ndarray
Histogram = tuple[str, Array, Array, Array]

# A contrast of at least 3 (WCAG 2.1, 1.4.11) against white and against #121212 leaves the middle
# tones; text would need 4.5, which no one colour has against both: GREY, at 4.3, is the best.
GREY = "#7A7A7A"
PALETTE = (
    "#3B82C4",  # blue
    "#D2691E",  # orange
    "#2E9E6B",  # green
    "#B565B5",  # purple
    "#A8871C",  # ochre
    "#DA5A6A",  # rose
    "#2A97A8",  # teal
    "#7D6BD6",  # violet
    "#9C6B4A",  # brown
    "#6B8E23",  # olive
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*", "h")
METHOD_COLOURS = {
    "nt_xent": PALETTE[0], "debiased": PALETTE[2], "hard": PALETTE[1], "scl": PALETTE[6],
    "hard_scl": PALETTE[5], "supcon": PALETTE[3], "decoupled": PALETTE[4], "schane": PALETTE[8],
    "infograph": PALETTE[7], "quick_thoughts": PALETTE[0], "hard_neighbours": PALETTE[1],
    "unremix": PALETTE[9], "ring": PALETTE[7], "bayesian": PALETTE[8], "transport": PALETTE[6],
    "cross_entropy": PALETTE[9],
}  # fmt: skip
FIXED = {METHOD_LABELS[method]: colour for method, colour in METHOD_COLOURS.items()} | {
    "HCL β=1": PALETTE[1],
    "H-SCL β=1": PALETTE[5],
    "raw input": GREY,
    "untrained encoder": GREY,
}
AXIS_NAMES = {
    "knn": "kNN accuracy",
    "linear": "linear probe accuracy",
    "svc": "SVC accuracy",
    "top1": "accuracy of the classifier",
    "retrieval": "retrieval",
    "temperature": "temperature $t$",
    "beta": r"hardness $\beta$",
    "tau_plus": r"class prior $\tau^+$",
    "batch": "batch size",
    "epoch": "epoch",
}
ACCURACIES = ("knn", "linear", "top1", "retrieval")  # shares of one, shown in percent
PAIRS = ("same class", "different class")
WIDTH = 7.0  # inches, the width of a page's text


def use_style() -> None:
    """Set the book's look for every figure that follows; call it once at the top of a notebook.

    In a notebook, figures become SVG files (points and pictures in them as pixels), the same bytes
    for the same figure.
    """
    sns.set_theme(context="notebook", style="ticks", palette=list(PALETTE), rc=_rc())
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None:
        set_matplotlib_formats("svg", metadata={"Date": None})


def curves(
    df: pd.DataFrame,
    x: str,
    y: str,
    hue: str,
    style: str | None = None,
    *,
    log_x: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Mean of y over seeds against x, one line a level of hue, bars of one standard error.

    df: one row a run (`hcl.compare.frame`).  A level with a single seed gets no bar.

    Raises: ValueError for an empty frame, a missing column, or more levels than colours.
    """
    _need(df, [x, y, hue, *([style] if style else [])])
    data, palette = _with_labels(df, hue)
    if style:
        data = data.assign(
            **{style: [f"{_axis_name(style)} = {_name(value)}" for value in df[style]]}
        )
    ax = _axes((WIDTH * 0.8, 3.6)) if ax is None else ax
    sns.lineplot(
        data, x=x, y=y, hue=hue, hue_order=list(palette), palette=palette, ax=ax, linewidth=1.8,
        style=style or hue, markers=_markers(data, style or hue), dashes=bool(style), markersize=7,
        markeredgewidth=0,
        errorbar=("se", 1), err_style="bars", err_kws={"capsize": 3, "elinewidth": 1.2},
    )  # fmt: skip
    _x_ticks(ax, data[x], log_x)
    if y in ACCURACIES:
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    ax.set(xlabel=_axis_name(x), ylabel=_axis_name(y))
    _legend_above(ax, without=(hue, style) if style else ())
    return ax


def differences(
    table: pd.DataFrame,
    *,
    label: str,
    metric: str,
    baseline: str,
    hue: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Paired differences to a baseline, one row a level of label, bars of one standard error.

    table: columns label, hue, difference and se (`hcl.compare.paired`).  Accuracies are drawn in
    percentage points.

    Raises: ValueError for an empty table, a missing column, or more levels than colours.
    """
    _need(table, [label, "difference", "se", *([hue] if hue else [])])
    rows = list(dict.fromkeys(table[label]))
    ax = _axes((WIDTH * 0.8, 1.3 + 0.45 * len(rows))) if ax is None else ax
    scale, unit = (100, " (points)") if metric in ACCURACIES else (1, "")
    data, palette = _with_labels(table, hue or label)
    for k, (level, colour) in enumerate(palette.items()):
        part = data[data[hue or label] == level]
        names = table.loc[part.index, label]
        shift = 0.18 * (k - (len(palette) - 1) / 2) if hue else 0.0  # levels beside each other
        ax.errorbar(
            scale * part["difference"], [rows.index(name) + shift for name in names],
            xerr=scale * part["se"], fmt=MARKERS[k] if hue else "o", color=colour, capsize=3,
            markersize=7, label=str(level),
        )  # fmt: skip
    ax.axvline(0, color=GREY, linewidth=1, linestyle=":")
    ax.set_yticks(range(len(rows)), [_name(row) for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set(xlabel=f"{_axis_name(metric)} minus {baseline}'s{unit}")
    ax.set_ylabel("" if label in ("label", "method") else _axis_name(label))
    if hue:
        _legend_above(ax, title=_axis_name(hue))
    return ax


def histograms(panels: Sequence[Histogram]) -> Figure:
    """Cosine similarities of same-class and different-class pairs, each panel with its overlap.

    panels: (title, edges, same, different) with the last three from
    `hcl.geometry.similarity_histograms`.  All panels share their axes.

    Raises: ValueError for no panel, or lengths that do not fit.
    """
    if not panels:
        raise ValueError("panels is empty: one (title, edges, same, different) at least would do")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(WIDTH if columns > 1 else WIDTH * 0.6, 2.1 * rows + 0.6),
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for ax, (title, edges, same, different) in zip(axes.flat, panels, strict=False):
        share = overlap(same, different, edges)
        for density, colour, name in zip((same, different), PALETTE, PAIRS, strict=False):
            ax.stairs(density, edges, fill=True, color=colour, alpha=0.35)
            ax.stairs(density, edges, color=colour, linewidth=1.4, label=name)
        ax.set_title(f"{title}\noverlap {share:.2f}")
        ax.set(xlim=(-1, 1), xlabel="cosine similarity")
        ax.set_xticks([-1, -0.5, 0, 0.5, 1], ["−1", "", "0", "", "1"])
        ax.label_outer()
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax in axes[:, 0]:
        ax.set_ylabel("density")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def _rc() -> dict[str, Any]:
    grey = (
        "text.color",
        "axes.labelcolor",
        "axes.edgecolor",
        "axes.titlecolor",
        "legend.labelcolor",
    )
    ticks = {f"{axis}tick.{part}": GREY for axis in "xy" for part in ("color", "labelcolor")}
    clear = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "savefig.edgecolor")
    small = ("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize")
    return {
        **dict.fromkeys(grey, GREY),
        **ticks,
        **dict.fromkeys(clear, "none"),
        **dict.fromkeys(small, 9.5),
        "axes.titlesize": 10.5,
        "axes.labelsize": 10.5,
        "axes.linewidth": 1.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.dpi": 160,  # of what is rasterised; an SVG's size is in inches
        "savefig.dpi": 160,
        "svg.hashsalt": "hcl",  # the same figure, the same bytes
        "figure.constrained_layout.use": True,
    }


def _axes(size: tuple[float, float]) -> Axes:
    return plt.subplots(figsize=size)[1]


def _need(df: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in df.columns]:
        there = ", ".join(map(str, df.columns))
        raise ValueError(f"column {missing[0]!r} is not in the frame, which has: {there}")
    if df.empty:
        raise ValueError("the frame has no rows: are the runs recorded?")


def _axis_name(column: str) -> str:
    return AXIS_NAMES.get(column, column)


def _name(level: Hashable) -> str:
    """What a legend calls a level: a method's own name, a number without trailing zeros."""
    number = isinstance(level, float | np.floating)
    return f"{level:g}" if number else METHOD_LABELS.get(str(level), str(level))


def _with_labels(df: pd.DataFrame, hue: str) -> tuple[pd.DataFrame, dict[str, str]]:
    """The frame with hue as names, and each name's colour in order (numbers sorted)."""
    levels = list(dict.fromkeys(df[hue]))
    if pd.api.types.is_numeric_dtype(df[hue]):
        levels.sort()
    names = [_name(level) for level in levels]
    if len(names) > len(PALETTE):
        raise ValueError(f"{hue} has {len(names)} levels: at most {len(PALETTE)} have a colour")
    taken = {colour for name, colour in FIXED.items() if name in names}
    free = sorted(set(PALETTE) - taken, key=lambda c: (c in FIXED.values(), PALETTE.index(c)))
    colours = {name: FIXED.get(name) or free.pop(0) for name in names}
    return df.assign(**{hue: df[hue].map(_name)}), colours


def _markers(data: pd.DataFrame, style: str) -> dict[Hashable, str]:
    return dict(zip(dict.fromkeys(data[style]), MARKERS, strict=False))


def _x_ticks(ax: Axes, values: pd.Series, log_x: bool) -> None:
    """Ticks at the values themselves where they are few numbers."""
    if log_x:
        ax.set_xscale("log", base=2)
    ticks = sorted(values.unique())
    if pd.api.types.is_numeric_dtype(values) and len(ticks) <= 8:
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        ax.minorticks_off()


def _columns(names: Iterable[str]) -> int:
    """As many legend columns as fit a page's width, at about 70 letters a line."""
    widest = max(map(len, names), default=0) + 6
    return max(1, min(4, 70 // widest))


def _legend_above(ax: Axes, title: str = "", without: Sequence[str | None] = ()) -> None:
    """A frameless legend over the axes; `without` are seaborn's own headings."""
    entries = zip(*ax.get_legend_handles_labels(), strict=True)
    shown = {name: handle for handle, name in entries if name not in without}
    legend = ax.legend(
        shown.values(), shown.keys(), title=title or None, loc="lower left",
        bbox_to_anchor=(0, 1.0), ncols=2 if without else _columns(shown), columnspacing=1.4,
        handlelength=1.8,
    )  # fmt: skip
    for handle in legend.legend_handles if without else ():
        if isinstance(handle, Line2D) and handle.get_color() not in PALETTE:
            handle.set(color=GREY, markerfacecolor=GREY)
