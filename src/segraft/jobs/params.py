"""Counting parameters on the real network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from segraft.adapters import AdapterSpec, ParameterTable, graft, parameter_table
from segraft.networks import build
from segraft.training.strategies import require_parts


@dataclass(frozen=True)
class Counted:
    """Parameters of a network.

    Attributes:
        adapted: with an adapter on it.
        full: without one, all its parameters trainable, as in full fine-tuning.
    """

    adapted: ParameterTable
    full: ParameterTable


def count(network: str, spec: AdapterSpec, arguments: Mapping[str, Any] | None = None) -> Counted:
    """Parameters of a network (one channel, one label, unless `arguments` say otherwise), adapted and on its own."""
    net = build(network, in_channels=1, out_channels=1, arguments=arguments)
    full = parameter_table(net.requires_grad_())
    require_parts(net, spec.train)
    return Counted(parameter_table(graft(net, for_channels(spec, net))), full)


def for_channels(spec: AdapterSpec, net: nn.Module) -> AdapterSpec:
    """Networks that encode their image's channels one at a time get a set of factors for each."""
    channels = getattr(net, "image_channels", 1)
    if channels == 1 or spec.channels > 1 or spec.factorisation is None:
        return spec
    return AdapterSpec.from_dict(spec.to_dict() | {"channels": channels})
