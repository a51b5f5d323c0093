"""What the measured seconds and bytes of one network say: ratios within rounds, and their spread."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

What = Literal["step", "evaluation"]


@dataclass(frozen=True)
class Ratio:
    """The median of a ratio over rounds, and its quartiles."""

    median: float
    low: float
    high: float


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """The ratio of two tasks, taken round by round before anything is averaged."""
    ratios = [mine / other for mine, other in zip(numerators, denominators, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


class Network:
    """The runs of one network in a results file, and what they say.

    Args:
        record: as in the file.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.title: str = record["title"]
        self.family: str = record["family"]
        self.runs: Sequence[Mapping[str, Any]] = record["runs"]

    def rows(self, *, options: bool = False) -> list[tuple[str, Mapping[str, Any]]]:
        """Every variant once, from the last run that has it, ordered by rank and kind; or the options alone."""
        last: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for run in self.runs:
            if (run["group"] == "options") is options:
                last |= {name: (run["group"], row) for name, row in run["variants"].items()}

        # References have no rank; among methods of one rank, LoRA comes before DoRA.
        def place(item: tuple[str, tuple[str, Mapping[str, Any]]]) -> tuple[int, bool]:
            rank = item[1][1].get("rank", 0)
            return rank, rank > 0 and item[1][0].startswith("DoRA")

        return [(name, row) for name, (_, row) in sorted(last.items(), key=place)]

    def over(self, name: str, other: str, what: What = "step") -> Ratio | None:
        """Seconds of one variant by another's; None where no run has both."""
        run = self._run_with(name, other, holding=what)
        return run and paired(run["variants"][name][what], run["variants"][other][what])

    def evaluation_over_base(self, name: str) -> Ratio | None:
        """Evaluation of a variant by the base network's beside it."""
        run = self._run_with(name, holding="evaluation")
        row = run and run["variants"][name]
        if row and row.get("base"):
            return paired(row["evaluation"], row["base"])
        return self.over(name, "full", "evaluation")  # of a run in which the base had its turn in each round

    def memory_over(self, name: str, other: str) -> float | None:
        """Peak memory of one variant by another's."""
        run = self._run_with(name, other, holding="memory")
        return run and run["variants"][name]["memory"]["peak"] / run["variants"][other]["memory"]["peak"]

    def seconds(self, name: str, what: What = "step") -> float | None:
        """The median of a variant's seconds, in the last run that has it."""
        run = self._run_with(name, holding=what)
        return run and statistics.median(run["variants"][name][what])

    def _run_with(self, *names: str, holding: str | None = None) -> Any:
        for run in reversed(self.runs):
            rows = [run["variants"].get(name) for name in names]
            if all(row is not None and (holding is None or row.get(holding)) for row in rows):
                return run
        return None
