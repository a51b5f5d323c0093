"""An adapter that Hugging Face PEFT saved (`save_pretrained`), grafted onto its base with the same outputs."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from segraft.adapters import AdapterSpec, graft, parts_of, projections_of
from segraft.adapters.edits import LowRank, Replacement
from segraft.adapters.grafted import base_tensor, grafts_of
from segraft.adapters.spec import Scale
from segraft.errors import SegraftError
from segraft.exchange.peft_folder import PeftFolder
from segraft.exchange.peft_format import (
    BASE_LAYER,
    CONFIG,
    FACTOR_A,
    FACTOR_B,
    FACTOR_B_BIAS,
    LAYERS,
    MAGNITUDE,
    by_pattern,
    found_by_ends,
    parent_of,
    places,
    why_no_factors,
)

NAME = "default"


@dataclass
class Sorted:
    """The tensors of a folder, by what they are for.

    Attributes:
        a, b, magnitude, shift: of layers with factors, by name; `shift` is the bias of PEFT's B.
        whole: tensors that take the place of the base's, by their full names.
    """

    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    magnitude: dict[str, Tensor] = field(default_factory=dict)
    shift: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)


def graft_peft(net: nn.Module, folder: PeftFolder) -> AdapterSpec:
    """Graft the adapter of a folder onto its base, a plain network; its spec.

    Raises:
        SegraftError: it does not fit the network, or adapts a layer in a way that Segraft has no counterpart of; the
            network may have changed then.
    """
    found = _sorted(net, folder)
    for name in found.a:
        _check_layer(net, name, found, folder)
    spec = _spec(net, folder, found)
    graft(net, spec, NAME)
    with torch.no_grad():
        for name in found.a:
            _fill(net.get_submodule(name), name, found, spec, folder)
        for name, value in found.whole.items():
            _replace(net, name, value)
    return spec


def _sorted(net: nn.Module, folder: PeftFolder) -> Sorted:
    found, saved = Sorted(), _saved_modules(net, folder)
    base = net.state_dict()
    kinds = {FACTOR_A: found.a, FACTOR_B: found.b, FACTOR_B_BIAS: found.shift, MAGNITUDE: found.magnitude}
    for key, value in folder.tensors.items():
        plain = key.removesuffix(".weight") if key.endswith(f"{MAGNITUDE}.weight") else key
        kind = next((kind for kind in kinds if plain.endswith(kind)), None)
        if kind is not None:
            kinds[kind][plain.removesuffix(kind)] = value
            continue
        if ".original_module." in key or ".modules_to_save." in key:
            continue  # biases of modules that are saved whole, which PEFT writes twice more
        name = key.replace(f"{BASE_LAYER}.", ".") if key.endswith(f"{BASE_LAYER}.bias") else key
        is_bias = name.rpartition(".")[2] == "bias" and folder.config.get("bias", "none") != "none"
        if name not in base or not (is_bias or any(name.startswith(f"{each}.") for each in saved)):
            raise SegraftError(
                f"{folder.path} holds {key}, which is no part of {type(net).__name__} that its {CONFIG} names: is "
                "--base the network it was trained on?"
            )
        if value.shape != base[name].shape:
            raise SegraftError(
                f"{folder.path} holds {name} of shape {_shown(value)}, and the base has {_shown(base[name])}: is "
                "--base the network it was trained on?"
            )
        found.whole[name] = value
    for name in saved:
        missing = [key for key in base if key.startswith(f"{name}.") and key not in found.whole]
        if missing:
            raise SegraftError(f"{folder.path} lacks {missing[0]}, of a module that {CONFIG} says it holds whole.")
    for name in (*found.b, *found.magnitude, *found.shift):
        if name not in found.a:
            raise SegraftError(f"{folder.path} lacks {name}{FACTOR_A}: is it complete?")
    return found


def _saved_modules(net: nn.Module, folder: PeftFolder) -> tuple[str, ...]:
    """Names of the modules that PEFT saves whole, each by its first name."""
    wanted = folder.config.get("modules_to_save") or ()
    several = {names[0]: names for names in places(net).values()}
    saved = [name for name in several if found_by_ends(name, wanted)]
    for name in saved:
        if len(several[name]) > 1 and net.get_submodule(name).state_dict():
            raise _of_several_names(folder, several[name])
    return tuple(saved)


def _of_several_names(folder: PeftFolder, names: Sequence[str]) -> SegraftError:
    return SegraftError(
        f"{folder.path} adapts {names[0]}, which the network also calls {names[1]}: PEFT adapts it under one of the "
        "names alone and Segraft under both, so the outputs would differ; adapt it in Segraft, or merge it in PEFT."
    )


def _check_layer(net: nn.Module, name: str, found: Sorted, folder: PeftFolder) -> None:
    known = {names[0]: names for names in places(net).values()}
    if name not in known:
        raise SegraftError(
            f"{folder.path} adapts {name}, and {type(net).__name__} has no such layer: is --base the network it was "
            "trained on?"
        )
    layer = net.get_submodule(name)
    if len(known[name]) > 1:
        raise _of_several_names(folder, known[name])
    why = why_no_factors(layer, parent_of(net, name)) if type(layer) in LAYERS else f"it is a {type(layer).__name__}"
    if why is not None:
        raise SegraftError(
            f"{folder.path} adapts {name}, and that has no counterpart in Segraft ({why}): merge the adapter into its "
            "base in PEFT, and import the weights."
        )
    weight = base_tensor(layer, "weight")
    a, b = found.a[name], found.b.get(name)
    rank = by_pattern(folder.config.get("rank_pattern") or {}, name, folder.config["r"])
    kernel = (1,) * (weight.ndim - 2)
    if b is None or a.shape != (rank, *weight.shape[1:]) or b.shape != (weight.shape[0], rank, *kernel):
        shown = "none" if b is None else _shown(b)
        raise SegraftError(
            f"{folder.path} has factors of shape {_shown(a)} and {shown} for {name}, whose weight is {_shown(weight)} "
            f"and whose rank is {rank}: is --base the network it was trained on?"
        )
    if (name in found.magnitude) != bool(folder.config.get("use_dora")):
        raise SegraftError(f"{folder.path}: {CONFIG} and the tensors of {name} do not agree on DoRA: is it complete?")
    if name in found.magnitude and found.magnitude[name].numel() != weight.shape[0]:
        raise SegraftError(f"{folder.path} has another number of magnitudes for {name} than it has channels.")
    if name in found.shift and layer.bias is None:
        raise SegraftError(f"{folder.path} has a bias for {name}, which has none in the base: merge it in PEFT.")


def _spec(net: nn.Module, folder: PeftFolder, found: Sorted) -> AdapterSpec:
    rooted, dora = bool(folder.config.get("use_rslora")), bool(folder.config.get("use_dora"))
    scale: Scale = "alpha/sqrt(r)" if rooted else "alpha/r"
    whole = _train(net, folder, found)
    if not found.a:
        return AdapterSpec("none", train=whole)
    ranks = {name: len(value) for name, value in found.a.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    return AdapterSpec(
        "dora" if dora else "rs_lora" if rooted else "lora",
        rank=rank,
        alpha=float(folder.config["lora_alpha"]),
        scale=scale,
        targets=[_place(net, name) for name in ranks],
        ranks={_place(net, name): value for name, value in ranks.items() if value != rank},
        train=whole,
    )


def _train(net: nn.Module, folder: PeftFolder, found: Sorted) -> list[str]:
    """What is trained whole: modules by one expression each, and biases by their names."""
    saved = _saved_modules(net, folder)
    parameters = dict(net.named_parameters())
    train = [rf"{re.escape(name)}\..*" for name in saved if any(each.startswith(f"{name}.") for each in parameters)]
    alone = [name for name in found.whole if not any(name.startswith(f"{each}.") for each in saved)]
    alone += [f"{name}.bias" for name in found.shift if f"{name}.bias" not in alone]
    return [*train, *(_place(net, name) for name in alone)]


def _place(net: nn.Module, name: str) -> str:
    """An expression that means this name alone, also where a part of the network has it."""
    text = re.escape(name)
    return f"(?:{text})" if text in parts_of(net) or text in projections_of(net) else text


def _fill(layer: nn.Module, name: str, found: Sorted, spec: AdapterSpec, folder: PeftFolder) -> None:
    """Give a grafted layer PEFT's factors; a scaling of its own goes into B."""
    edits = grafts_of(layer).edits(NAME)
    edit = next(each for each in edits.values() if isinstance(each, LowRank))
    alpha = by_pattern(folder.config.get("alpha_pattern") or {}, name, folder.config["lora_alpha"])
    scaling = alpha / (math.sqrt(edit.rank) if folder.config.get("use_rslora") else edit.rank)
    left, right = edit.factors()
    right.copy_(found.a[name])
    left.copy_(found.b[name].reshape(left.shape).to(left) * (scaling / spec.scaling(edit.rank)))
    if edit.m is not None:
        edit.m.copy_(found.magnitude[name].flatten())
    if name in found.shift:
        bias = edits["bias"]
        assert isinstance(bias, Replacement)  # noqa: S101
        trained = found.whole.pop(f"{name}.bias", base_tensor(layer, "bias"))
        bias.value.copy_(trained.to(bias.value) + scaling * found.shift[name].to(bias.value))


def _replace(net: nn.Module, name: str, value: Tensor) -> None:
    """Give a tensor that is trained whole its value.

    Raises:
        SegraftError: a buffer that training does not change has another value than in the base.
    """
    owner, _, tensor = name.rpartition(".")
    layer = net.get_submodule(owner)
    edit = grafts_of(layer).edits(NAME).get(tensor) if "segraft" in layer._modules else None  # noqa: SLF001
    if isinstance(edit, Replacement):
        edit.value.copy_(value)
    elif not torch.equal(base_tensor(layer, tensor), value.to(base_tensor(layer, tensor))):
        raise SegraftError(f"the buffer {name} differs from the base's, and an adapter has no place for it.")


def _shown(value: Tensor) -> str:
    return "×".join(map(str, value.shape))
