"""Progress bars around loops over scans."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def watched(title: str, console: Console | None) -> Callable[[Sequence[Item]], Iterable[Item]]:
    """What passes the items of a loop on and draws a bar for them on `console`; None draws none."""

    def watch(items: Sequence[Item]) -> Iterable[Item]:
        return items if console is None else track(items, title, console=console, transient=True)

    return watch
