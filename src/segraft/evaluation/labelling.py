"""Names beside the points of a picture, each where it covers nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

INK, FAINT = "#1c1f23", "#5b636d"
_SIZE = 8.5  # pt
_MARKER, _MARGIN = 4.5, 1.5  # pt
_DISTANCES = tuple(7 * 1.3**step for step in range(18))  # pt from the point to the nearest part of its name
_FAR = 60  # pt; a name that would stand further away may rather cross the bars of other points
_DIRECTIONS = tuple(np.deg2rad([0, 180, 30, 150, -30, 210, 60, 120, -60, 240, 75, 105, -75, 255, 90, 270]))
_TRIES = 8
_LED = 14  # pt from which a line leads to the point

Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""


@dataclass(frozen=True)
class _Written:
    """A name with the box it has, and where a line to it begins, if it has one."""

    name: str
    box: Box
    led_from: tuple[float, float] | None = None


@dataclass
class Labels:
    """Puts names into axes whose limits are settled. None covers another or a point.

    Of bars and lines across, names and the lines to them keep clear where there is room.

    Attributes:
        ax: the axes.
    """

    ax: Axes
    _marks: list[Box] = field(default_factory=list)
    _bars: list[Box] = field(default_factory=list)
    _names: list[Box] = field(default_factory=list)
    _leads: list[Box] = field(default_factory=list)

    def block(self, x: float, y: float, reach: float = 0.0) -> None:
        """A point, with a bar that reaches so far up and down."""
        (px, low), (_, high) = (self._pixels(x, y - reach), self._pixels(x, y + reach))
        edge, middle = self._points(_MARKER), (low + high) / 2
        self._marks.append((px - edge, middle - edge, px + edge, middle + edge))
        self._bars.append((px - edge, low - edge, px + edge, high + edge))

    def across(self, lines: Mapping[str, float]) -> bool:
        """Write names on lines across, wherever it is free; whether it is so for all.

        Args:
            lines: name -> its height.
        """
        left, right = self.ax.get_xlim()
        bounds, edge, written = self._bounds(), self._points(1), []
        for y in lines.values():
            (x0, at), (x1, _) = self._pixels(left, y), self._pixels(right, y)
            self._bars.append((x0, at - edge, x1, at + edge))
        for name, y in lines.items():
            (_, at), (width, height) = self._pixels(left, y), self._size(name)
            places = product(
                (self._points(3), -self._points(3) - height), np.linspace(bounds[0], bounds[2] - width, 12)
            )
            boxes = [(x, at + rise, x + width, at + rise + height) for rise, x in places]
            written.append(self._find(name, boxes, None, self._bars) or self._find(name, boxes, None, self._marks))
        return self._write(written)

    def beside(self, points: Sequence[tuple[str, float, float]]) -> bool:
        """Write a name beside each point, near where that can be, else with a line to it; whether all found a place.

        Those that find none because of others are tried again before them.

        Args:
            points: (name, x, y).
        """
        names, leads, order = list(self._names), list(self._leads), list(points)
        for _ in range(_TRIES):
            self._names, self._leads = list(names), list(leads)
            written = [self._near(*point) for point in order]
            failed = [point for point, found in zip(order, written, strict=True) if found is None]
            if not failed:
                break
            order = [*failed, *(point for point in order if point not in failed)]
        return self._write(written)

    def _near(self, name: str, x: float, y: float) -> _Written | None:
        at = self._pixels(x, y)
        width, height = self._size(name)
        near = [distance for distance in _DISTANCES if distance < _FAR]
        ways = ((near, self._bars, True), (_DISTANCES, self._marks, True), (_DISTANCES, self._marks, False))
        for distances, marks, apart in ways:
            turns = product(distances, _DIRECTIONS)
            boxes = [self._box(at, self._points(distance), turn, width, height) for distance, turn in turns]
            if found := self._find(name, boxes, at, marks, apart=apart):
                return found
        return None

    def _find(
        self,
        name: str,
        boxes: Sequence[Box],
        at: tuple[float, float] | None,
        marks: Sequence[Box],
        *,
        apart: bool = True,
    ) -> _Written | None:
        """The first of these boxes that is free of marks and names, taken for the name.

        Args:
            name: to be written.
            boxes: where it may stand, the best first.
            at: the point that it is of.
            marks: what must be kept clear of.
            apart: also keep names from the lines to other names.
        """
        bounds, margin = self._bounds(), self._points(_MARGIN)
        there = None if at is None else (*at, *at)
        others = [mark for mark in marks if there is None or not _meet(mark, there)]
        for box in boxes:
            inside = bounds[0] <= box[0] and bounds[1] <= box[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
            leads = self._leads if apart else ()
            if not inside or any(_meet(box, other) for other in (*marks, *self._names, *leads)):
                continue
            steps: list[Box] = []
            if at is not None and self._is_far(at, box):
                steps = self._lead(at, _nearest(at, box))
                if apart and any(_meet(step, other) for step in steps for other in (*self._names, *others)):
                    continue
            self._leads += steps
            self._names.append((box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin))
            return _Written(name, box, at if steps else None)
        return None

    def _write(self, written: Sequence[_Written | None]) -> bool:
        to_data = self.ax.transData.inverted().transform
        for each in written:
            if each is None:
                continue
            left, bottom, _, top = each.box
            x, y = to_data((left, (bottom + top) / 2))
            text = self.ax.text(x, y, each.name, fontsize=_SIZE, color=INK, ha="left", va="center", parse_math=False)
            text.set(path_effects=[withStroke(linewidth=2, foreground="white")], zorder=4)
            if each.led_from is not None:
                (x0, y0), (x1, y1) = to_data(each.led_from), to_data(_nearest(each.led_from, each.box))
                self.ax.plot([x0, x1], [y0, y1], color=FAINT, linewidth=0.6, zorder=2)
        return all(written)

    def _is_far(self, at: tuple[float, float], box: Box) -> bool:
        x, y = _nearest(at, box)
        return bool(np.hypot(x - at[0], y - at[1]) > self._points(_LED))

    @staticmethod
    def _lead(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
        """A line as small boxes."""
        steps = np.linspace(start, end, 60)
        return [(float(x) - 0.5, float(y) - 0.5, float(x) + 0.5, float(y) + 0.5) for x, y in steps]

    @staticmethod
    def _box(at: tuple[float, float], distance: float, turn: float, width: float, height: float) -> Box:
        """Of a name in this direction: its nearest corner, or the middle of its nearest edge, is so far away."""
        x, y = at[0] + distance * np.cos(turn), at[1] + distance * np.sin(turn)
        across, up = round(float(np.cos(turn)), 6), round(float(np.sin(turn)), 6)
        left = x - width / 2 if across == 0 else x if across > 0 else x - width
        bottom = y - height / 2 if up == 0 else y if up > 0 else y - height
        return float(left), float(bottom), float(left + width), float(bottom + height)

    def _size(self, name: str) -> tuple[float, float]:
        canvas = self.ax.figure.canvas
        assert isinstance(canvas, FigureCanvasAgg)  # noqa: S101  as all figures here
        text = Text(0, 0, name, fontsize=_SIZE, parse_math=False)
        text.set_figure(self.ax.figure)
        extent = text.get_window_extent(canvas.get_renderer())  # type: ignore[no-untyped-call]
        return extent.width, extent.height

    def _bounds(self) -> Box:
        (left, bottom), (right, top) = self.ax.transAxes.transform([(0, 0), (1, 1)])
        edge = self._points(2)
        return left + edge, bottom + edge, right - edge, top - edge

    def _pixels(self, x: float, y: float) -> tuple[float, float]:
        px, py = self.ax.transData.transform((x, y))
        return float(px), float(py)

    def _points(self, points: float) -> float:
        """In pixels."""
        return points * float(self.ax.figure.dpi) / 72


def _nearest(at: tuple[float, float], box: Box) -> tuple[float, float]:
    """The point of a box that is nearest."""
    return float(np.clip(at[0], box[0], box[2])), float(np.clip(at[1], box[1], box[3]))


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
