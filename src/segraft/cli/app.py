"""The Typer application, and how commands show results."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from segraft._version import __version__
from segraft.cli.widths import fitted
from segraft.errors import SegraftError

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    name="segraft",
    help="Graft small adapters onto pre-trained medical segmentation networks, from a few labelled scans.",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)
out = Console()
err = Console(stderr=True)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


def one_line(text: str) -> str:
    """Text on one line, in which nothing can pass for another line or reach the terminal as a command.

    Names in files and repositories of others may hold any character.
    """
    return _visible(" ".join(text.split()))


def _visible(text: str) -> str:
    """Spaces for other white space, and what cannot be printed by its code, as Python writes it."""
    return "".join(
        char
        if char.isprintable()
        else " "
        if char.isspace()
        else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in text
    )


def _lines(text: str) -> str:
    """The same of several lines."""
    return "\n".join(map(_visible, text.split("\n")))


def progress_console(*, as_json: bool) -> Console | None:
    """Where progress bars go: standard error, and nowhere when a machine or a file reads it."""
    return err if err.is_terminal and not as_json else None


def show_json(values: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(values, indent=2, default=_path, allow_nan=False))  # noqa: T201


def _path(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: int = 0) -> None:
    """A table of plain text, which is folded rather than cut, the last `right` columns aligned right.

    Names of files and labels are shown as they are: Rich would read brackets in them as markup.
    """
    columns = [one_line(name) for name in columns]
    table = Table(*(Column(Text(name), overflow="fold") for name in columns), title=Text(one_line(title)))
    for column in table.columns[len(columns) - right :]:
        column.justify = "right"
    texts = [[_lines(value) for value in row] for row in rows]
    for row in texts:
        table.add_row(*(Text(value) for value in row))
    widths = fitted([[name, *(row[place] for row in texts)] for place, name in enumerate(columns)], out.width)
    for column, width in zip(table.columns, widths or (), strict=False):
        column.width = width
    out.print(table)


def show_frame(frame: "pd.DataFrame", title: str) -> None:
    """A table of results, numbers to three digits."""
    rows = frame.itertuples(index=False)
    texts = ([_three_digits(value) if isinstance(value, float) else str(value) for value in row] for row in rows)
    show_table(title, [str(name) for name in frame.columns], texts)


def _three_digits(value: float) -> str:
    """And no powers of ten for what is large: 6097 mL, not 6.1e+03."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def show_line(text: str) -> None:
    """Lines of results, unbroken and without colours."""
    out.print(_lines(text), highlight=False, markup=False, soft_wrap=True)


def show_notes(notes: Sequence[str]) -> None:
    """What the user should know besides the result, on standard error."""
    for note in notes:
        err.print(one_line(f"note: {note}"), highlight=False, markup=False, soft_wrap=True)


def split(values: Sequence[str] | None) -> tuple[str, ...]:
    """Repeated and comma-separated values, as one tuple."""
    return tuple(part.strip() for value in values or () for part in value.split(",") if part.strip())


def json_object(text: str | None, option: str) -> dict[str, Any]:
    """The value of an option that takes a JSON object.

    Raises:
        SegraftError: it is none.
    """
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise SegraftError(f"{option} {text!r} is not JSON ({error}): write it as '{{\"name\": value}}'.") from error
    if not isinstance(value, dict):
        raise SegraftError(f"{option} {text!r} is no JSON object: write it as '{{\"name\": value}}'.")
    return value
