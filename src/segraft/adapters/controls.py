"""How the rank of gated factors ΔW = B·diag(v)·A is controlled while they train: settings, as part of a spec."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from segraft.errors import SegraftError


@dataclass(frozen=True)
class Fixed:
    """The rank stays; a gate, if there is one, is trained as any other factor."""

    kind: str = "fixed"


@dataclass(frozen=True)
class Proximal:
    """ARENA (Baklouti et al. 2025, equation 5): after each step v ← soft(v − ρ·∇L, η·λ), η the scheduled learning rate.

    Attributes:
        penalty: λ, of the L1 norm of v.
        step: ρ. The paper has 0: v then only shrinks, whatever the loss says.
        kind: of the control.
    """

    penalty: float = 0.5
    step: float = 0.0
    kind: str = "proximal"

    def __post_init__(self) -> None:
        _check(self, not_below={"penalty": 0.0, "step": 0.0})


@dataclass(frozen=True)
class Budget:
    """AdaLoRA (Zhang et al. 2023): a budget of directions over all weights, which go to the most important ones.

    Attributes:
        target: directions per weight at the end, on average over the weights; None: two thirds of those at the start.
        warm_up: share of the steps before the budget begins to fall (their t_i / T).
        settled: share of the steps at the end in which the chosen directions stay (t_f / T).
        every: steps between two choices (Δ_T).
        smoothing: β1, of the sensitivities.
        uncertainty: β2, of how much they vary.
        orthogonality: γ, of Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖² in the loss.
        kind: of the control.
    """

    target: float | None = None
    warm_up: float = 0.1
    settled: float = 0.5
    every: int = 1
    smoothing: float = 0.85
    uncertainty: float = 0.85
    orthogonality: float = 0.1
    kind: str = "budget"

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("warm_up", "settled", "smoothing", "uncertainty"), 0.0)
        _check(self, not_below={**shares, "every": 1, "orthogonality": 0.0}, below=dict.fromkeys(shares, 1.0))
        if self.target is not None:
            _check(self, not_below={"target": 0.0})
        if self.warm_up + self.settled > 1:
            raise SegraftError(
                f"rank control: warm_up ({self.warm_up:g}) and settled ({self.settled:g}) are shares of one training: "
                "together they must not exceed 1."
            )
        if not isinstance(self.every, int):
            raise SegraftError(f"rank control: every is {self.every!r}: it must be a whole number of steps.")

    def steps(self, total: int) -> tuple[int, int]:
        """The last step of the warm-up, and the one from which the directions stay, of `total` steps."""
        return int(self.warm_up * total), total - int(self.settled * total)

    def directions(self, step: int, total: int, start: int, target: int) -> int:
        """The budget b(t) of equation 13: from `start` directions to `target`, falling with the third power.

        Args:
            step: t, from 1.
            total: steps of the training.
            start: directions at the start, over all weights.
            target: at the end.
        """
        first, last = self.steps(total)
        if step >= last:
            return target
        if step <= first:
            return start
        left = 1 - (step - first) / max(1, last - first)
        return int(target + (start - target) * left**3)


RankControl = Fixed | Proximal | Budget

CONTROLS: dict[str, type[Fixed] | type[Proximal] | type[Budget]] = {
    "fixed": Fixed,
    "proximal": Proximal,
    "budget": Budget,
}
"""To add one: its settings here, what it does in `rank_control.RUNNERS`."""


def as_control(value: object, default: RankControl) -> RankControl:
    """What a spec or a command line says of it: a control, its kind, or its settings as a mapping.

    Args:
        value: None means `default`. Settings without a `kind` change those of `default`.
        default: of the method.

    Raises:
        SegraftError: an unknown kind or setting, or a value that does not fit.
    """
    if value is None or isinstance(value, Fixed | Proximal | Budget):
        return default if value is None else value
    settings: dict[str, Any] = {"kind": value} if isinstance(value, str) else {}
    if isinstance(value, Mapping):
        settings = dict(value)
        if settings.get("kind", default.kind) == default.kind:
            settings = {field.name: getattr(default, field.name) for field in fields(default)} | settings
    kind = settings.get("kind")
    if not isinstance(kind, str) or kind not in CONTROLS:
        raise SegraftError(f"unknown rank control {value!r}: choose one of {', '.join(CONTROLS)}.")
    control = CONTROLS[kind]
    known = [field.name for field in fields(control) if field.name != "kind"]
    unknown = sorted(set(settings) - {*known, "kind"})
    if unknown:
        raise SegraftError(f"rank control {kind!r} has no setting {unknown[0]!r}: it has {', '.join(known) or 'none'}.")
    return control(**settings)


def _check(control: object, *, not_below: Mapping[str, float], below: Mapping[str, float] | None = None) -> None:
    for name, least in not_below.items():
        value, most = getattr(control, name), (below or {}).get(name, math.inf)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and least <= value < most):
            bounds = f"at least {least:g}" + ("" if most == math.inf else f" and below {most:g}")
            raise SegraftError(f"rank control: {name} is {value!r}: it must be a number, {bounds}.")
