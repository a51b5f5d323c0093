"""What is measured on each network: references, Segraft's methods, the peers, and options of an adapted network.

To add a method, add one entry to `METHODS`; a peer, one to `PEERS`; an option, one to `options`.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, Precision
from segraft.adapters import AdapterSpec, graft

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

BOUND, FULL, BOUND_WITHOUT_IMAGE = "bound", "full", "bound, no image gradient"
OPTIONS_OF = ("dora_c", 8)
EAGER = f"{OPTIONS_OF[0]} r{OPTIONS_OF[1]}, float32, eager"


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        name: of the row.
        adapt: makes of the case's network what is measured.
        method: Segraft's method or the peer's, without the rank; empty for references and options.
        rank: of it.
        nearest: of a peer, Segraft's method that computes the same; empty otherwise.
        transposed: of a peer, what it does with transposed convolutions.
        image_gradient: whether the image's own gradient is computed.
        precision: other than the case's.
        channels_last: the memory format of network and image.
        compiled: by `torch.compile`.
    """

    name: str
    adapt: Callable[[nn.Module], nn.Module]
    method: str = ""
    rank: int | None = None
    nearest: str = ""
    transposed: str = ""
    image_gradient: bool = False
    precision: Precision | None = None
    channels_last: bool = False
    compiled: bool = False

    def note(self, net: nn.Module) -> str:
        """What the peer leaves out of the network, for the row."""
        left_out = sum(isinstance(layer, TRANSPOSED) for layer in net.modules())
        layers = left_out + len(adaptable(net))
        return f"{left_out} of {layers} layers left out: it {self.transposed}" if self.transposed and left_out else ""


@dataclass(frozen=True)
class Group:
    """Variants that take their steps in the same rounds, so that any two of them can be compared.

    Attributes:
        name: by which `--groups` chooses it.
        references: variants that are measured whatever is asked for.
        others: the rest.
        evaluated: whether evaluation is measured too.
    """

    name: str
    references: tuple[Variant, ...]
    others: tuple[Variant, ...]
    evaluated: bool = True

    def matching(self, pattern: str) -> "Group":
        """The references, and the others whose name the expression is found in."""
        return Group(
            self.name,
            self.references,
            tuple(variant for variant in self.others if re.search(pattern, variant.name)),
            self.evaluated,
        )


def adaptable(net: nn.Module) -> list[str]:
    """Names of the layers that the peers adapt: linear layers and convolutions, without the transposed ones."""
    return [name for name, layer in net.named_modules() if isinstance(layer, (nn.Linear, *CONVOLUTIONS))]


def frozen(net: nn.Module) -> nn.Module:
    """Nothing trainable: with an image that requires a gradient, every layer computes its input gradient."""
    return net.requires_grad_(requires_grad=False)


class _RequireGradient(torch.autograd.Function):
    """The same tensor, of which a gradient is required; the token stands for an adapter that made it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, _token: Tensor) -> Tensor:
        ctx.mark_dirty(output)  # as if changed in place: neither a copy, nor a leaf or view that refuses ReLU in place
        return output

    @staticmethod
    def backward(_ctx: Any, _gradient: Tensor) -> tuple[None, None]:
        return None, None


def frozen_from_first_output(net: nn.Module) -> nn.Module:
    """As `frozen`, but the backward pass ends at the outputs of the layers that see the image, as an adapter's does."""

    def start_here(_layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        if output.requires_grad:
            return output
        token = torch.empty((), device=output.device, requires_grad=True)
        required: Tensor = _RequireGradient.apply(output, token)
        return required

    for layer in net.modules():
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
            layer.register_forward_hook(start_here)
    return frozen(net)


def grafted(net: nn.Module, method: str, rank: int) -> nn.Module:
    """One of Segraft's methods on every layer."""
    return graft(net, AdapterSpec(method, rank=rank))


def peft(net: nn.Module, rank: int, *, dora: bool) -> nn.Module:
    """PEFT's LoRA or DoRA on every layer that it takes."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules=adaptable(net))
    adapted: nn.Module = get_peft_model(net, config)
    return adapted


def lycoris(net: nn.Module, rank: int, *, dora: bool) -> nn.Module:
    """LyCORIS' LoCon (LoRA on linear layers) or its DoRA on every layer that it takes."""
    from lycoris import create_lycoris

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)  # it reports each network on standard output
    frozen(net)
    adapters = create_lycoris(net, 1.0, linear_dim=rank, linear_alpha=2 * rank, algo="locon", dora_wd=dora)
    adapters.apply_to()
    # It replaces the layers' `forward`; as a submodule its parameters are the network's.
    net.add_module("lycoris", adapters)
    return net


