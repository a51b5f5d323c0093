"""What becomes of each layer of an adapter in PEFT: LoRA of some rank, or the whole module beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from segraft.adapters.edits import Edit, LowRank
from segraft.adapters.graft import grafted_layers
from segraft.adapters.grafted import base_tensor, grafts_of
from segraft.adapters.layers import channel_norm
from segraft.errors import SegraftError
from segraft.exchange.peft_format import (
    OWN_MODULES,
    UNSAVED,
    found_by_ends,
    kept_from_factors,
    parent_of,
    places,
    why_no_factors,
)

NAME = "default"


@dataclass(frozen=True)
class Factors:
    """ΔW of one layer as PEFT writes it: scaling · B·A, and with a magnitude the norm of each output channel."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    scaling: float

    @property
    def rank(self) -> int:
        """Of PEFT's LoRA."""
        return len(self.a)


@dataclass
class Plan:
    """What becomes of each layer.

    Attributes:
        factors: layer -> its LoRA.
        whole: module that is saved whole -> why; an empty reason where it was trained whole.
        biases: name of a bias that was trained -> the layer has factors.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    biases: dict[str, bool] = field(default_factory=dict)


def planned(plain: nn.Module, grafted: nn.Module) -> Plan:
    """The plan for an adapter.

    Args:
        plain: the network with the adapter merged.
        grafted: the same with the adapter on it, as `NAME`, pruned.

    Raises:
        SegraftError: PEFT has no place for some tensor of it, or would mistake its modules.
    """
    plan = _by_layer(plain, grafted)
    _settle(plain, plan)
    return plan


def _by_layer(plain: nn.Module, grafted: nn.Module) -> Plan:
    """Each edited layer on its own."""
    plan, where = Plan(), places(plain)
    for name, layer in grafted_layers(grafted):
        edits = list(grafts_of(layer).edits(NAME).values())
        if not edits:
            continue
        if not name:
            raise SegraftError(
                f"PEFT adapts modules, and {edits[0].tensor} is a tensor of the network itself: train again without it "
                f"(exclude {edits[0].tensor!r}), or export another format."
            )
        names = where[plain.get_submodule(name)]
        weights = [edit for edit in edits if isinstance(edit, LowRank)]
        if not weights:
            _plan_whole(plan, names, edits, reason="")
            continue
        reason = _why_whole(plain, names, edits)
        if reason is None:
            factors = _factors(layer, weights)
            if factors.rank:
                plan.factors[names[0]] = factors
            if any(edit.tensor == "bias" for edit in edits):
                plan.biases[f"{names[0]}.bias"] = bool(factors.rank)
            continue
        of_attention = isinstance(parent_of(plain, names[0]), nn.MultiheadAttention)
        _plan_whole(plan, [each.rpartition(".")[0] for each in names] if of_attention else names, edits, reason=reason)
    return plan


def _plan_whole(plan: Plan, names: list[str], edits: list[Edit], *, reason: str) -> None:
    if not reason and all(edit.tensor == "bias" for edit in edits):
        plan.biases[f"{names[0]}.bias"] = False
        return
    plan.whole.update(dict.fromkeys(names, reason))


def _why_whole(plain: nn.Module, names: list[str], edits: list[Edit]) -> str | None:
    """Why a layer with factors has to be saved whole; None where PEFT's factors do."""
    weights = [edit for edit in edits if isinstance(edit, LowRank)]
    if len(names) > 1:
        return "the network holds it under several names, of which PEFT would replace one"
    why = why_no_factors(plain.get_submodule(names[0]), parent_of(plain, names[0]))
    if why:
        return why
    if any(edit.tensor == weights[0].tensor and not isinstance(edit, LowRank) for edit in edits):
        return "its weight was trained whole, too"
    if weights[0].m is not None and sum(edit.rank for edit in weights) == 0:
        return "it has no directions left but the magnitudes"
    weight: Tensor = plain.get_submodule(names[0]).weight  # type: ignore[assignment]
    if weights[0].m is not None and not bool(weight.flatten(1).any(1).all()):
        return "a channel of it is zero throughout, which PEFT's DoRA divides by"
    return None


