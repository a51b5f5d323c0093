"""What a folder of Hugging Face PEFT holds, and what PEFT does with it: file names, keys, which modules it finds.

Of PEFT 0.21, as it behaves; the package itself is not needed.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from segraft.errors import SegraftError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
RECORD = "segraft.json"
"""Beside them, what PEFT has no place for: labels, preparation, which base."""

PREFIX = "base_model.model."
FACTOR_A, FACTOR_B, FACTOR_B_BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
MAGNITUDE = ".lora_magnitude_vector"
BASE_LAYER = ".base_layer"

OWN_MODULES = ("lora_dropout", "lora_A", "lora_B", "lora_magnitude_vector", "base_layer", "default")
"""What PEFT calls its modules, in the place of a layer with factors."""

NO_TARGETS = "dummy-target-modules"
"""What PEFT takes for `target_modules` where no layer has factors."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

UNSAVED = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
"""What cannot be one of `modules_to_save`."""

CONFIG_VALUES: Mapping[str, Any] = {
    "alpha_pattern": {},
    "base_model_name_or_path": None,
    "bias": "none",
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "revision": None,
    "task_type": None,
    "use_dora": False,
    "use_rslora": False,
}
"""Of an adapter that is plain LoRA; with fields that PEFT has had for long, so that older versions read it too."""


def why_no_factors(layer: nn.Module, parent: nn.Module) -> str | None:
    """Why PEFT cannot give a plain layer factors that compute what they should; None where it can."""
    if isinstance(parent, nn.MultiheadAttention):
        return "attention reads the weight of this layer past PEFT's factors"
    if type(layer) not in LAYERS:
        return f"PEFT has no factors for {type(layer).__name__}"
    if isinstance(layer, nn.Linear):
        return None
    assert isinstance(layer, nn.modules.conv._ConvNd)  # noqa: S101, SLF001
    if layer.groups > 1:
        return "PEFT's factors mix the groups of a convolution"
    if any(size != 1 for size in layer.dilation):
        return "PEFT's factors have no dilation"
    if layer.padding_mode != "zeros":
        return f"PEFT's factors pad with zeros, and this layer by {layer.padding_mode}"
    return None


def places(net: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module but the network itself, with one name for each place where a parent holds it.

    PEFT puts its own module at a place. What is held at several is replaced at the first alone.
    """
    found: dict[nn.Module, list[str]] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for attribute, child in module._modules.items():  # noqa: SLF001
            if child is None:
                continue
            name = f"{prefix}{attribute}"
            known = child in found
            found.setdefault(child, []).append(name)
            if not known:
                walk(child, f"{name}.")

    walk(net, "")
    return found


def parent_of(net: nn.Module, name: str) -> nn.Module:
    """The module that holds the one of this name."""
    return net.get_submodule(name.rpartition(".")[0])


def found_by_ends(name: str, wanted: Iterable[str]) -> bool:
    """Whether PEFT takes a module for one of `modules_to_save`: it compares the ends of their names."""
    return any(name.endswith(each) for each in wanted)


def kept_from_factors(name: str, saved: Iterable[str]) -> bool:
    """Whether PEFT gives a layer no factors, as it lies in one of `modules_to_save`, which it takes for expressions."""
    return any(re.match(rf"(^|.*\.){each}($|\..*)", name) for each in saved)


def targeting(targets: Collection[str], names: Iterable[str]) -> list[str] | str:
    """`target_modules` that means these layers and no others: their names, or where those are ends too, an expression.

    Args:
        targets: names of the layers.
        names: of all modules.
    """
    others = (name for name in names if name not in targets)
    if any(name.endswith(f".{target}") for name in others for target in targets):
        return "|".join(re.escape(name) for name in targets)
    return list(targets)


def pattern(name: str) -> str:
    """The key of `rank_pattern` or `alpha_pattern` for one layer."""
    return f"^{re.escape(name)}"


def by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """What PEFT takes for a layer: the value of the first expression that matches the end of its name."""
    for key, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({key})$", name)
        except re.error as error:
            raise SegraftError(f"PEFT's pattern {key!r} is not a valid regular expression ({error}).") from error
        if found:
            return value
    return patterns.get(name, default)