METHODS = {
    "lora_c": "LoRA",
    "conv_lora": "LoRA",
    "cp_lora": "LoRA",
    "dora_c": "DoRA",
    "conv_dora": "DoRA",
    "cp_dora": "DoRA",
}
"""Segraft's method -> kind: variants of one kind and rank are measured in the same rounds."""


@dataclass(frozen=True)
class Peer:
    """Another package's method, its kind, and Segraft's method that computes the same weight."""

    name: str
    kind: str
    nearest: str
    adapt: Callable[..., nn.Module]
    transposed: str


PEERS = (
    Peer("PEFT LoRA", "LoRA", "conv_lora", partial(peft, dora=False), "refuses transposed convolutions"),
    Peer("PEFT DoRA", "DoRA", "conv_dora", partial(peft, dora=True), "refuses transposed convolutions"),
    Peer("LyCORIS LoCon", "LoRA", "conv_lora", partial(lycoris, dora=False), "skips transposed convolutions"),
    Peer("LyCORIS DoRA", "DoRA", "conv_dora", partial(lycoris, dora=True), "skips transposed convolutions"),
)

REFERENCES = (
    Variant(BOUND, frozen, image_gradient=True),
    Variant(FULL, lambda net: net),
)


def methods(kind: str, rank: int) -> Group:
    """Segraft's methods of a kind and the peers' beside the references."""
    ours = (
        Variant(f"{method} r{rank}", partial(grafted, method=method, rank=rank), method, rank)
        for method, its_kind in METHODS.items()
        if its_kind == kind
    )
    peers = (
        Variant(
            f"{peer.name} r{rank}",
            partial(peer.adapt, rank=rank),
            peer.name,
            rank,
            nearest=f"{peer.nearest} r{rank}",
            transposed=peer.transposed,
        )
        for peer in PEERS
        if peer.kind == kind
    )
    return Group(f"{kind} r{rank}", REFERENCES, (*ours, *peers))


def options() -> Group:
    """Ways to run one adapted network, beside float32 in eager mode."""
    adapt = partial(grafted, method=OPTIONS_OF[0], rank=OPTIONS_OF[1])
    return Group(
        "options",
        (Variant(EAGER, adapt),),
        (
            Variant("bf16 autocast", adapt, precision="bfloat16"),
            Variant("channels_last", adapt, channels_last=True),
            Variant("bf16 autocast, channels_last", adapt, precision="bfloat16", channels_last=True),
            Variant("torch.compile", adapt, compiled=True),
        ),
        evaluated=False,
    )


def groups(case: Case, ranks: Sequence[int]) -> list[Group]:
    """Everything that is measured on a network."""
    kinds = dict.fromkeys(METHODS.values())
    return [
        Group("references", REFERENCES, (Variant(BOUND_WITHOUT_IMAGE, frozen_from_first_output),), evaluated=False),
        *(methods(kind, rank) for rank in ranks for kind in kinds),
        *([options()] if case.options else []),
    ]


def memory_format(shape: Sequence[int]) -> torch.memory_format:
    """Channels last, for images of this shape."""
    return torch.channels_last_3d if len(shape) == 5 else torch.channels_last
