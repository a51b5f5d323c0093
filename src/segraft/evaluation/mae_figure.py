"""The picture of what a masked auto-encoder makes of scans."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from segraft.errors import SegraftError
from segraft.evaluation.figures import DPI, png
from segraft.evaluation.view import Array, displayed_range

COLUMNS = ("Input", "Visible", "Reconstructed")
_INK, _FAINT, _HIDDEN = "#1c1f23", "#5b636d", "#cfd6de"
_PANEL_IN, _NARROWEST_IN, _GAP_IN, _EDGE_IN, _NAME_IN, _HEAD_IN = 1.9, 1.0, 0.08, 0.16, 0.42, 0.3


@dataclass(frozen=True)
class Shown:
    """One scan of the picture.

    Attributes:
        name: below its row.
        image: [X, Y, Z] voxels of the patch.
        visible: the same, NaN where they were masked.
        reconstructed: the same, with the masked voxels as predicted.
    """

    name: str
    image: Array
    visible: Array
    reconstructed: Array


def reconstruction_figure(scans: Sequence[Shown], *, note: str = "") -> bytes:
    """Draw the middle slice along Z of every scan, one per row: the input, what was visible of it, the reconstruction.

    X runs to the left and Y to the top, as in radiological convention for RAS+ arrays.

    Args:
        scans: at least one, all of one shape.
        note: at the bottom.

    Returns:
        A PNG file.

    Raises:
        SegraftError: no scans, or arrays that are not [X, Y, Z] of one shape.
    """
    shapes = {array.shape for scan in scans for array in (scan.image, scan.visible, scan.reconstructed)}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise SegraftError(f"scans to draw must be [X, Y, Z] of one shape, not {sorted(shapes)}: cut them alike.")
    wide, high, deep = next(iter(shapes))
    height = min(_PANEL_IN, 2 * _PANEL_IN * high / wide)
    width = min(max(_PANEL_IN * wide / high, _NARROWEST_IN), 2 * _PANEL_IN)
    row, total_width = height + _NAME_IN, 2 * _EDGE_IN + 3 * width + 2 * _GAP_IN
    lines = textwrap.wrap(note, int(total_width * 13))
    below = _EDGE_IN + 0.16 * len(lines)
    total_height = below + row * len(scans) + _HEAD_IN
    figure = Figure(figsize=(total_width, total_height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for place, scan in enumerate(scans):
        low, high_value = displayed_range(scan.image[:, :, deep // 2], None)
        bottom = total_height - _HEAD_IN - place * row - height
        for column, array in enumerate((scan.image, scan.visible, scan.reconstructed)):
            left = _EDGE_IN + column * (width + _GAP_IN)
            ax = figure.add_axes(
                (left / total_width, bottom / total_height, width / total_width, height / total_height)
            )
            _draw(ax, array[:, :, deep // 2], low, high_value)
            if place == 0:
                ax.set_title(COLUMNS[column], fontsize=9.5, color=_INK, pad=5)
        at = (_EDGE_IN / total_width, (bottom - 0.06) / total_height)
        figure.text(*at, scan.name, va="top", fontsize=8.5, color=_INK, parse_math=False)
    at = (_EDGE_IN / total_width, 0.6 * _EDGE_IN / total_height)
    figure.text(*at, "\n".join(lines), va="bottom", fontsize=8, color=_FAINT, parse_math=False)
    return png(figure)


def _draw(ax: Axes, pixels: Array, low: float, high: float) -> None:
    ax.set_facecolor(_HIDDEN)
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set_visible(False)
    shown = np.ma.masked_invalid(pixels[::-1].T)
    ax.imshow(shown, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="nearest", aspect="equal")
