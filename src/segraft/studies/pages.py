"""What a report says of a study; each kind of study says it of its own findings."""

from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd


@dataclass(frozen=True)
class Shown:
    """Whose masks are drawn.

    Attributes:
        name: above the picture.
        arm: of the study.
        level: as of `Scores`.
    """

    name: str
    arm: str
    level: int | None = None


class Page(Protocol):
    """What is particular to a kind of study; the rest of the report is the same for all."""

    def lead(self) -> str:
        """The result in a sentence or two."""
        ...

    def notes(self) -> list[str]:
        """What to keep in mind, and what is missing."""
        ...

    def tables(self) -> list[tuple[str, pd.DataFrame]]:
        """(caption, frame), some perhaps without rows."""
        ...

    def figures(self) -> list[tuple[str, bytes]]:
        """(caption, PNG)."""
        ...

    def shown(self) -> list[Shown]:
        """Whose masks are drawn."""
        ...

    def values(self) -> dict[str, Any]:
        """Everything, for programs; numbers that do not exist may be NaN."""
        ...
