"""The figures: what is drawn is what the data say, and it can be read on both pages."""

import ast
import inspect
import io
from itertools import pairwise

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from hcl import compare, figures, geometry, pictures

WHITE, DARK = "#FFFFFF", "#121212"


@pytest.fixture(autouse=True)
def style():
    with mpl.rc_context():
        figures.use_style()
        yield
        plt.close("all")


@pytest.fixture
def runs() -> pd.DataFrame:
    noise = np.random.default_rng(0).normal(0, 0.03, (3, 5))
    rows = [
        (m, m, t, s, 0.5 + 0.1 * i + t * noise[i, s])
        for i, m in enumerate(("nt_xent", "debiased", "hard"))
        for t in (0.1, 0.2, 0.5)
        for s in range(5)
    ]
    return pd.DataFrame(rows, columns=["method", "label", "temperature", "seed", "knn"])


def png(fig) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=60)
    return buffer.getvalue()


def pixels(fig) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(fig))).convert("RGBA"))


def luminance(colour) -> float:
    """Relative luminance, WCAG 2.1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(a, b) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def texts(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


# --- colours and style ----------------------------------------------------------------------


def test_contrast_is_wcags():
    assert contrast("black", "white") == pytest.approx(21)
    assert contrast("#777777", "white") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("page", [WHITE, DARK])
def test_every_colour_reads_on_both_pages(page):
    many = pictures._class_colours(30)
    for colour in [
        *figures.PALETTE,
        *figures.METHOD_COLOURS.values(),
        *figures.FIXED.values(),
        *many,
    ]:
        assert contrast(colour, page) >= 3, colour
    assert contrast(figures.GREY, page) > 4.2


def test_colours_are_distinct():
    assert len(set(figures.PALETTE)) == len(figures.PALETTE) <= len(figures.MARKERS)
    lab = [np.array(to_rgb(colour)) for colour in figures.PALETTE[:4]]
    assert min(np.abs(a - b).max() for a, b in pairwise(lab)) > 0.2


def test_methods_have_one_name_in_tables_and_figures():
    assert figures.METHOD_LABELS == compare.LABELS
    assert figures.METHOD_LABELS.keys() == figures.METHOD_COLOURS.keys()


def test_style_is_transparent_without_use_of_pyplot_show(runs):
    ax = figures.curves(runs, "temperature", "knn", "method")
    assert pixels(ax.figure)[0, 0, 3] == 0
    for text in (
        ax.xaxis.label,
        ax.yaxis.label,
        *ax.get_xticklabels(),
        *ax.get_legend().get_texts(),
    ):
        assert mpl.colors.to_hex(text.get_color()).upper() == figures.GREY


def test_same_figure_same_svg(runs):
    def svg() -> bytes:
        buffer = io.BytesIO()
        ax = figures.curves(runs, "temperature", "knn", "method")
        ax.figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()

    assert svg() == svg()


def test_umap_is_imported_only_when_drawn():
    source = ast.parse(inspect.getsource(figures))
    imports = [node for node in source.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(imports) > 5
    assert not any("umap" in ast.unparse(node) for node in imports)


# --- curves ---------------------------------------------------------------------------------


def test_curves_draw_means_and_standard_errors_over_seeds(runs):
    ax = figures.curves(runs, "temperature", "knn", "method")
    groups = runs.groupby(["method", "temperature"])["knn"]
    assert len(ax.containers) == 3
    for method, container in zip(("nt_xent", "debiased", "hard"), ax.containers, strict=True):
        segments = container.lines[2][0].get_segments()
        for t, segment in zip((0.1, 0.2, 0.5), segments, strict=True):
            mean, se = groups.mean()[method, t], groups.sem()[method, t]
            np.testing.assert_allclose(segment, [[t, mean - se], [t, mean + se]], rtol=1e-9)


def test_curves_name_axes_methods_and_percent(runs):
    ax = figures.curves(runs, "temperature", "knn", "method", log_x=True)
    assert ax.get_xlabel() == "temperature $t$"
    assert ax.get_ylabel() == "kNN accuracy"
    assert texts(ax.get_legend()) == ["SimCLR", "Debiased", "HCL"]
    assert ax.get_xscale() == "log"
    assert [ax.yaxis.get_major_formatter()(v) for v in (0.5, 0.625)] == ["50%", "62.5%"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.1", "0.2", "0.5"]


def test_curves_give_methods_their_colours_in_any_order(runs):
    ax = figures.curves(runs[::-1], "temperature", "knn", "method")
    handles, names = ax.get_legend_handles_labels()
    drawn = {
        name: mpl.colors.to_hex(h.get_color()).upper()
        for h, name in zip(handles, names, strict=True)
    }
    for method in runs["method"].unique():
        assert drawn[figures.METHOD_LABELS[method]] == figures.METHOD_COLOURS[method]


def test_curves_take_style_numeric_hue_and_an_axes(runs):
    _, ax = plt.subplots()
    assert figures.curves(runs, "temperature", "knn", "temperature", ax=ax) is ax
    assert texts(ax.get_legend()) == ["0.1", "0.2", "0.5"]
    both = figures.curves(runs, "seed", "knn", "method", style="temperature")
    assert len([line for line in both.get_lines() if len(line.get_xdata()) == 5]) >= 9
    rates = [f"temperature $t$ = {t}" for t in (0.1, 0.2, 0.5)]
    assert texts(both.get_legend()) == ["SimCLR", "Debiased", "HCL", *rates]
    for handle in both.get_legend().legend_handles[3:]:
        assert handle.get_color() == figures.GREY


def test_curves_of_one_seed_have_no_bars(runs):
    ax = figures.curves(runs[runs["seed"] == 0], "temperature", "knn", "method")
    assert len(ax.get_lines()) >= 3
    ends = [s for c in ax.containers for bars in c.lines[2] for s in bars.get_segments() if len(s)]
    assert not any(np.ptp(segment[:, 1]) > 0 for segment in ends)


@pytest.mark.parametrize("missing", ["x", "y", "hue", "style"])
def test_curves_name_the_missing_column(runs, missing):
    columns = {"x": "temperature", "y": "knn", "hue": "method", "style": "seed"} | {missing: "bat"}
    with pytest.raises(ValueError, match="'bat' is not in the frame"):
        figures.curves(runs, **columns)


def test_curves_refuse_nothing_and_too_much(runs):
    with pytest.raises(ValueError, match="no rows"):
        figures.curves(runs[:0], "temperature", "knn", "method")
    with pytest.raises(ValueError, match="seed has 11 levels: at most 10"):
        figures.curves(runs.assign(seed=np.arange(len(runs)) % 11), "knn", "knn", "seed")


# --- differences ----------------------------------------------------------------------------


def test_differences_draw_the_paired_table_in_points(runs):
    table = compare.paired(runs, "knn", baseline={"label": "nt_xent"}, by=["label", "temperature"])
    ax = figures.differences(
        table, label="label", metric="knn", baseline="SimCLR", hue="temperature"
    )
    assert ax.get_xlabel() == "kNN accuracy minus SimCLR's (points)"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["Debiased", "HCL"]
    assert texts(ax.get_legend()) == ["0.1", "0.2", "0.5"]
    for t, container in zip((0.1, 0.2, 0.5), ax.containers, strict=True):
        part = table[table["temperature"] == t]
        drawn = np.asarray(container.lines[0].get_xdata(), float)
        np.testing.assert_allclose(drawn, 100 * part["difference"])
        bars = np.array(container.lines[2][0].get_segments())[:, :, 0]
        np.testing.assert_allclose(np.ptp(bars, axis=1) / 2, 100 * part["se"])


def test_differences_without_hue_and_of_no_accuracy():
    table = pd.DataFrame({"label": ["HCL β=1"], "difference": [0.2], "se": [0.1], "n": [5]})
    ax = figures.differences(table, label="label", metric="uniformity", baseline="SimCLR")
    assert ax.get_xlabel() == "uniformity minus SimCLR's"
    assert ax.containers[0].lines[0].get_xdata().tolist() == [0.2]


def test_differences_refuse_an_unfit_table():
    table = pd.DataFrame({"label": ["HCL"], "difference": [0.2]})
    with pytest.raises(ValueError, match="'se'"):
        figures.differences(table, label="label", metric="knn", baseline="SimCLR")
    with pytest.raises(ValueError, match="no rows"):
        figures.differences(
            table[:0].assign(se=0.0), label="label", metric="knn", baseline="SimCLR"
        )


# --- embeddings -----------------------------------------------------------------------------


def cluster_panel(title="HCL", n=60, classes=3):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    z = 4 * torch.eye(classes, 8)[labels] + 0.3 * torch.randn(n, 8, generator=g)
    return title, z, labels, [f"class {c}" for c in range(classes)]


def offsets(fig) -> np.ndarray:
    return np.concatenate([c.get_offsets() for ax in fig.axes for c in ax.collections])


def test_embeddings_draw_every_point_apart_by_class_and_reproducibly():
    panels = [cluster_panel("one"), cluster_panel("two", n=30)]
    fig = pictures.embeddings(panels, neighbours=10)
    assert [ax.get_title() for ax in fig.axes] == ["one", "two"]
    assert [ax.get_xlabel() for ax in fig.axes] == ["UMAP 1", "UMAP 1"]
    assert texts(fig.legends[0]) == ["class 0", "class 1", "class 2"]
    assert len(offsets(fig)) == 90
    groups = [collection.get_offsets() for collection in fig.axes[0].collections]
    spread = max(np.linalg.norm(g - g.mean(0), axis=1).mean() for g in groups)
    apart = min(np.linalg.norm(groups[i].mean(0) - groups[i - 1].mean(0)) for i in range(3))
    assert apart > 2 * spread
    again = pictures.embeddings(panels, neighbours=10)
    np.testing.assert_array_equal(offsets(again), offsets(fig))
    other = pictures.embeddings(panels, neighbours=10, seed=1)
    assert not np.array_equal(offsets(other), offsets(fig))
    assert pixels(fig)[0, 0, 3] == 0


def test_embeddings_do_not_depend_on_the_length_of_vectors():
    title, z, labels, names = cluster_panel(n=30)
    scaled = title, z * 2.0 ** (torch.arange(30)[:, None] % 3), labels, names
    one, two = pictures.embeddings([(title, z, labels, names)]), pictures.embeddings([scaled])
    np.testing.assert_array_equal(offsets(one), offsets(two))


def test_embeddings_of_many_classes_have_colours_and_no_legend():
    fig = pictures.embeddings([cluster_panel(n=48, classes=8)])
    assert len(fig.legends) == 1
    title, z, labels, _ = cluster_panel(n=48, classes=8)
    fig = pictures.embeddings([(title, z, labels, [str(c) for c in range(12)])])
    assert not fig.legends


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, z, y, n: (t, z[:-1], y, n), "'HCL' has 59 points and 60 labels"),
        (lambda t, z, y, n: (t, z[:3], y[:3], n), "UMAP needs four"),
        (lambda t, z, y, n: (t, z / 0, y, n), "NaN or infinite"),
        (lambda t, z, y, n: (t, z, y, n[:2]), "names 2 classes"),
    ],
)
def test_embeddings_refuse_unfit_panels(spoil, message):
    with pytest.raises(ValueError, match=message):
        pictures.embeddings([spoil(*cluster_panel())])
    with pytest.raises(ValueError, match="panels is empty"):
        pictures.embeddings([])


# --- histograms -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4])
def test_histograms_show_the_densities_and_their_overlap(n):
    _, z, labels, _ = cluster_panel()
    edges, same, different = geometry.similarity_histograms(z, labels, bins=20)
    fig = figures.histograms([(f"panel {i}", edges, same, different) for i in range(n)])
    assert len(fig.axes) == n
    share = geometry.overlap(same, different, edges)
    for i, ax in enumerate(fig.axes):
        assert ax.get_title() == f"panel {i}\noverlap {share:.2f}"
        outlines = [p for p in ax.patches if p.get_label() in ("same class", "different class")]
        for patch, density in zip(outlines, (same, different), strict=True):
            np.testing.assert_array_equal(patch.get_data().values, density)
    assert fig.axes[0].get_ylabel() == "density"
    assert any(ax.get_xlabel() == "cosine similarity" for ax in fig.axes)
    assert texts(fig.legends[0]) == ["same class", "different class"]


def test_histograms_refuse_nothing_and_unfit_lengths():
    with pytest.raises(ValueError, match="panels is empty"):
        figures.histograms([])
    with pytest.raises(ValueError, match="one more than bins"):
        figures.histograms([("a", np.linspace(-1, 1, 4), np.ones(4), np.ones(4))])


# --- pictures -------------------------------------------------------------------------------


def test_image_grid_shows_pictures_titles_and_borders():
    red = torch.zeros(3, 4, 6, dtype=torch.uint8)
    red[0] = 255
    grey = np.full((4, 6), 0.5)
    fig = pictures.image_grid(
        [[red, red], [grey]],
        row_titles=["anchor", "negatives"],
        column_titles=["a", "b"],
        borders=[[None, figures.PALETTE[5]], [None]],
    )
    images = [ax.images[0].get_array() if ax.images else None for ax in fig.axes]
    assert images[0].shape == (4, 6, 3)
    assert images[0][0, 0].tolist() == [1, 0, 0]
    assert images[2].tolist() == grey.tolist()
    assert images[3] is None
    assert [ax.get_title() for ax in fig.axes[:2]] == ["a", "b"]
    assert [fig.axes[i].get_ylabel() for i in (0, 2)] == ["anchor", "negatives"]
    framed = [ax.spines["left"].get_visible() for ax in fig.axes]
    assert framed == [False, True, False, False]
    assert (
        mpl.colors.to_hex(fig.axes[1].spines["left"].get_edgecolor()).upper() == figures.PALETTE[5]
    )


def test_channels_come_first_in_tensors_and_last_in_arrays():
    picture = torch.rand(3, 5, 3, generator=torch.Generator().manual_seed(0))
    fig = pictures.image_grid([[picture, picture.permute(1, 2, 0).numpy()]])
    one, two = (ax.images[0].get_array() for ax in fig.axes)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "rows is empty"),
        ([[]], {}, "rows is empty"),
        ([[torch.zeros(2, 4, 4)]], {}, r"shape \(2, 4, 4\)"),
        ([[torch.full((3, 4, 4), -1.0)]], {}, "outside"),
        ([[torch.full((3, 4, 4), torch.nan)]], {}, "outside"),
        ([[torch.zeros(3, 4, 4)]], {"row_titles": ["a", "b"]}, "row_titles has 2 entries: 1"),
        ([[torch.zeros(3, 4, 4)]], {"column_titles": []}, "column_titles has 0 entries: 1"),
        ([[torch.zeros(3, 4, 4)]], {"borders": [[None, None]]}, "has 2 entries: 1"),
    ],
)
def test_image_grid_refuses_unfit_input(rows, options, message):
    with pytest.raises(ValueError, match=message):
        pictures.image_grid(rows, **options)


def test_no_figure_is_wider_than_a_page():
    _, z, labels, _ = cluster_panel()
    h = geometry.similarity_histograms(z, labels)
    grid = pictures.image_grid([[torch.zeros(3, 4, 4)] * 12])
    for fig in (grid, figures.histograms([("a", *h)] * 5)):
        assert fig.get_size_inches()[0] <= figures.WIDTH


def test_drawing_embeddings_leaves_torchs_threads_alone():
    torch.set_num_threads(1)
    pictures.embeddings([cluster_panel()])
    assert torch.get_num_threads() == 1
