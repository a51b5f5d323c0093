"""An adapter as Hugging Face PEFT loads it: `PeftModel.from_pretrained(base, folder)`.

Every factorisation is a product of two matrices, PEFT's A and B, so each is written as LoRA, of a rank that may be
higher. What PEFT has no factors for, and what was trained whole, goes with the adapter as `modules_to_save`.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segraft.adapters import prune
from segraft.adapters.composing import channel_norm
from segraft.adapters.edits import BiasFactor, Edit, LowRank
from segraft.adapters.graft import grafted_layers
from segraft.adapters.grafted import base_tensor, grafts_of
from segraft.errors import SegraftError
from segraft.exchange.formats import Finished
from segraft.exchange.peft_format import (
    BASE_LAYER,
    CONFIG,
    CONFIG_VALUES,
    FACTOR_A,
    FACTOR_B,
    MAGNITUDE,
    NO_TARGETS,
    OWN_MODULES,
    PREFIX,
    WEIGHTS,
    found_by_ends,
    kept_from_factors,
    parent_of,
    pattern,
    places,
    targeting,
    why_no_factors,
)
from segraft.exchange.peft_readme import write_base, write_readme, write_record

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


@torch.no_grad()
def export_peft(finished: Finished, folder: Path) -> tuple[str, ...]:
    """Write `adapter_config.json`, `adapter_model.safetensors` and how to use them.

    Raises:
        SegraftError: nothing of the adapter is of low rank in PEFT, or PEFT would mistake its modules.
    """
    from safetensors.torch import save_file

    plain, grafted = finished.merged(), finished.grafted()
    prune(grafted)
    plan = _planned(plain, grafted)
    _settle(plain, plan)
    if not plan.factors and finished.header.spec.factorisation is not None:
        why = next(filter(None, plan.whole.values()), "it was trained whole")
        raise SegraftError(
            f"{finished.source} has no layer that is of low rank in PEFT ({why}): export it as onnx, or use it in "
            "Segraft."
        )
    config, tensors = _config(plain, plan, finished), _tensors(plain, plan)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    beside = write_base(finished, folder)
    write_record(finished, folder)
    write_readme(finished, folder, beside=beside)
    base = f"{beside} is the base of it" if beside else f"its base is {finished.base}"
    return (*_notes(finished, grafted, plan, tensors), f"{base}; README.md has the code that loads both.")


def _planned(plain: nn.Module, grafted: nn.Module) -> Plan:
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
        return f"{' and '.join(names)} are one layer, of which PEFT would replace the first alone"
    why = why_no_factors(plain.get_submodule(names[0]), parent_of(plain, names[0]))
    if why:
        return why
    if any(edit.tensor == weights[0].tensor and not isinstance(edit, LowRank) for edit in edits):
        return "its weight was trained whole, too"
    if weights[0].m is not None and sum(edit.rank for edit in weights) == 0:
        return "it has no directions left but the magnitudes"
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
    b = torch.cat(lefts, dim=1)
    if magnitude is not None and kernel:
        magnitude = magnitude.view(1, -1, *kernel)
    return Factors(torch.cat(parts), b.view(*b.shape, *kernel), magnitude, scaling)


def _two_matrices(edit: LowRank, weight: Tensor) -> tuple[Tensor, Tensor]:
    """scaling·ΔW = left [o, ρ] times right [ρ, i, *kernel].

    Where the output factor holds kernel positions (LoRA-C), ρ counts them too.
    """
    update = edit.matrices()
    if not update.held:
        return update.left, update.right.expand(-1, *weight.shape[1:])
    sizes = [weight.shape[dim] for dim in update.held]
    rank, positions = update.left.shape[1], math.prod(sizes)
    right = update.right.new_zeros(positions, rank, *weight.shape[1:])
    for place, position in enumerate(itertools.product(*map(range, sizes))):
        at: list[slice | int] = [slice(None)] * weight.ndim
        for dim, index in zip(update.held, position, strict=True):
            at[dim] = slice(index, index + 1)
        right[place][tuple(at)] = update.right
    return update.left.reshape(-1, positions * rank), right.flatten(0, 1)


def _settle(plain: nn.Module, plan: Plan) -> None:
    """Add to what is saved whole all that PEFT takes for it, by its name, and take that out of the rest.

    Raises:
        SegraftError: one such module lies within another.
    """
    first = {module: names[0] for module, names in places(plain).items()}
    held = {name for names in places(plain).values() for name in names}
    every = [name for name, _ in plain.named_modules(remove_duplicate=False) if name]
    for module, name in first.items():
        if len(list(module.children())) and name in plan.whole:
            inside = [other for other in plan.whole if other.startswith(f"{name}.")]
            for other in inside:
                del plan.whole[other]
    before = -1
    while len(plan.whole) != before:
        before = len(plan.whole)
        for name in every:
            if name in held and name not in plan.whole and found_by_ends(name, plan.whole):
                plan.whole[name] = "PEFT takes it for another by the end of its name"
        for name in plan.factors:
            inside_one = any(name.startswith(f"{each}.") for each in plan.whole)
            if name not in plan.whole and not inside_one and kept_from_factors(name, plan.whole):
                plan.whole[name] = "PEFT takes it for another by its name"
    for name in plan.whole:
        for other in plan.whole:
            if name.startswith(f"{other}."):
                raise SegraftError(
                    f"PEFT finds the modules that it saves whole by the ends of their names, and so takes {name}, which "
                    f"lies in {other}, for another: export another format."
                )
        own = next((each for each in OWN_MODULES if each.endswith(name)), None) if plan.factors else None
        if own is not None:
            raise SegraftError(
                f"PEFT finds the modules that it saves whole by the ends of their names, and so would take {own}, a "
                f"module of its own, for {name}: export another format."
            )
    for name in [name for name in plan.factors if name in plan.whole or _within(name, plan.whole)]:
        del plan.factors[name]
    for name in list(plan.biases):
        layer = name.rpartition(".")[0]
        if layer in plan.whole or _within(layer, plan.whole):
            del plan.biases[name]
        else:
            plan.biases[name] = layer in plan.factors


def _within(name: str, modules: Mapping[str, str]) -> bool:
    return any(name.startswith(f"{each}.") for each in modules)


def _config(plain: nn.Module, plan: Plan, finished: Finished) -> dict[str, Any]:
    """`adapter_config.json`."""
    rooted = finished.header.spec.scale == "alpha/sqrt(r)"
    ranks = {name: factors.rank for name, factors in plan.factors.items()}
    alphas = {
        name: factors.scaling * (math.sqrt(factors.rank) if rooted else factors.rank)
        for name, factors in plan.factors.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] if values else 8 for values in (ranks, alphas))
    module = type(plain).__module__
    return {
        **CONFIG_VALUES,
        "auto_mapping": {"base_model_class": type(plain).__name__, "parent_library": module},
        "r": rank,
        "lora_alpha": _short(alpha),
        "rank_pattern": {pattern(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {pattern(name): _short(value) for name, value in alphas.items() if value != alpha},
        "use_rslora": rooted,
        "use_dora": bool(finished.header.spec.magnitude),
        "bias": "all" if plan.biases else "none",
        "target_modules": targeting(plan.factors.keys(), [name for name, _ in plain.named_modules() if name])
        if plan.factors
        else NO_TARGETS,
        "modules_to_save": list(plan.whole) or None,
    }


def _short(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _tensors(plain: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """`adapter_model.safetensors`."""
    made: dict[str, Tensor] = {}
    for name, factors in plan.factors.items():
        made[name + FACTOR_A], made[name + FACTOR_B] = factors.a, factors.b
        if factors.magnitude is not None:
            made[name + MAGNITUDE] = factors.magnitude
    for name in plan.whole:
        for key, value in plain.get_submodule(name).state_dict().items():
            made[f"{name}.{key}"] = value
    for name, beside_factors in plan.biases.items():
        layer = name.rpartition(".")[0]
        made[f"{layer}{BASE_LAYER}.bias" if beside_factors else name] = plain.get_parameter(name)
    return {PREFIX + key: value.detach().cpu().contiguous().clone() for key, value in made.items()}


def _notes(finished: Finished, grafted: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> list[str]:
    """What of it is other than it was in Segraft."""
    notes, spec = [], finished.header.spec
    edits = [edit for _, layer in grafted_layers(grafted) for edit in grafts_of(layer).edits(NAME).values()]
    low_rank = [edit for edit in edits if isinstance(edit, LowRank)]
    if any(edit.v is not None for edit in low_rank):
        notes.append("the gates are multiplied into PEFT's B, without the directions that are not in use.")
    higher = [name for name, factors in plan.factors.items() if factors.rank > _rank_of(grafted, name)]
    if spec.factorisation != "lora" or higher:
        bytes_now = sum(value.numel() * value.element_size() for value in tensors.values())
        text = f"the factors ({spec.factorisation}) are multiplied out to LoRA's two, {bytes_now / 1e6:.2f} MB"
        notes.append(text + (f"; the rank of {_told(higher)} is higher for it." if higher else "."))
    if any(isinstance(edit, BiasFactor) for edit in edits):
        notes.append("biases with factors are written as the biases that come of them.")
    for reason in dict.fromkeys(filter(None, plan.whole.values())):
        notes.append(f"saved whole, as {reason}: {_told([name for name, why in plan.whole.items() if why == reason])}.")
    return notes


def _rank_of(grafted: nn.Module, name: str) -> int:
    edits = grafts_of(grafted.get_submodule(name)).edits(NAME).values()
    return max(edit.rank for edit in edits if isinstance(edit, LowRank))


def _told(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
