"""Pictures of masks and of scores, as PNG bytes.

Drawn with matplotlib's objects alone: no global state, no display, safe in threads and on servers.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from segraft.data.labels import Labels
from segraft.errors import SegraftError
from segraft.evaluation.metrics import dice
from segraft.evaluation.view import Array, AxialView, axial_view, displayed_range

# Okabe and Ito's palette, told apart with any colour vision; its black is left out because scans are grey.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
DPI = 160

_INK, _FAINT, _GRID = "#1c1f23", "#5b636d", "#d9dde2"
_OPACITY = 0.55
_PANEL_IN, _NARROWEST_IN, _GAP_IN, _EDGE_IN, _LINE_IN = 2.8, 1.8, 0.1, 0.16, 0.2
_NAME_LENGTH = 40
_SCORES_SHOWN = 3  # of more labels than this, one mean stands below a panel


def comparison_figure(
    image: Array,
    truth: Array,
    predictions: Mapping[str, Array],
    *,
    window: tuple[float, float] | None,
    spacing_mm: Sequence[float],
    title: str,
    labels: Mapping[int, str] | None = None,
) -> bytes:
    """Draw the image, the truth and each prediction side by side on the axial slice with the most truth.

    Masks are filled; the truth's outline is drawn over each prediction, so that what is filled outside of it was
    predicted in error and what is empty inside was missed. The Dice scores below are of the whole volume. The
    view is radiological (the patient's right on the left, anterior at the top), which presumes RAS+ arrays.

    Args:
        image: `[X, Y, Z]` intensities, HU for CT.
        truth: label map of the same shape; 0 is the background.
        predictions: name → label map of the same shape.
        window: the intensities shown black and white; None takes the image's 0.5th and 99.5th percentiles.
        spacing_mm: voxel edge along each axis in mm.
        title: printed at the top.
        labels: label value → name for the legend; a label that is not listed is called by its value. Of regions
            (`segraft.data.labels.Labels`) the maps show what lies above, and the scores are of each as a whole.

    Returns:
        A PNG file.

    Raises:
        SegraftError: the arrays are not `[X, Y, Z]` of one shape, or the window's ends are not in order.
    """
    _check(image, {"truth": truth} | dict(predictions), window)
    low, high = displayed_range(image, window)
    view = axial_view(image, truth, list(predictions.values()), (low, high), spacing_mm)
    values = _values(truth, *predictions.values())
    apart = len(values) <= _SCORES_SHOWN
    on_slice = _values(*(view.of(mask) for mask in (truth, *predictions.values())))
    names = {value: str((labels or {}).get(value, f"label {value}")) for value in (values if apart else on_slice)}

    note = f"Axial slice {view.z + 1} of {image.shape[2]}" + ("; Dice of the whole volume" if predictions else "")
    outlined = view.of(truth)
    figure, axes = _panels(["Image", "Truth", *predictions], view, title, note, names)
    for ax, mask in zip(axes, [None, truth, *predictions.values()], strict=True):
        extent = (0, view.size_mm[0], 0, view.size_mm[1])
        ax.imshow(view.of(image), cmap="gray", vmin=low, vmax=high, origin="lower", extent=extent)
        if mask is not None:
            ax.imshow(_filled(view.of(mask)), origin="lower", extent=extent, interpolation="nearest")
            _outline(ax, outlined, view)
    for ax, prediction in zip(axes[2:], predictions.values(), strict=True):
        _write_scores(ax, prediction, truth, Labels.of(labels or {}), apart=apart)
    for x, side, align in ((0.03, "R", "left"), (0.97, "L", "right")):
        mark = axes[0].text(x, 0.97, side, transform=axes[0].transAxes, ha=align, va="top", color="white")
        mark.set(fontsize=9, path_effects=[withStroke(linewidth=2, foreground="black")])
    return png(figure)


def dice_figure(scores: Mapping[str, Sequence[float]], *, ylabel: str = "Dice") -> bytes:
    """Draw a box plot with every score as a point and the number of scores below each box.

    The box spans the quartiles, the line in it is the median, the whiskers reach the last point within 1.5 box
    heights. The axis starts at 0 and, if no score is larger, ends at 1, so that figures can be compared.

    Args:
        scores: name of the group (a method, a rank, a label) → its scores.
        ylabel: what the scores are, with their unit.

    Returns:
        A PNG file.

    Raises:
        SegraftError: there are no groups, or a score is not a finite number.
    """
    if not scores:
        raise SegraftError("There are no scores to draw: evaluate at least one case.")
    groups = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    for name, values in groups.items():
        if not np.isfinite(values).all():
            raise SegraftError(f"{name}: a score is not a finite number: leave that case out or measure it again.")

    ticks = [f"{textwrap.fill(name, 14)}\nn = {values.size}" for name, values in groups.items()]
    lines = max(tick.count("\n") + 1 for tick in ticks)
    width, bottom = max(3.6, 0.9 + 1.05 * len(groups)), 0.18 + 0.17 * lines
    height = 3.1 + bottom
    figure = _figure(width, height)
    ax = figure.add_axes((0.72 / width, bottom / height, 1 - 0.84 / width, 1 - (bottom + 0.14) / height))
    places = np.arange(len(groups))
    for place, values in zip(places, groups.values(), strict=True):
        if values.size:
            ax.scatter(place + _spread(values), values, s=16, color=COLOURS[-1], alpha=0.65, linewidth=0, zorder=3)
    ax.boxplot(
        list(groups.values()),
        positions=places,
        widths=0.55,
        showfliers=False,  # every point is drawn already
        patch_artist=True,
        boxprops={"facecolor": "#e4eef6", "edgecolor": _FAINT},
        whiskerprops={"color": _FAINT},
        capprops={"color": _FAINT},
        medianprops={"color": COLOURS[5], "linewidth": 2},
    )
    ax.set_xticks(places, ticks, parse_math=False)
    ax.set_xlim(-0.6, len(groups) - 0.4)
    ax.set_ylabel(ylabel, color=_INK, parse_math=False)
    everything = np.concatenate(list(groups.values()))
    if everything.size and everything.min() >= 0:
        top = 1.0 if everything.max() <= 1 else 1.05 * everything.max()
        ax.set_ylim(-0.02 * top, 1.02 * top)
    ax.grid(axis="y", color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.spines["left"].set_color(_GRID)
    ax.tick_params(length=0, labelsize=9, labelcolor=_INK)
    return png(figure)


def _panels(
    names: Sequence[str], view: AxialView, title: str, note: str, labels: Mapping[int, str]
) -> tuple[Figure, list[Axes]]:
    """A figure with one row of bare axes; everything is placed in inches, so that nothing can overlap."""
    width_mm, height_mm = view.size_mm
    panel = max(_PANEL_IN * width_mm / height_mm, _NARROWEST_IN)
    panel_height = min(_PANEL_IN, 2 * _PANEL_IN * height_mm / width_mm)
    panel = min(panel, 2 * _PANEL_IN)
    width = 2 * _EDGE_IN + len(names) * panel + (len(names) - 1) * _GAP_IN
    heads = [textwrap.wrap(name, int(panel * 13)) or [""] for name in names]
    title_lines = textwrap.wrap(title, int(width * 9.5)) or [""]
    keys = _keys(labels)
    longest = max(len(str(key.get_label())) for key in keys)
    columns = max(int((width - 2 * _EDGE_IN) / (0.5 + 0.085 * longest)), 1)
    legend_rows = -(-len(keys) // columns)
    above = _EDGE_IN + (len(title_lines) + 1) * 1.15 * _LINE_IN + max(map(len, heads)) * 0.8 * _LINE_IN + 0.08
    below = _EDGE_IN + 1.4 * _LINE_IN + legend_rows * 0.95 * _LINE_IN
    height = above + panel_height + below

    figure = _figure(width, height)
    left = _EDGE_IN / width
    figure.text(
        left, 1 - _EDGE_IN / height, "\n".join(title_lines), va="top", fontsize=12, weight="bold", parse_math=False
    )
    note_at = 1 - (_EDGE_IN + len(title_lines) * 1.2 * _LINE_IN) / height
    figure.text(left, note_at, note, va="top", fontsize=8.5, color=_FAINT)
    axes = []
    for place, head in enumerate(heads):
        x = _EDGE_IN + place * (panel + _GAP_IN)
        ax = figure.add_axes((x / width, below / height, panel / width, panel_height / height))
        ax.set_axis_off()
        ax.set_title("\n".join(head), fontsize=9.5, color=_INK, pad=5, parse_math=False)
        axes.append(ax)
    legend = figure.legend(
        handles=keys,
        loc="lower left",
        bbox_to_anchor=(left, 0.8 * _EDGE_IN / height),
        ncols=columns,
        frameon=False,
        fontsize=9,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.3,
        columnspacing=1.6,
    )
    for text in legend.get_texts():
        text.set(parse_math=False, color=_INK)
    return figure, axes


def _keys(labels: Mapping[int, str]) -> list[Artist]:
    names = {
        value: name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…" for value, name in labels.items()
    }
    line = Line2D([], [], color="white", linewidth=1.3, label="outline of the truth")
    line.set_path_effects([withStroke(linewidth=3, foreground=_INK)])
    return [*(Patch(color=_colour(value), label=name) for value, name in names.items()), line]


def _outline(ax: Axes, labels: Array, view: AxialView) -> None:
    padded = np.pad(labels, 1)  # outlines close at the picture's edge
    columns, rows = (
        (np.arange(size) - 0.5) * edge for size, edge in zip(padded.shape[::-1], view.spacing_mm, strict=True)
    )
    for value in _values(labels):
        line = ax.contour(columns, rows, padded == value, levels=[0.5], colors="white", linewidths=1.1)
        line.set(path_effects=[withStroke(linewidth=2.4, foreground=_INK)])
    ax.set(xlim=(0, view.size_mm[0]), ylim=(0, view.size_mm[1]))


def _write_scores(ax: Axes, prediction: Array, truth: Array, labels: Labels, *, apart: bool) -> None:
    scores = {
        value: dice(labels.plane(prediction, value), labels.plane(truth, value)) for value in _values(truth, prediction)
    }
    style = {"fontsize": 9, "color": _INK}
    parts: list[Artist]
    if not scores:
        parts = [TextArea("nothing to find, nothing found", textprops=style)]
    elif len(scores) == 1:
        parts = [TextArea(f"Dice {next(iter(scores.values())):.3f}", textprops=style)]
    elif apart:
        parts = [TextArea("Dice", textprops=style)]
        for value, score in scores.items():
            parts.append(TextArea("■", textprops=style | {"color": _colour(value)}))
            parts.append(TextArea(f"{score:.3f}", textprops=style))
    else:
        mean = float(np.mean(list(scores.values())))
        parts = [TextArea(f"mean Dice of {len(scores)} labels {mean:.3f}", textprops=style)]
    row = HPacker(children=parts, align="baseline", pad=0, sep=4)
    ax.add_artist(
        AnchoredOffsetbox(
            "upper center",
            child=row,
            frameon=False,
            pad=0,
            borderpad=0.5,
            bbox_to_anchor=(0.5, 0),
            bbox_transform=ax.transAxes,
        )
    )


def _filled(labels: Array) -> Array:
    """A translucent picture `[rows, columns, RGBA]` of a label map."""
    picture = np.zeros((*labels.shape, 4))
    for value in _values(labels):
        picture[labels == value] = (*_colour(value), _OPACITY)
    return picture


def _colour(value: int) -> tuple[float, float, float]:
    """By the label's value alone, so that a label has one colour in all figures of a task."""
    turn, place = divmod(value - 1, len(COLOURS))
    other, amount = ((0.0, 0.0), (1.0, 0.5), (0.0, 0.5))[turn % 3]  # after seven labels lighter, then darker
    red, green, blue = (channel + amount * (other - channel) for channel in to_rgb(COLOURS[place]))
    return red, green, blue


def _values(*label_maps: Array) -> list[int]:
    return sorted({int(value) for labels in label_maps for value in np.unique(labels[labels != 0])})


def figure_of(width: float, height: float, *, left: float, below: float, above: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; everything in inches."""
    figure = _figure(width, height)
    ax = figure.add_axes((left / width, below / height, 1 - (left + 0.15) / width, 1 - (below + above) / height))
    return figure, ax


def finished_axes(ax: Axes, *, xlabel: str, ylabel: str, title: str) -> None:
    """Lines, letters and colours as in all figures."""
    ax.set_xlabel(xlabel, color=_INK, parse_math=False)
    ax.set_ylabel(ylabel, color=_INK, parse_math=False)
    ax.set_title(title, fontsize=11, weight="bold", color=_INK, loc="left", parse_math=False)
    ax.grid(color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_GRID)
    ax.tick_params(length=0, labelsize=9, labelcolor=_INK)


def _spread(values: Array) -> Array:
    """Sideways offsets that keep near-equal scores apart and are the same in every run."""
    turns = values.argsort(kind="stable").argsort(kind="stable") * 0.6180339887  # golden ratio: even, never periodic
    return ((turns + 0.5) % 1 - 0.5) * 0.36


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The file of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _check(image: Array, masks: Mapping[str, Array], window: tuple[float, float] | None) -> None:
    for name, mask in masks.items():
        if image.ndim != 3 or mask.shape != image.shape:
            raise SegraftError(
                f"{name}: the mask {mask.shape} and the image {image.shape} must be [X, Y, Z] on one grid: "
                "resample one to the other."
            )
    if window is not None and not window[0] < window[1]:
        raise SegraftError(f"The window {window} has its ends in the wrong order: give the lower number first.")
