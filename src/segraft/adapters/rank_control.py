"""Controlling the rank of gated adapters while they train: what happens after each optimiser step, and in the loss.

    control = RankControlled(net, steps=1000)
    loss = loss + control.penalty()      # where a control has a term of its own
    loss.backward(); optimiser.step()
    control.step(rate)                   # the learning rate of that step

The gates in `control.gates` of proximal control are moved by it alone: give the optimiser a rate of 0 for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from segraft.adapters.controls import Budget, Fixed, Proximal, RankControl
from segraft.adapters.edits import LowRank
from segraft.adapters.graft import grafted_layers, has_adapters, record_of
from segraft.adapters.grafted import grafts_of
from segraft.errors import SegraftError


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """sign(x)·max(|x| − τ, 0): the proximal operator of τ‖·‖₁ (equation 6 of ARENA). Zeros are exact."""
    return nn.functional.softshrink(x, threshold)


def gated_edits(net: nn.Module, name: str) -> dict[str, LowRank]:
    """The gated updates of an adapter, by the key of its file."""
    return {
        f"{layer_name}.{key}" if layer_name else key: edit
        for layer_name, layer in grafted_layers(net)
        for key, edit in grafts_of(layer).edits(name).items()
        if isinstance(edit, LowRank) and edit.v is not None
    }


@dataclass(frozen=True)
class RanksInUse:
    """Of the gated weights of a network's active adapters.

    Attributes:
        used: directions in use, over all weights.
        start: directions at the start.
        weights: how many are gated.
    """

    used: int
    start: int
    weights: int

    @property
    def mean(self) -> float:
        """Directions in use per weight."""
        return self.used / self.weights


def ranks_in_use(net: nn.Module) -> RanksInUse | None:
    """How much of the rank is in use; None where nothing is gated."""
    active = record_of(net).active if has_adapters(net) else ()
    edits = [edit for name in active for edit in gated_edits(net, name).values()]
    if not edits:
        return None
    used, start = sum(len(edit.in_use()) for edit in edits), sum(edit.initial_rank for edit in edits)
    return RanksInUse(used, start, len(edits))


def prune(net: nn.Module) -> None:
    """Drop the directions of the active adapters that are not in use, for good; the network's outputs stay.

    An optimiser that holds the factors has to be made anew.
    """
    for name in record_of(net).active:
        for edit in gated_edits(net, name).values():
            edit.keep(edit.in_use())


class Runner(Protocol):
    """What one control does to the gated updates of one adapter."""

    def penalty(self) -> Tensor | None:
        """A term of the loss."""
        ...

    def step(self, rate: float) -> None:
        """After the optimiser's step with this learning rate, while the gradients are still there."""
        ...

    def passed(self) -> None:
        """A step of the training in which the optimiser did nothing."""
        ...

    @property
    def may_stop(self) -> bool:
        """Whether the training may end early as far as this control goes."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What it remembers."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave."""
        ...


class Shrinking:
    """Proximal steps on every gate (ARENA)."""

    def __init__(self, edits: Mapping[str, LowRank], control: Proximal, steps: int) -> None:  # noqa: ARG002
        self.gates, self.control = _gates(edits.values()), control

    def penalty(self) -> Tensor | None:
        """None: the L1 norm acts through the proximal step."""
        return None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """The update v ← soft(v − ρ·∇L, η·λ)."""
        for gate in self.gates:
            moved = gate - self.control.step * _gradient(gate) if self.control.step else gate
            gate.copy_(soft_threshold(moved, rate * self.control.penalty))

    def passed(self) -> None:
        """Nothing: only steps shrink."""

    @property
    def may_stop(self) -> bool:
        """Always."""
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""