def _factors(layer: nn.Module, edits: list[LowRank]) -> Factors:
    """The edits of one weight, one for each of its row blocks, as one product."""
    weight = base_tensor(layer, edits[0].tensor)
    scaling = edits[0].scaling
    parts, lefts = [], []
    magnitude = None if edits[0].m is None else channel_norm(weight, edits[0].slot, None)
    for edit in edits:
        left, right = _two_matrices(edit, weight)
        start, stop = edit.rows or (0, weight.shape[0])
        placed = left.new_zeros(weight.shape[0], left.shape[1])
        placed[start:stop] = left / scaling
        lefts.append(placed)
        parts.append(right)
        if magnitude is not None and edit.m is not None:
            magnitude[start:stop] = edit.m
    kernel = (1,) * (weight.ndim - 2)
    a, b = torch.cat(parts), torch.cat(lefts, dim=1)
    if len(a) > max(len(b), *(edit.rank for edit in edits)):  # more than ΔW's own rank can be
        a, b = (b @ a.flatten(1)).view(len(b), *a.shape[1:]), torch.eye(len(b), dtype=b.dtype)
    if magnitude is not None and kernel:
        magnitude = magnitude.view(1, -1, *kernel)
    return Factors(a, b.view(*b.shape, *kernel), magnitude, scaling)


def _two_matrices(edit: LowRank, weight: Tensor) -> tuple[Tensor, Tensor]:
    """scaling·ΔW = left [o, ρ] times right [ρ, i, *kernel].

    Where the output factor holds kernel positions (LoRA-C), ρ counts them too.
    """
    update = edit.matrices().spread(weight.shape)
    return update.left, update.right.expand(-1, *weight.shape[1:])


def _settle(plain: nn.Module, plan: Plan) -> None:
    """Add to what is saved whole all that PEFT takes for it, by its name, and take that out of the rest.

    Raises:
        SegraftError: PEFT cannot save that.
    """
    for name in [name for name in plan.whole if _within(name, plan.whole)]:
        del plan.whole[name]
    before = -1
    while len(plan.whole) != before:
        before = len(plan.whole)
        _add_mistaken(plain, plan)
    for name in plan.whole:
        _refuse_unsaved(plain, plan, name)
    for name in [name for name in plan.factors if name in plan.whole or _within(name, plan.whole)]:
        del plan.factors[name]
    own = [(each, name) for name in plan.whole for each in OWN_MODULES if plan.factors and each.endswith(name)]
    if own:
        raise SegraftError(
            "PEFT finds the modules that it saves whole by the ends of their names, and so would take "
            f"{own[0][0]}, a module of its own, for {own[0][1]}: export another format."
        )
    layers = {name: name.rpartition(".")[0] for name in plan.biases}
    plan.biases = {
        name: layer in plan.factors
        for name, layer in layers.items()
        if layer not in plan.whole and not _within(layer, plan.whole)
    }


def _add_mistaken(plain: nn.Module, plan: Plan) -> None:
    """Once; what is added may have others mistaken for it in turn."""
    for name in (name for names in places(plain).values() for name in names):
        if name not in plan.whole and found_by_ends(name, plan.whole):
            plan.whole[name] = "PEFT takes it for another by the end of its name"
    for name in plan.factors:
        if name not in plan.whole and not _within(name, plan.whole) and kept_from_factors(name, plan.whole):
            plan.whole[name] = "PEFT takes it for another by its name"


def _refuse_unsaved(plain: nn.Module, plan: Plan, name: str) -> None:
    kind = type(plain.get_submodule(name))
    if issubclass(kind, UNSAVED):
        raise SegraftError(
            f"PEFT cannot save {name} whole, as it is a {kind.__name__} ({plan.whole[name] or 'trained whole'}): "
            "export another format."
        )
    if _within(name, plan.whole):
        raise SegraftError(
            "PEFT finds the modules that it saves whole by the ends of their names, and so takes "
            f"{name}, which lies in another of them, for one: export another format."
        )


def _within(name: str, modules: Mapping[str, str]) -> bool:
    return any(name.startswith(f"{each}.") for each in modules)
