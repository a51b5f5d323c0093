"""Grafting adapters onto a network, switching between them, and taking them off again."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from segraft.adapters.edits import BiasFactor, Edit, LowRank, Replacement
from segraft.adapters.grafted import LayerGrafts, base_tensor, grafts_of, is_grafted
from segraft.adapters.layers import why_not
from segraft.adapters.selection import (
    SelectedTensor,
    SelectedWeight,
    base_parameters,
    modules_by_name,
    select_statistics,
    select_tensors,
    select_weights,
)
from segraft.adapters.spec import AdapterSpec
from segraft.adapters.stock import stock_class
from segraft.adapters.surgery import attach, base_class, detach
from segraft.errors import SegraftError

Net = TypeVar("Net", bound=nn.Module)


@dataclass
class GraftRecord:
    """What a network knows of its adapters.

    Attributes:
        specs: of every adapter, by name.
        active: names of the active adapters, in the order in which they are applied.
        required_grad: which base parameters were trainable before the first graft froze them.
    """

    specs: dict[str, AdapterSpec] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    required_grad: dict[str, bool] = field(default_factory=dict)


RECORD = "_segraft"


def record_of(net: nn.Module) -> GraftRecord:
    """The network's record.

    Raises:
        SegraftError: nothing is grafted on it.
    """
    record = net.__dict__.get(RECORD)
    if not isinstance(record, GraftRecord):
        raise SegraftError(f"this {type(net).__name__} has no adapter: graft one, or load an adapter file, first.")
    return record


def grafted_layers(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer with an adapter, active or not, by its first name."""
    for module, names in modules_by_name(net).items():
        if is_grafted(module):
            yield names[0], module


def graft(net: Net, spec: AdapterSpec, name: str = "default", *, seed: int = 0) -> Net:
    """Freeze the network, add an adapter to it and make that the active one; return the same network.

    With the new adapter the network computes exactly what the base computes. The base is never written to: what
    `spec.train` names is copied, and so are the running statistics of batch norms, which training would change.

    Args:
        net: any module; it is changed in place.
        spec: what to graft, and where.
        name: of the adapter, by which it is switched; without dots.
        seed: of the initial factors; the same seed gives the same factors on every device.

    Raises:
        SegraftError: the name is taken, a place matches nothing, a layer cannot be adapted. Nothing has changed then.
    """
    if not name or "." in name or hasattr(LayerGrafts(), name):
        raise SegraftError(f"adapter name {name!r}: give another one, without dots.")
    record: GraftRecord = net.__dict__.get(RECORD) or GraftRecord()
    if name in record.specs:
        raise SegraftError(f"an adapter named {name!r} is already grafted: choose another name, or ungraft that one.")
    for layer_name, layer in grafted_layers(net):
        if not record.specs.keys() >= grafts_of(layer).keys():
            raise SegraftError(
                f"layer {layer_name!r} has an adapter that was grafted on a part of this network, or on a network "
                "around it: ungraft it there first."
            )
    _refuse_other_channels(net, spec)
    whole = select_tensors(net, spec)
    weights = select_weights(net, spec, whole)
    if spec.channels > 1:
        _refuse_other_layers(weights)
    additions = _build(net, spec, weights, whole, seed)
    if not record.specs:
        record.required_grad = {full: value.requires_grad for full, _, _, value in base_parameters(net)}
    for _, _, _, value in base_parameters(net):
        value.requires_grad_(False)  # noqa: FBT003
    for layer, edits in additions.items():
        attach(layer, name, edits)
    record.specs[name] = spec
    net.__dict__[RECORD] = record
    activate(net, name)
    return net


def _build(
    net: nn.Module,
    spec: AdapterSpec,
    weights: Sequence[SelectedWeight],
    whole: Sequence[SelectedTensor],
    seed: int,
) -> dict[nn.Module, dict[str, Edit]]:
    """The edits of every layer, keyed `tensor` or, for a row block, `tensor_start_stop`."""
    generator = torch.Generator().manual_seed(seed)
    additions: dict[nn.Module, dict[str, Edit]] = {}
    for selected in (*whole, *select_statistics(net)):
        value = base_tensor(selected.layer, selected.tensor)
        additions.setdefault(selected.layer, {})[selected.tensor] = Replacement(selected.tensor, value)
    for layer in modules_by_name(net):
        # Frozen convolutions are executed without keeping what only the gradient of their weight would need.
        if stock_class(type(layer)) not in (None, nn.Linear) and why_not(layer, "weight") is None:
            additions.setdefault(layer, {})
    for chosen in weights:
        edits = additions.setdefault(chosen.layer, {})
        weight, bias = base_tensor(chosen.layer, chosen.slot.weight), chosen.slot.bias
        bias_is_free = bias is not None and bias not in edits
        channels = (None,) if spec.channels == 1 else range(spec.channels)
        for rows, channel in itertools.product(chosen.blocks, channels):
            assert spec.factorisation is not None and spec.magnitude is not None  # noqa: S101, PT018
            key = chosen.slot.weight + _suffix(rows)
            if channel is not None:
                key += f"_channel{channel}"
            # On top of a weight that is trained whole: edits apply in the order of the dictionary.
            edits[f"{key}_factors" if key in edits else key] = LowRank(
                chosen.slot,
                weight,
                factorisation=spec.factorisation,
                rank=chosen.rank,
                scaling=spec.scaling(chosen.rank),
                magnitude=spec.magnitude,
                magnitude_dim=spec.magnitude_dim,
                rows=rows,
                generator=generator,
                gate=spec.gate or "none",
                channel=channel,
            )
            if bias is not None and bias_is_free and spec.bias == "low_rank":
                bias_rows = chosen.slot.bias_rows(rows, weight.shape[0])
                edits[bias + _suffix(bias_rows)] = BiasFactor(
                    bias,
                    base_tensor(chosen.layer, bias),
                    rank=chosen.rank,
                    scaling=spec.scaling(chosen.rank),
                    rows=bias_rows,
                )
        if bias is not None and bias_is_free and spec.bias == "train":
            edits[bias] = Replacement(bias, base_tensor(chosen.layer, bias))
    return additions


