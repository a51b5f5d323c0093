"""The few-shot paper's figures: Dice by initial rank, and against the number of trained parameters.

Methods differ by marker and line as well as by colour, so that they are told apart in grey and with any colour vision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from segraft.errors import SegraftError
from segraft.evaluation.figures import COLOURS, DPI, finished_axes, png
from segraft.evaluation.labelling import INK, Labels

STYLES: tuple[tuple[str, Any, str], ...] = (
    ("o", "-", COLOURS[6]), ("s", "--", COLOURS[5]), ("^", ":", COLOURS[2]), ("D", "-.", COLOURS[3]),
    ("v", (0, (5, 1)), COLOURS[0]), ("P", (0, (1, 1)), COLOURS[1]), ("X", (0, (3, 1, 1, 1)), INK),
)  # fmt: skip
"""Marker, line and colour; used in turn."""

_LEFT, _RIGHT, _ABOVE, _AXIS, _LINE = 0.72, 0.15, 0.42, 0.55, 0.24  # in
_PANEL, _WIDE, _GAP = (3.2, 2.9), (7.4, 3.6), 0.5  # in
_GROWTHS = 3


@dataclass(frozen=True)
class Point:
    """An arm in the picture of Dice against trained parameters.

    Attributes:
        name: beside the point.
        trained: parameters; 0 for what trains nothing, which is drawn as a line across.
        dice: one mean over patients per seed.
        kind: points of one kind look alike.
    """

    name: str
    trained: int
    dice: Sequence[float]
    kind: str = ""


def rank_figure(scores: Mapping[int, Mapping[str, Mapping[int, Sequence[float]]]]) -> bytes:
    """Draw Dice by initial rank: a panel per number of shots, a line per method, bars of one SD over seeds each way.

    Points of one rank stand a little apart, so that their bars do not cover each other.

    Args:
        scores: shots → method → initial rank → one mean over patients per seed. What has no scores is left out.

    Returns:
        A PNG file.

    Raises:
        SegraftError: there are no scores, or one is not a finite number.
    """
    given = [item for panel in scores.values() for item in panel.items()]
    methods = list(dict.fromkeys(name for name, ranks in given if any(ranks.values())))
    drawn = [(rank, dice) for _, each in given for rank, dice in each.items() if dice]
    low, high = _limits([dice for _, dice in drawn])
    ranks = sorted({rank for rank, _ in drawn})
    rows = -(-len(methods) // 2)
    below = _AXIS + rows * _LINE + 0.1
    width, height = len(scores) * (_PANEL[0] + _GAP) + _LEFT - _GAP + _RIGHT, _PANEL[1] + below + _ABOVE
    figure = _figure(width, height)
    for place, (shots, panel) in enumerate(scores.items()):
        left = _LEFT + place * (_PANEL[0] + _GAP)
        ax = figure.add_axes((left / width, below / height, _PANEL[0] / width, _PANEL[1] / height))
        ax.set_xscale("log", base=2)
        for number, name in enumerate(methods):
            there = {rank: dice for rank, dice in sorted(panel.get(name, {}).items()) if dice}
            aside = 2 ** (0.09 * (number - (len(methods) - 1) / 2))
            marker, line, colour = STYLES[number % len(STYLES)]
            ax.errorbar(
                [rank * aside for rank in there],
                [float(np.mean(dice)) for dice in there.values()],
                yerr=[_sd(dice) for dice in there.values()],
                marker=marker,
                linestyle=line,
                color=colour,
                markersize=6,
                linewidth=1.6,
                elinewidth=1.1,
                capsize=3,
            )
        ax.set_ylim(low, high)
        ax.set_xlim(min(ranks) / 1.35, max(ranks) * 1.35)
        finished_axes(ax, xlabel="Initial rank", ylabel="" if place else "Dice", title=_shots(shots))
        ax.set_xticks(ranks, [str(rank) for rank in ranks])
        ax.set_xticks([], minor=True)
    keys = [
        Line2D([], [], marker=marker, linestyle=line, color=colour, markersize=6, label=name)
        for name, (marker, line, colour) in ((name, STYLES[n % len(STYLES)]) for n, name in enumerate(methods))
    ]
    _legend(figure, keys, columns=2)
    return png(figure)


def parameters_figure(panels: Mapping[int, Sequence[Point]]) -> bytes:
    """Draw Dice against trained parameters, on a logarithmic axis: a panel per number of shots, below one another.

    Every point carries its name and a bar of one SD over seeds each way. No name covers another or a point; where names
    are many, the panels grow. What trains nothing is a dashed line across.

    Args:
        panels: shots → arms.

    Returns:
        A PNG file.

    Raises:
        SegraftError: there are no scores, or one is not a finite number.
    """
    _limits([point.dice for points in panels.values() for point in points])
    tall = _WIDE[1]
    for growth in range(_GROWTHS):
        figure, apart = _parameters(panels, tall)
        if apart or growth == _GROWTHS - 1:
            break
        tall *= 1.4
    return png(figure)


def _parameters(panels: Mapping[int, Sequence[Point]], tall: float) -> tuple[Figure, bool]:
    """The figure with panels of this height in inches, and whether all names found a free place."""
    kinds = list(dict.fromkeys(point.kind for points in panels.values() for point in points if point.trained))
    keyed = [kind for kind in kinds if kind]
    low, high = _limits([point.dice for points in panels.values() for point in points])
    counts = [point.trained for points in panels.values() for point in points if point.trained] or [1]
    below = _AXIS + len(keyed) * _LINE + 0.1
    width = _LEFT + _WIDE[0] + _RIGHT
    step = tall + _ABOVE
    height = below + len(panels) * step + (len(panels) - 1) * _AXIS
    figure = _figure(width, height)
    apart = True
    for place, (shots, points) in enumerate(panels.items()):
        bottom = height - (place + 1) * step - place * _AXIS
        ax = figure.add_axes((_LEFT / width, bottom / height, _WIDE[0] / width, tall / height))
        ax.set_xscale("log")
        ax.set_xlim(min(counts) / 3, max(counts) * 3)
        ax.set_ylim(low, high)
        finished_axes(ax, xlabel="Trained parameters", ylabel="Dice", title=_shots(shots))
        ax.minorticks_off()
        apart &= _labelled_points(ax, points, kinds)
    keys = [
        Line2D([], [], marker=marker, linestyle="", color=colour, markersize=6.5, label=kind)
        for kind, (marker, _, colour) in ((kind, STYLES[kinds.index(kind) % len(STYLES)]) for kind in keyed)
    ]
    if keys:
        _legend(figure, keys, columns=1)
    return figure, apart


def _labelled_points(ax: Axes, points: Sequence[Point], kinds: Sequence[str]) -> bool:
    labels = Labels(ax)
    means = {point.name: float(np.mean(point.dice)) for point in points}
    trained = sorted((point for point in points if point.trained), key=lambda point: (point.trained, point.name))
    for point in trained:
        marker, _, colour = STYLES[kinds.index(point.kind) % len(STYLES)]
        bar: dict[str, Any] = {"yerr": _sd(point.dice), "elinewidth": 1, "capsize": 2.5}
        ax.errorbar(point.trained, means[point.name], marker=marker, color=colour, markersize=6.5, zorder=3, **bar)
        labels.block(point.trained, means[point.name], _sd(point.dice))
    lines = {point.name: means[point.name] for point in points if not point.trained}
    for mean in lines.values():
        ax.axhline(mean, color=INK, linestyle="--", linewidth=1.1, zorder=1)
    apart = labels.across(lines)
    return labels.beside([(point.name, point.trained, means[point.name]) for point in trained]) and apart


def _limits(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of the axis of Dice, the same in all panels: every mean with its SD, and some room."""
    some = [np.asarray(dice, dtype=np.float64) for dice in scores if len(dice)]
    if not some:
        raise SegraftError("There are no scores to draw: finish at least one run.")
    if not all(np.isfinite(dice).all() for dice in some):
        raise SegraftError("A score is not a finite number: leave that run out or measure it again.")
    low = min(float(dice.mean()) - _sd(dice) for dice in some)
    high = max(float(dice.mean()) + _sd(dice) for dice in some)
    room = max(0.12 * (high - low), 0.02)
    return max(low - room, -0.02), min(high + room, 1.02)


def _sd(dice: Sequence[float] | np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    return float(np.std(dice, ddof=1)) if len(dice) > 1 else 0.0


def _shots(shots: int) -> str:
    return f"{shots} shot{'s' if shots != 1 else ''}"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _legend(figure: Figure, keys: Sequence[Line2D], *, columns: int) -> None:
    legend = figure.legend(
        handles=list(keys),
        loc="lower left",
        bbox_to_anchor=(0.5 / figure.get_figwidth(), 0.08 / figure.get_figheight()),
        ncols=columns,
        frameon=False,
        fontsize=9,
        borderpad=0,
        borderaxespad=0,
        handlelength=2.6,
        columnspacing=1.6,
    )
    for text in legend.get_texts():
        text.set(parse_math=False, color=INK)
