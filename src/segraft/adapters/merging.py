"""Writing the active adapters into the weights, and taking that back."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from segraft.adapters.graft import RECORD, GraftRecord, Net, grafted_layers, record_of, restore_requires_grad
from segraft.adapters.grafted import (
    ATTRIBUTE,
    LayerGrafts,
    adapted_tensor,
    base_tensor,
    grafts_of,
    set_base_tensor,
)
from segraft.adapters.selection import base_parameters
from segraft.adapters.surgery import refresh_class
from segraft.errors import SegraftError

MERGED = "_segraft_merged"


@dataclass
class MergedLayer:
    """What `unmerge` needs of one layer: its adapters, and the base tensors that were replaced."""

    layer: nn.Module
    grafts: LayerGrafts
    base: dict[str, Tensor]


@dataclass
class MergeRecord:
    """What `unmerge` needs of the network."""

    record: GraftRecord
    layers: list[MergedLayer]


@torch.no_grad()
def merge(net: Net, *, reversible: bool = True) -> Net:
    """Write the active adapters into the weights and make the network plain again.

    It has the classes and the state-dict keys it had before grafting, computes what the adapted network computed,
    and can be saved, compiled and exported like any other.

    Args:
        net: a grafted network; changed in place.
        reversible: keep the base weights and the adapters aside for `unmerge`. False frees them.

    Raises:
        SegraftError: nothing is grafted on it, an earlier merge can still be undone, or weights differ by channel.
    """
    record = record_of(net)
    for name in record.active:
        if record.specs[name].channels > 1:
            raise SegraftError(
                f"adapter {name!r} has a weight per channel of the image, so there is not one weight to write it into: "
                "keep it as an adapter."
            )
    if reversible and MERGED in net.__dict__:
        raise SegraftError("this network holds an earlier merge that could not be undone then: pass reversible=False.")
    layers = []
    for _, layer in list(grafted_layers(net)):
        grafts = grafts_of(layer)
        edited = {edit.tensor for edit in grafts.active_edits()}
        merged = {tensor: adapted_tensor(layer, tensor).detach().clone() for tensor in sorted(edited)}
        base = {tensor: base_tensor(layer, tensor) for tensor in merged}
        grafts.forget()
        del layer._modules[ATTRIBUTE]
        refresh_class(layer)
        for tensor, value in merged.items():
            is_parameter = isinstance(base[tensor], nn.Parameter)
            set_base_tensor(layer, tensor, nn.Parameter(value) if is_parameter else value)
        layers.append(MergedLayer(layer, grafts, base))
    restore_requires_grad(net, record)
    del net.__dict__[RECORD]
    net.__dict__.pop(MERGED, None)
    if reversible:
        net.__dict__[MERGED] = MergeRecord(record, layers)
    return net


def unmerge(net: Net) -> Net:
    """Undo `merge`: the base weights bit for bit, and the adapters with what was active.

    Raises:
        SegraftError: the network was not merged, or merged with `reversible=False`.
    """
    merged = net.__dict__.get(MERGED)
    if not isinstance(merged, MergeRecord):
        raise SegraftError("this network holds no merged adapter to take out again: merge with reversible=True.")
    if RECORD in net.__dict__:
        raise SegraftError("another adapter was grafted after merging: ungraft it first.")
    for item in merged.layers:
        for tensor, value in item.base.items():
            present = base_tensor(item.layer, tensor)
            if value.device != present.device:
                item.grafts.to(present.device)
            if value.dtype != present.dtype:
                item.grafts.to(present.dtype)
            value.data = value.data.to(present)
            set_base_tensor(item.layer, tensor, value)
        item.layer.add_module(ATTRIBUTE, item.grafts)
        refresh_class(item.layer)
    for _, _, _, parameter in base_parameters(net):
        parameter.requires_grad_(False)  # noqa: FBT003
    net.__dict__[RECORD] = merged.record
    del net.__dict__[MERGED]
    return net
