"""What we aim for, and whether the numbers reach it. To aim for something else, change `TARGETS`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.ratios import Network, Ratio

Value = Ratio | float | None
Found = Iterator[tuple[str, Value]]
"""Name of what was measured and its value; None where it failed."""


@dataclass(frozen=True)
class Target:
    """One sentence that is true or not of each network.

    Attributes:
        text: the sentence.
        families: of the networks it is about.
        limit: which no value may pass.
        values: of a network.
        at_least: whether the limit is from below.
    """

    text: str
    families: tuple[str, ...]
    limit: float
    values: Callable[[Network], Found]
    at_least: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a target on one network.

    Attributes:
        worst: the name of the value that is farthest on the wrong side.
        value: that value; None where it failed, or where nothing was measured.
        of: how many values there are.
    """

    target: Target
    network: Network
    worst: str
    value: Value
    of: int

    @property
    def reached(self) -> bool | None:
        """None where nothing was measured."""
        if not self.of:
            return None
        if self.value is None:
            return False
        median = number(self.value)
        return median >= self.target.limit if self.target.at_least else median <= self.target.limit


def number(value: Ratio | float) -> float:
    """The median of a ratio."""
    return value.median if isinstance(value, Ratio) else value


def judge(target: Target, network: Network) -> Outcome:
    """Hold the worst value of a network against the limit."""
    values = list(target.values(network))
    if not values:
        return Outcome(target, network, "", None, 0)
    sign = -1 if target.at_least else 1
    worst, value = max(values, key=lambda item: float("inf") if item[1] is None else sign * number(item[1]))
    return Outcome(target, network, worst, value, len(values))


def ours(network: Network, lowest: int = 0, highest: int = 10**9) -> Iterator[str]:
    """Segraft's methods of these ranks."""
    for name, row in network.rows():
        if row.get("method") and not row.get("nearest") and lowest <= row["rank"] <= highest:
            yield name


def step_over(reference: str, lowest: int, highest: int, network: Network) -> Found:
    """The step of each method by the reference's."""
    for name in ours(network, lowest, highest):
        if network.seconds(name) is not None or not network.seconds(name, "evaluation"):  # else of evaluation alone
            yield name, network.over(name, reference)


def evaluation_over_base(network: Network) -> Found:
    """Unmerged evaluation of each method by the base network's."""
    for name in ours(network):
        if network.seconds(name, "evaluation") is not None or not network.seconds(name):  # else of steps alone
            yield name, network.evaluation_over_base(name)


def memory_over_full(network: Network) -> Found:
    """Peak memory of each method by full fine-tuning's."""
    for name in ours(network):
        yield name, network.memory_over(name, "full")


def peft_over_ours(methods: tuple[str, ...], lowest: int, network: Network) -> Found:
    """PEFT's step by that of the method of ours that computes the same; a method that PEFT fails at is left out."""
    for name, row in network.rows():
        if row.get("method") in methods and row["rank"] >= lowest and "failed" not in row:
            yield f"{name} / {row['nearest']}", network.over(name, row["nearest"])


TWO, THREE, SWIN = "2D U-Net", "3D U-Net", "SwinUNETR"
PEFT = ("PEFT LoRA", "PEFT DoRA")

TARGETS = (
    Target("R ≤ 8: step at most 1.30 × bound", (TWO, THREE), 1.30, partial(step_over, "bound", 0, 8)),
    Target("R = 64: step at most 0.95 × full", (TWO, THREE), 0.95, partial(step_over, "full", 64, 64)),
    Target(
        "PEFT's step at least 1 × ours, same rank and kind",
        (TWO, THREE, SWIN),
        1.0,
        partial(peft_over_ours, PEFT, 0),
        at_least=True,
    ),
    Target("PEFT's DoRA step at least 1.15 × ours", (TWO,), 1.15, partial(peft_over_ours, PEFT[1:], 0), at_least=True),
    Target(
        "PEFT's DoRA step at least 1.5 × ours", (THREE, SWIN), 1.5, partial(peft_over_ours, PEFT[1:], 0), at_least=True
    ),
    Target(
        "PEFT's DoRA step at least 2 × ours at R = 64",
        (THREE,),
        2.0,
        partial(peft_over_ours, PEFT[1:], 64),
        at_least=True,
    ),
    Target("unmerged evaluation at most 1.02 × base", (TWO, THREE, SWIN), 1.02, evaluation_over_base),
    Target("peak memory at most 1 × full", (TWO, THREE, SWIN), 1.0, memory_over_full),
)


def outcomes(networks: list[Network]) -> list[Outcome]:
    """Every target on every network it is about."""
    return [judge(target, network) for target in TARGETS for network in networks if network.family in target.families]
