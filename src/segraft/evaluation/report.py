"""One HTML file that says what was done and how good it is: nothing to install, nothing loaded from a network."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from segraft.atomic import replacing
from segraft.evaluation.results import MISSING, OVERALL

_PNG = b"\x89PNG\r\n\x1a\n"
_CSS_PER_METRE = 96 / 0.0254
_MEAN_SD = re.compile(r"[^()]+ (\([^()]+\))")
# A number as `_cell` or `mean_sd` writes it, maybe with a unit; not "017-left", a date or an interval.
_NUMERIC = re.compile(
    r"[-−]?(?:\d[\d.,\N{NARROW NO-BREAK SPACE}]*(?:e[-+]?\d+)?|inf)(?:%| \S{1,5}| \(.*\))?\s*|" + MISSING
)


@dataclass(frozen=True)
class _Table:
    """A table as text: `numeric` says which columns are aligned right, `total` which rows sum up the others."""

    caption: str
    columns: list[str]
    numeric: list[bool]
    rows: list[tuple[str, ...]]
    total: list[bool]


@dataclass(frozen=True)
class _Picture:
    """A PNG; width and height are in CSS pixels."""

    caption: str
    base64: str
    width: int
    height: int


def write_report(
    path: Path,
    *,
    title: str,
    lead: str,
    notes: Sequence[str],
    tables: Sequence[tuple[str, pd.DataFrame]],
    figures: Sequence[tuple[str, bytes]],
    details: Mapping[str, object],
    appendix: Sequence[tuple[str, pd.DataFrame]] = (),
) -> Path:
    """Write a self-contained HTML report; every text in it is escaped.

    Floats in one column of a table share their decimals, so that the points align; what is missing (NaN, None) is
    shown as "–". An index is shown as the first column if it has a name.

    Args:
        path: the HTML file; its folder is made.
        title: the heading, also of the browser's tab.
        lead: the result in a sentence or two.
        notes: what to keep in mind while reading, shown below the lead.
        tables: (caption, frame) in the order shown.
        figures: (caption, PNG) in the order shown; the caption is also the text for who cannot see the picture.
        details: name → value of everything that makes the result reproducible. Nested mappings and lists are
            written out.
        appendix: tables for who wants to look closer, below the figures.

    Returns:
        The path.

    Raises:
        SegraftError: the file cannot be written.
        TypeError: a figure is not a PNG.
    """
    environment = Environment(
        loader=PackageLoader("segraft.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        title=title,
        lead=lead,
        notes=list(notes),
        tables=[_as_text(caption, frame) for caption, frame in tables],
        figures=[_picture(caption, png) for caption, png in figures],
        appendix=[_as_text(caption, frame) for caption, frame in appendix],
        details=[(str(name), _value(value)) for name, value in details.items()],
    )
    with replacing(path) as aside:
        aside.write_text(html, encoding="utf-8", newline="\n")
    return path


def _as_text(caption: str, frame: pd.DataFrame) -> _Table:
    shown = frame.reset_index() if any(frame.index.names) else frame
    cells = [_column(shown.iloc[:, place]) for place in range(shown.shape[1])]
    rows = list(zip(*cells, strict=True))
    return _Table(
        caption=caption,
        columns=[str(name) for name in shown.columns],
        numeric=[bool(texts) and all(_NUMERIC.fullmatch(text) for text in texts) for texts in cells],
        rows=rows,
        total=[row[0] == OVERALL for row in rows],
    )


def _column(values: Iterable[object]) -> list[str]:
    """The texts of one column, floats with as many decimals as the largest of them deserves."""
    column = list(values)
    floats = [abs(value) for value in column if _is_float(value) and np.isfinite(value)]
    largest = max(floats, default=0.0)
    decimals = 3 if largest <= 1 else 2 if largest < 100 else 1
    return _aligned([_cell(value, decimals) for value in column])


def _aligned(texts: list[str]) -> list[str]:
    """Fill up shorter brackets of "mean (SD)" on the right, so that the means stand below one another."""
    brackets = [match[1] if (match := _MEAN_SD.fullmatch(text)) else "" for text in texts]
    longest = max(brackets, key=len, default="")
    if not longest or not all(map(_NUMERIC.fullmatch, texts)):
        return texts
    points = [longest.count(".") - bracket.count(".") for bracket in brackets]
    digits = [len(longest) - len(bracket) - point for bracket, point in zip(brackets, points, strict=True)]
    filling = ["\N{PUNCTUATION SPACE}" * p + "\N{FIGURE SPACE}" * d for p, d in zip(points, digits, strict=True)]
    return [text + fill if bracket else text for text, bracket, fill in zip(texts, brackets, filling, strict=True)]


def _cell(value: object, decimals: int) -> str:
    if value is None or value is pd.NA or value is pd.NaT:
        return MISSING
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if _is_float(value):
        return MISSING if np.isnan(value) else f"{value:,.{decimals}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return str(value)


def _is_float(value: object) -> TypeGuard[float]:
    return isinstance(value, float | np.floating)


def _value(value: object) -> str:
    """A detail's value as one line; floats keep six digits."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_value(item)}" for name, item in value.items()) or MISSING
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return ", ".join(_value(item) for item in value) or MISSING
    if _is_float(value) and not np.isnan(value):
        return f"{value:.6g}"
    return _cell(value, 3)


def _picture(caption: str, png: bytes) -> _Picture:
    if not png.startswith(_PNG):
        raise TypeError(f'The figure "{caption}" is not a PNG.')
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # the IHDR chunk comes first
    scale = _CSS_PER_METRE / _pixels_per_metre(png)
    return _Picture(caption, base64.b64encode(png).decode("ascii"), round(width * scale), round(height * scale))


def _pixels_per_metre(png: bytes) -> float:
    """The resolution a PNG asks to be shown at (its pHYs chunk): letters then have the size they were drawn for."""
    at = png.find(b"pHYs", 0, png.find(b"IDAT"))
    asked = int.from_bytes(png[at + 4 : at + 8], "big") if at > 0 else 0
    return asked or _CSS_PER_METRE