def _refuse_other_channels(net: nn.Module, spec: AdapterSpec) -> None:
    """A network that takes its channels one at a time says how many there are: `image_channels`."""
    found = getattr(net, "image_channels", None)
    if spec.channels > 1 and isinstance(found, int) and found != spec.channels:
        raise SegraftError(
            f"this {type(net).__name__} takes images of {found} channels, and the adapter is for {spec.channels}: give "
            "both the same number."
        )


def _refuse_other_layers(weights: Sequence[SelectedWeight]) -> None:
    for chosen in weights:
        kind = base_class(chosen.layer)
        if stock_class(kind) is None:
            raise SegraftError(
                f"layer {chosen.name!r} ({kind.__name__}) cannot have an adapter per channel, which is for linear and "
                "convolution layers as torch computes them: exclude it."
            )


def _suffix(rows: tuple[int, int] | None) -> str:
    return "" if rows is None else f"_{rows[0]}_{rows[1]}"


def has_adapters(net: nn.Module) -> bool:
    """Whether anything is grafted on the network."""
    return RECORD in net.__dict__


def activate(net: nn.Module, names: str | Sequence[str] | None, *, train: str | Sequence[str] | None = None) -> None:
    """Choose which adapters the network computes with.

    Args:
        net: a grafted network.
        names: one adapter; several, stacked in that order; or None, the base alone.
        train: the adapters whose tensors are trainable; None means all active ones.

    Raises:
        SegraftError: an unknown name, or another adapter on top of one with a weight per channel.
    """
    record = record_of(net)
    active = _as_names(names)
    trainable = active if train is None else _as_names(train)
    for name in (*active, *trainable):
        if name not in record.specs:
            raise SegraftError(f"no adapter is named {name!r}: this network has {', '.join(record.specs)}.")
    if len(set(active)) < len(active):
        raise SegraftError(f"an adapter can be active only once: {', '.join(active)}.")
    for name in active[:-1]:
        if record.specs[name].channels > 1:
            raise SegraftError(
                f"adapter {name!r} has a weight per channel of the image, and nothing can come on top of that: name it "
                "as the last of the stack."
            )
    record.active = active
    for _, layer in grafted_layers(net):
        grafts = grafts_of(layer)
        grafts.active = active
        grafts.forget()
        for name, edits in grafts.items():
            edits.requires_grad_(name in trainable)


@contextmanager
def activated(net: Net, names: str | Sequence[str] | None) -> Iterator[Net]:
    """`activate` for the length of a `with` block; what was active, and what was trainable, comes back after it."""
    before = record_of(net).active
    trainable = {parameter: parameter.requires_grad for parameter in net.parameters()}
    activate(net, names)
    try:
        yield net
    finally:
        activate(net, before)
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)


def _as_names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def ungraft(net: Net, name: str | None = None) -> Net:
    """Take one adapter off the network, or (`name` None) all: then it is the base again, bit for bit.

    Raises:
        SegraftError: nothing is grafted, or no adapter has that name.
    """
    record = record_of(net)
    if name is not None and name not in record.specs:
        raise SegraftError(f"no adapter is named {name!r}: this network has {', '.join(record.specs)}.")
    gone = tuple(record.specs) if name is None else (name,)
    for _, layer in list(grafted_layers(net)):
        detach(layer, gone)
    for each in gone:
        del record.specs[each]
    record.active = tuple(each for each in record.active if each in record.specs)
    if not record.specs:
        restore_requires_grad(net, record)
        del net.__dict__[RECORD]
    return net


def restore_requires_grad(net: nn.Module, record: GraftRecord) -> None:
    """Give the base parameters the trainability they had before grafting."""
    for full, _, _, value in base_parameters(net):
        value.requires_grad_(record.required_grad.get(full, True))
