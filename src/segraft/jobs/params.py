"""Counting parameters on the real network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from segraft.adapters import AdapterSpec, ParameterTable, graft, parameter_table, ungraft
from segraft.errors import SegraftError
from segraft.networks import UNet, build
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
    return Counted(parameter_table(graft(net, spec)), full)


@dataclass(frozen=True)
class PaperRow:
    """One method of a paper's parameter table.

    Attributes:
        method: preset.
        at_one: counted at R = 1 with the paper's layout; the paper's row.
        multiplied: R times that, as the paper states the count at R.
        counted: with the paper's layout, counted at R.
        defaults: with this package's defaults (biases frozen, one magnitude per true output channel), counted at R.
    """

    method: str
    at_one: int
    multiplied: int
    counted: int
    defaults: int


SAH_BIAS = {
    "cp_lora": "low_rank",
    "cp_dora": "low_rank",
    "conv_lora": "frozen",
    "conv_dora": "frozen",
    "dora_c": "low_rank",
    "lora_c": "low_rank",
}
"""Rows of Table 3 of the haemorrhage paper, in its order, and how each treats biases there."""


def paper_table(paper: str, rank: int) -> list[PaperRow]:
    """A paper's parameter table, counted on its network.

    Args:
        paper: `sah`, Table 3 of Minoccheri et al. 2025.
        rank: of the last three columns.

    Raises:
        SegraftError: another paper, or a rank below 1.
    """
    if paper != "sah":
        raise SegraftError(f"no table of paper {paper!r}: choose sah.")
    with torch.device("meta"):  # the real network, without 31 million numbers in it
        net = UNet()
    at_one = {method: _count_sah(net, method, 1) for method in SAH_BIAS}
    return [
        PaperRow(
            method,
            at_one=at_one[method],
            multiplied=rank * at_one[method],
            counted=_count_sah(net, method, rank),
            defaults=_trainable(net, AdapterSpec(method, rank=rank)),
        )
        for method in SAH_BIAS
    ]


def _count_sah(net: nn.Module, method: str, rank: int) -> int:
    """The paper's layout: magnitudes over the first stored dimension, on every layer but the head."""
    bias: Any = SAH_BIAS[method]
    body = AdapterSpec(method, rank=rank, bias=bias, magnitude_dim=0, exclude="head")
    head = AdapterSpec(method, rank=rank, bias=bias, magnitude=False, targets="head")
    return _trainable(net, body) + _trainable(net, head)


def _trainable(net: nn.Module, spec: AdapterSpec) -> int:
    trainable = parameter_table(graft(net, spec)).trainable
    ungraft(net)
    return trainable
