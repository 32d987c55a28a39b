"""Charts as PNG files. matplotlib's objects are used without pyplot, which would keep every figure alive."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.report.boxes import class_colour

INK = "#282c30"
FAINT = "#8a929a"
BLUE = "#0072b2"
LONGEST_NAME = 36  # characters
MOST_NAMED = 12  # curves in a legend
FEWEST_BARS = 5  # that a chart has room for, lest a lone one be a slab
MOST_OVERLAID = 3000  # boxes: more would be one smear


def curves(series: Mapping[str, Sequence[float]], x: Sequence[float], title: str, x_label: str, y_label: str) -> bytes:
    """Lines over one x, NaN left out. Of more than twelve the first, say the mean, stands out and alone is named."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = _axes(figure.add_subplot(), title, x_label, y_label)
    many = len(series) > MOST_NAMED
    drawn = []
    for index, values in enumerate(series.values()):
        plain = many and index > 0
        drawn += axes.plot(
            x,
            values,
            color=BLUE if many and not plain else _colour(index),
            linewidth=0.8 if plain else 2,
            alpha=0.6 if plain else 1,
            zorder=2 if plain else 3,
        )
    if series:
        names = [_label(name) for name in series]
        shown = [f"{names[0]}; thin: {len(names) - 1} others"] if many else names
        axes.legend(drawn[: len(shown)], shown, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    else:
        _nothing(axes, "nothing to draw")
    return _png(figure)


def learning_curves(columns: Mapping[str, Sequence[float]]) -> bytes:
    """A small chart for every column but `epoch`, over `epoch` or, without that, over 1, 2, …; NaN is left out."""
    names = [name for name in columns if name != "epoch"]
    across = min(4, max(1, len(names)))
    down = max(1, math.ceil(len(names) / across))
    figure = Figure(figsize=(3.2 * across, 2.5 * down), layout="constrained")
    for index, name in enumerate(names):
        values = np.asarray(columns[name], dtype=float)
        epochs = np.asarray(columns.get("epoch", np.arange(1, len(values) + 1)), dtype=float)
        there = np.isfinite(values)
        axes = _axes(figure.add_subplot(down, across, index + 1), _short(name), "", "")
        axes.title.set_fontsize(9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.plot(
            epochs[there], values[there], color=BLUE, linewidth=1.6, marker="o" if there.sum() < 20 else None, ms=3
        )
        if not there.any():
            _nothing(axes, "no figures")
    return _png(figure)


def bars(names: Sequence[str], values: Sequence[float], title: str) -> bytes:
    """One horizontal bar a name, the first on top, with its figure at its end."""
    figure = Figure(figsize=(8, 1.2 + 0.28 * max(FEWEST_BARS, len(names))), layout="constrained")
    axes = _axes(figure.add_subplot(), title, "", "")
    _draw_bars(axes, names, values)
    return _png(figure)


def confusion(matrix: np.ndarray, names: Sequence[str]) -> bytes:
    """What was found in place of what. matrix: counts `[C + 1, C + 1]`, rows the truth, columns what was found,
    the last of both background: a missed box counts in its column, a false alarm in its row. Coloured by share
    of the row."""
    total = len(names) + 1
    assert matrix.shape == (total, total), matrix.shape
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 4.5 + 0.45 * total if total <= 40 else 9 + 0.16 * total
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(np.ma.masked_equal(shares, 0), cmap="Blues", vmin=0, vmax=1)
    small = 10 if total <= 12 else 8 if total <= 40 else 6
    labels = [*map(_label, names), "background"]
    axes.set_xticks(range(total), labels, rotation=90 if total > 4 else 0, fontsize=small)
    axes.set_yticks(range(total), labels, fontsize=small)
    axes.set_xlabel("found", color=INK)
    axes.set_ylabel("truth", color=INK)
    axes.set_title("What was found for the truth", color=INK, fontsize=11, loc="left")
    axes.set_xticks(np.arange(total + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(total + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#e3e6e9", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    for row, column in np.argwhere(matrix > 0):
        ink = "white" if shares[row, column] > 0.55 else INK
        size = small if total <= 12 else 6 if total <= 40 else 4
        axes.text(column, row, f"{matrix[row, column]:g}", ha="center", va="center", color=ink, fontsize=size)
    figure.colorbar(shown, ax=axes, shrink=0.6, aspect=30, label="share of the row").outline.set_visible(False)
    return _png(figure)


def box_statistics(boxes: np.ndarray, names: Sequence[str]) -> bytes:
    """Four panels: boxes a class, centres, sizes, and all boxes where they lie.

    boxes: `[N, 5]` label, centre x and y, width and height as shares of the picture; y grows downwards.
    """
    counts = np.bincount(boxes[:, 0].astype(int), minlength=len(names))
    figure = Figure(figsize=(12, max(10.0, 5.5 + 0.13 * len(names))), layout="constrained")
    grid = figure.subplots(2, 2, height_ratios=(max(1.0, 0.03 * len(names)), 1))
    _draw_bars(_axes(grid[0, 0], f"Boxes a class ({len(boxes):,} in all)", "", ""), names, counts)
    grid[0, 0].xaxis.get_major_locator().set_params(integer=True)
    _draw_boxes(_axes(grid[0, 1], "Boxes where they lie", "", ""), boxes)
    _draw_density(_axes(grid[1, 0], "Centres", "x, share of the width", "y, share of the height"), boxes[:, 1:3], True)
    _draw_density(_axes(grid[1, 1], "Sizes", "width, share", "height, share"), boxes[:, 3:5], False)
    return _png(figure)


def _draw_bars(axes: Axes, names: Sequence[str], values: Sequence[float] | np.ndarray) -> None:
    places = np.arange(len(names))
    small = 9 if len(names) <= 40 else 7
    numbers = np.nan_to_num(np.asarray(values, dtype=float))
    colours = [_colour(index) for index in range(len(names))]
    drawn = axes.barh(places, numbers, color=colours, height=0.75)
    axes.bar_label(
        drawn, ["–" if math.isnan(value) else f"{value:,.4g}" for value in values], padding=3, fontsize=small, color=INK
    )
    axes.set_yticks(places, [_label(name) for name in names], fontsize=small)
    axes.set_ylim(max(len(names), FEWEST_BARS) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * numbers.max(initial=0) or 1)
    axes.grid(False, axis="y")


def _draw_boxes(axes: Axes, boxes: np.ndarray) -> None:
    chosen = boxes[np.linspace(0, len(boxes) - 1, min(len(boxes), MOST_OVERLAID)).astype(int)]
    x1, y1 = chosen[:, 1] - chosen[:, 3] / 2, chosen[:, 2] - chosen[:, 4] / 2
    x2, y2 = x1 + chosen[:, 3], y1 + chosen[:, 4]
    outlines = np.stack([np.stack(part, 1) for part in ((x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1))], 1)
    colours = [_colour(int(label)) for label in chosen[:, 0]]
    opacity = float(np.clip(30 / max(1, len(chosen)) ** 0.75, 0.08, 0.9))
    axes.add_collection(LineCollection(list(outlines), colors=colours, linewidths=1, alpha=opacity))
    _unit_square(axes, downwards=True)
    if not len(boxes):
        _nothing(axes, "no boxes")


def _draw_density(axes: Axes, points: np.ndarray, downwards: bool) -> None:
    """How many of `[N, 2]` points lie in each of 50 x 50 parts of the unit square."""
    counts, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=50, range=((0, 1), (0, 1)))
    # The square root lets the few outside the crowd be seen too.
    shown = np.ma.masked_equal(np.sqrt(counts.T), 0)
    axes.imshow(shown, extent=(0, 1, 0, 1), origin="lower", cmap="viridis_r", interpolation="nearest", zorder=1)
    _unit_square(axes, downwards)
    if not len(points):
        _nothing(axes, "no boxes")


def _unit_square(axes: Axes, downwards: bool) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim((1, 0) if downwards else (0, 1))
    axes.set_aspect("equal", anchor="N")


def _axes(axes: Axes, title: str, x_label: str, y_label: str) -> Axes:
    axes.set_title(_literal(title), color=INK, fontsize=11, loc="left")
    axes.set_xlabel(_literal(x_label), color=INK)
    axes.set_ylabel(_literal(y_label), color=INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color="#e3e6e9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    return axes


def _nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=FAINT)


def _colour(index: int) -> tuple[float, float, float]:
    red, green, blue = class_colour(index)
    return red / 255, green / 255, blue / 255


def _short(name: str) -> str:
    """One line that leaves room for the chart."""
    text = " ".join(name.split())
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def _label(name: str) -> str:
    return _literal(_short(name))


def _literal(text: str) -> str:
    """Taken as it stands, not as a formula; what is no Unicode, as in some file names, is shown as `?`."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a name in letters that the font lacks
        # Software and date left out: the same figures give the same bytes.
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
