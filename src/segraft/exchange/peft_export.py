"""An adapter as Hugging Face PEFT loads it: `PeftModel.from_pretrained(base, folder)`.

Every factorisation is a product of two matrices, PEFT's A and B, so each is written as LoRA, of a rank that may be
higher. What PEFT has no factors for, and what was trained whole, goes with the adapter as `modules_to_save`.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segraft.adapters import prune, ungraft
from segraft.adapters.edits import BiasFactor, LowRank
from segraft.adapters.graft import grafted_layers
from segraft.adapters.grafted import grafts_of
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
    PREFIX,
    WEIGHTS,
    pattern,
    targeting,
)
from segraft.exchange.peft_plan import NAME, Plan, planned
from segraft.exchange.peft_readme import write_base, write_readme, write_record


@torch.no_grad()
def export_peft(finished: Finished, folder: Path) -> tuple[str, ...]:
    """Write `adapter_config.json`, `adapter_model.safetensors` and how to use them.

    Raises:
        SegraftError: nothing of the adapter is of low rank in PEFT, or PEFT would mistake its modules.
    """
    from safetensors.torch import save_file

    plain, grafted = finished.merged(), finished.grafted()
    prune(grafted)
    plan = planned(plain, grafted)
    if not plan.factors and finished.header.spec.factorisation is not None:
        why = next(filter(None, plan.whole.values()), "it was trained whole")
        raise SegraftError(
            f"{finished.source} has no layer that is of low rank in PEFT ({why}): export it as onnx, or use it in "
            "Segraft."
        )
    config, tensors = _config(plain, plan, finished), _tensors(plain, plan)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    notes = _notes(finished, grafted, plan, tensors)
    base: nn.Module = ungraft(grafted)
    beside = write_base(finished, base, folder)
    write_record(finished, folder)
    write_readme(finished, base, folder, beside=beside)
    where = f"{beside} is the base of it" if beside else f"its base is {finished.base}"
    return (*notes, f"{where}; README.md has the code that loads both.")


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
    if plan.factors and (spec.factorisation != "lora" or higher):
        size = sum(_bytes(value) for key, value in tensors.items() if key.endswith((FACTOR_A, FACTOR_B)))
        text = f"the factors ({spec.factorisation}) are multiplied out to LoRA's two ({size / 1e6:.2f} MB)"
        notes.append(text + (f"; the rank of {_told(higher)} is higher for it." if higher else "."))
    if any(isinstance(edit, BiasFactor) for edit in edits):
        notes.append("biases with factors are written as the biases that come of them.")
    for reason in dict.fromkeys(filter(None, plan.whole.values())):
        names = [name for name, why in plan.whole.items() if why == reason]
        size = sum(
            _bytes(value) for key, value in tensors.items() if key.startswith(tuple(f"{PREFIX}{n}." for n in names))
        )
        notes += [f"saved whole ({size / 1e6:.2f} MB), as {reason}: {_told(names)}."]
    return notes


def _rank_of(grafted: nn.Module, name: str) -> int:
    edits = grafts_of(grafted.get_submodule(name)).edits(NAME).values()
    return max(edit.rank for edit in edits if isinstance(edit, LowRank))


def _told(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
