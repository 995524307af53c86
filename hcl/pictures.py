"""Pictures of points and images: UMAP panels and grids of images, in the style of hcl.figures."""

import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch.nn import functional as F

from hcl.figures import PALETTE, WIDTH

Array = np.ndarray
Panel = tuple[str, torch.Tensor | Array, torch.Tensor | Array, Sequence[str]]
Picture = torch.Tensor | Array


def embeddings(
    panels: Sequence[Panel], *, seed: int = 0, neighbours: int = 15, min_dist: float = 0.1
) -> Figure:
    """UMAP of each (title, z, labels, class_names), side by side, coloured by class.

    z: (n, d), compared by cosine; labels: (n,) int; class_names[label] is shown while there are
    no more than ten.  The seed fixes the picture.  The first call of a process compiles UMAP
    (tens of seconds).  Source: McInnes et al. 2018; axes have no unit.

    Raises: ValueError for no panel, lengths that differ, NaN, or fewer than four points.
    """
    if not panels:
        raise ValueError("panels is empty: one (title, z, labels, class_names) at least would do")
    width = min(WIDTH, 3.4 * len(panels))
    fig, axes = plt.subplots(
        1, len(panels), figsize=(width, width / len(panels) + 0.7), squeeze=False
    )
    for ax, (title, z, labels, names) in zip(axes[0], panels, strict=True):
        classes = np.asarray(labels)
        where = _umap(title, z, classes, names, seed, neighbours, min_dist)
        colours = _class_colours(len(names))
        for c in np.unique(classes):
            ax.scatter(
                *where[classes == c].T, s=max(2.0, min(14.0, 6000 / len(where))), color=colours[c],
                linewidths=0, rasterized=True, label=names[c],
            )  # fmt: skip
        ax.set(title=title, xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    if max(len(names) for *_, names in panels) <= len(PALETTE):
        handles = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
        for ax in axes[0][1:]:
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        fig.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=5, markerscale=2,
            handletextpad=0.2, columnspacing=1.2,
        )  # fmt: skip
    return fig


def image_grid(
    rows: Sequence[Sequence[Picture]],
    *,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    borders: Sequence[Sequence[str | None]] | None = None,
) -> Figure:
    """Pictures in rows, each (C, H, W) tensor or (H, W, C) array; uint8, or float in [0, 1].

    borders: a colour or None for each picture, for instance around the false negatives.

    Raises: ValueError for no picture, a picture of another form, or titles or borders that do not
    fit the rows.
    """
    n_columns = max(map(len, rows), default=0)
    if not n_columns:
        raise ValueError("rows is empty: one row of one picture at least would do")
    _as_many("row_titles", row_titles, len(rows))
    _as_many("column_titles", column_titles, n_columns)
    _as_many("borders", borders, len(rows))
    margin, top = 0.9 * (row_titles is not None), 0.25 * (column_titles is not None)  # inches
    side = min(1.1, (WIDTH - margin) / n_columns)
    size = (side * n_columns + margin, side * len(rows) + top)
    tight = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    fig, axes = plt.subplots(len(rows), n_columns, figsize=size, layout=tight, squeeze=False)
    for i, row in enumerate(rows):
        _as_many(f"borders[{i}]", borders[i] if borders else None, len(row))
        for j, ax in enumerate(axes[i]):
            if j < len(row):
                ax.imshow(_picture(row[j]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            _frame(ax, borders[i][j] if borders and j < len(row) else None)
    for ax, title in zip(axes[0], column_titles or (), strict=False):
        ax.set_title(title, fontsize=9)
    for ax, title in zip(axes[:, 0], row_titles or (), strict=False):
        ax.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    return fig


def _class_colours(n: int) -> list[Any]:
    return list(PALETTE) if n <= len(PALETTE) else sns.husl_palette(n, l=0.55)


def _umap(
    title: str, z: Any, labels: Array, names: Sequence[str], seed: int, neighbours: int, dist: float
) -> Array:
    points = torch.as_tensor(z).float().cpu()
    if len(points) != len(labels) or len(points) < 4:
        raise ValueError(
            f"{title!r} has {len(points)} points and {len(labels)} labels: as many of both would "
            "do, and UMAP needs four"
        )
    if not points.isfinite().all():
        raise ValueError(f"{title!r} has NaN or infinite entries: did training diverge?")
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"{title!r} names {len(names)} classes, its labels are {labels.min()} to {labels.max()}"
        )
    points = F.normalize(points, dim=1)
    k = min(neighbours, len(points))
    # Exact neighbours from torch: UMAP would spend ten seconds compiling its own search.
    cosine, nearest = zip(*((rows @ points.T).topk(k) for rows in points.split(1024)), strict=True)
    knn = torch.cat(nearest).numpy(), (1 - torch.cat(cosine)).clamp(min=0).numpy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "precomputed_knn|IProgress not found")
        threads = torch.get_num_threads()  # UMAP sets torch's threads to all cores
        try:
            from umap import UMAP  # slow to import: only who draws one waits

            reducer = UMAP(
                n_neighbors=k, min_dist=dist, metric="cosine", precomputed_knn=knn,
                init="spectral" if len(points) > 10 else "random", random_state=seed, n_jobs=1,
            )  # fmt: skip
            return np.asarray(reducer.fit_transform(points.numpy()))
        finally:
            torch.set_num_threads(threads)


def _picture(picture: Picture) -> Array:
    """Any picture as float (H, W, 3) or (H, W) in [0, 1]."""
    tensor = torch.as_tensor(picture).detach().cpu()
    if tensor.ndim == 3 and isinstance(picture, torch.Tensor):
        tensor = tensor.permute(1, 2, 0)
    if not (tensor.ndim == 2 or (tensor.ndim == 3 and tensor.shape[2] in (1, 3))):
        shape = tuple(torch.as_tensor(picture).shape)
        raise ValueError(
            f"a picture has shape {shape}: (C, H, W) tensor or (H, W, C) array would do"
        )
    tensor = tensor / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if not ((tensor >= 0) & (tensor <= 1)).all():
        raise ValueError("a picture has floats outside [0, 1]: undo its normalisation first")
    return tensor.squeeze(-1).numpy() if tensor.shape[-1] == 1 else tensor.numpy()


def _frame(ax: Axes, colour: str | None) -> None:
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(visible=colour is not None, color=colour or "none", linewidth=3)


def _as_many(name: str, values: Sequence[Any] | None, n: int) -> None:
    if values is not None and len(values) != n:
        raise ValueError(f"{name} has {len(values)} entries: {n} would do")