class Budgeting:
    """A budget of directions over all weights, for the most important ones (AdaLoRA, its algorithm 1).

    As in its authors' code, sensitivities |w·∇L| are of the weights after the optimiser's step.
    """

    def __init__(self, edits: Mapping[str, LowRank], control: Budget, steps: int) -> None:
        self.edits, self.control, self.total = dict(edits), control, steps
        self.start = sum(edit.rank for edit in edits.values())
        per_weight = control.target if control.target is not None else None
        wanted = self.start * 2 / 3 if per_weight is None else per_weight * len(edits)
        if wanted > self.start:
            raise SegraftError(
                f"a budget of {per_weight:g} directions per weight at the end is more than the "
                f"{self.start / len(edits):g} at the start: choose a higher rank, or a lower target."
            )
        self.target, self.steps_done = round(wanted), 0
        self.sensitivity: dict[str, Tensor] = {}
        self.variation: dict[str, Tensor] = {}
        self.settled: dict[str, Tensor] = {}

    def penalty(self) -> Tensor | None:
        """γ·Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖² over all weights."""
        if not self.control.orthogonality:
            return None
        terms = []
        for edit in self.edits.values():
            for side in edit.sides():
                gram = side @ side.t()
                terms.append((gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).square().sum())
        return self.control.orthogonality * torch.stack(terms).sum()

    @torch.no_grad()
    def step(self, rate: float) -> None:  # noqa: ARG002
        """Remember how sensitive the loss is to each direction, and zero the gates of those beyond the budget."""
        self.steps_done += 1
        first, last = self.control.steps(self.total)
        if self.settled:
            for key, mask in self.settled.items():
                gate = _gate(self.edits[key])
                gate.mul_(mask.to(gate))
            return
        importance = {key: self._importance(key, edit) for key, edit in self.edits.items()}
        settling = self.steps_done >= last
        if not settling and (self.steps_done <= first or self.steps_done % self.control.every):
            return
        budget = self.control.directions(self.steps_done, self.total, self.start, self.target)
        masks = _largest(importance, budget)
        for key, mask in masks.items():
            _gate(self.edits[key]).mul_(mask)
        if settling:
            self.settled = masks

    def passed(self) -> None:
        """The budget goes by the steps of the training."""
        self.steps_done += 1

    @property
    def may_stop(self) -> bool:
        """Once the budget has come to its end."""
        return bool(self.settled)

    def _importance(self, key: str, edit: LowRank) -> Tensor:
        """S [R] of equation 10: of the gate, plus the mean over each factor's entries."""
        letters = dict(zip(edit.contraction.names, edit.contraction.factors, strict=True))
        total = self._smoothed(f"{key}.v", _gate(edit))
        for name, held in letters.items():
            if edit.contraction.bottleneck in held:
                each = self._smoothed(f"{key}.{name}", getattr(edit, name))
                total = total + each.movedim(held.index(edit.contraction.bottleneck), 0).flatten(1).mean(1)
        return total

    def _smoothed(self, key: str, value: Tensor) -> Tensor:
        """Smoothed sensitivity times its uncertainty (equations 8 and 9), of every entry."""
        now = (value * _gradient(value)).abs()
        before = self.sensitivity.get(key, torch.zeros_like(now)).to(now)
        mean = self.control.smoothing * before + (1 - self.control.smoothing) * now
        spread = self.variation.get(key, torch.zeros_like(now)).to(now)
        spread = self.control.uncertainty * spread + (1 - self.control.uncertainty) * (now - mean).abs()
        self.sensitivity[key], self.variation[key] = mean, spread
        return mean * spread

    def state_dict(self) -> dict[str, Tensor]:
        """Sensitivities, their variation, the directions that stay."""
        kept = {"sensitivity": self.sensitivity, "variation": self.variation, "settled": self.settled}
        flat = {f"{kind}:{key}": value for kind, values in kept.items() for key, value in values.items()}
        return {"steps": torch.tensor(self.steps_done), **flat}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave."""
        self.steps_done = int(state["steps"])
        held = {"sensitivity": self.sensitivity, "variation": self.variation, "settled": self.settled}
        for key, value in state.items():
            kind, colon, name = key.partition(":")
            if colon:
                held[kind][name] = value


RUNNERS: dict[type, Any] = {Proximal: Shrinking, Budget: Budgeting}
"""Settings of a control -> what runs it."""


class RankControlled:
    """The rank controls of all adapters of a network that train.

    Args:
        net: a grafted network, or one without adapters, where there is nothing to control.
        steps: optimiser steps of the whole training, for schedules.

    Attributes:
        gates: that a control moves by itself; the optimiser must leave them alone.
        runners: adapter -> what controls it.

    Raises:
        SegraftError: a budget above the rank.
    """

    def __init__(self, net: nn.Module, steps: int) -> None:
        self.runners: dict[str, Runner] = {}
        self.gates: list[nn.Parameter] = []
        self._watched: list[nn.Parameter] = []
        for name, spec in record_of(net).specs.items() if has_adapters(net) else ():
            control: RankControl = spec.rank_control
            edits = {key: edit for key, edit in gated_edits(net, name).items() if _gate(edit).requires_grad}
            if isinstance(control, Fixed) or not edits:
                continue
            self.runners[name] = RUNNERS[type(control)](edits, control, steps)
            self._watched += [value for edit in edits.values() for value in edit.parameters()]
            if isinstance(control, Proximal):
                self.gates += _gates(edits.values())

    def penalty(self) -> Tensor | None:
        """What the controls add to the loss; None where that is nothing."""
        terms = [term for runner in self.runners.values() if (term := runner.penalty()) is not None]
        return torch.stack(terms).sum() if terms else None

    def step(self, rate: float) -> None:
        """To be called after each optimiser step, with the learning rate of that step, before gradients are cleared.

        With gradients that are not finite the optimiser has done nothing (in mixed precision), and neither do gates.
        """
        if not self.runners:
            return
        gradients = [value.grad for value in self._watched if value.grad is not None]
        finite = bool(torch.isfinite(nn.utils.get_total_norm(gradients)))
        for runner in self.runners.values():
            if finite:
                runner.step(rate)
            else:
                runner.passed()

    @property
    def may_stop(self) -> bool:
        """Whether the training may end early: not before a budget has come to its end."""
        return all(runner.may_stop for runner in self.runners.values())

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint."""
        return {name: runner.state_dict() for name, runner in self.runners.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """From a checkpoint."""
        for name, runner in self.runners.items():
            if name in state:
                runner.load_state_dict(state[name])


def _gate(edit: LowRank) -> nn.Parameter:
    assert edit.v is not None  # noqa: S101  only gated updates are here
    return edit.v


def _gates(edits: Any) -> list[nn.Parameter]:
    return [_gate(edit) for edit in edits]


def _gradient(value: Tensor) -> Tensor:
    if value.grad is None:
        raise SegraftError("rank control needs the gradients of the step: call it before they are cleared.")
    return value.grad


def _largest(importance: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """1 for the `budget` most important of all directions, 0 for the others; of equals the first are taken."""
    every = list(importance.values())
    order = torch.cat(every).argsort(descending=True, stable=True)
    mask = torch.zeros(len(order), dtype=every[0].dtype, device=every[0].device)
    mask[order[:budget]] = 1
    return dict(zip(importance, torch.split(mask, [len(each) for each in every]), strict=True))
