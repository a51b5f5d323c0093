"""Tiny networks with an adapter per channel, run in one pass, or by switching: an ordinary adapter per channel."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from segraft.adapters import AdapterSpec, activate, adapter_tensors, graft, routed, ungraft

CHANNELS, ROUTE = 3, [2, 0, 1]


class Attention(nn.Module):
    """A fused qkv layer, and tokens whose batch is split further, as windows are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.reshape(2 * len(x), -1, 4)).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)).view(x.shape)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 6, bias=False))


def attention() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), Attention(), nn.Linear(4, 2))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.InstanceNorm2d(6, affine=True),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, (1, 3), padding="same", dilation=2, bias=False),
    )


def volume() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 4, 2, stride=2), nn.GELU(), nn.Conv3d(4, 3, 1), nn.Conv3d(3, 2, 3, padding=1))


def other() -> nn.Module:
    """What has no chain: groups, and transposition."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 2, stride=2))


NETS = {
    "linear": (linear, (2, 7, 5)),
    "attention": (attention, (2, 6, 5)),
    "convolution": (convolution, (2, 1, 8, 8)),
    "volume": (volume, (2, 1, 6, 6, 6)),
    "other": (other, (2, 1, 7, 7)),
}

SPECS = {
    "rs_lora": {"method": "rs_lora"},
    "lora_c": {"method": "lora_c"},
    "cp": {"method": "cp_lora"},
    "dora": {"method": "conv_dora"},
    "dora_c": {"method": "dora_c"},
    "gated": {"method": "arena"},
    "tucker": {"method": "none", "factorisation": "tucker"},
}


def spec_of(method: str, **options: Any) -> AdapterSpec:
    """Of SPECS, for every channel."""
    return AdapterSpec(**{"rank": 2, "channels": CHANNELS, **SPECS[method], **options})


def build(kind: str, spec: AdapterSpec, name: str = "default", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Grafted, with every tensor of the adapter away from its start."""
    torch.manual_seed(3)
    net = graft(NETS[kind][0]().to(dtype), spec, name)
    with torch.no_grad():
        for value in adapter_tensors(net, name).values():
            value.add_(0.3 * torch.randn_like(value))
    return net


def images(kind: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Of every channel in the order of ROUTE."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(NETS[kind][1], generator=generator).to(dtype) for _ in ROUTE]


def switched(net: nn.Module, spec: AdapterSpec) -> nn.Module:
    """The same base with an ordinary adapter per channel, c0, c1, …, of the same factors."""
    other = ungraft(copy.deepcopy(net))
    options = {name: getattr(spec, name) for name in ("method", "rank", "factorisation", "slices", "train")}
    for channel in range(CHANNELS):
        graft(other, AdapterSpec(**options), f"c{channel}")
        with torch.no_grad():
            theirs = adapter_tensors(net, "default")
            for key, value in adapter_tensors(other, f"c{channel}").items():
                edit, dot, name = key.rpartition(".")
                value.copy_(theirs[f"{edit}_channel{channel}{dot}{name}"])
    return other


def of_switching(net: nn.Module, x: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs and gradients of the loop, by the keys of the adapter per channel."""
    outputs, gradients = [], {}
    for channel, own in zip(ROUTE, x, strict=True):
        activate(net, f"c{channel}")
        outputs.append(net(own))
    y = torch.cat(outputs)
    if torch.is_grad_enabled():
        activate(net, None, train=[f"c{channel}" for channel in range(CHANNELS)])
        y.square().mean().backward()
    for channel in range(CHANNELS):
        for key, value in adapter_tensors(net, f"c{channel}").items():
            edit, dot, name = key.rpartition(".")
            gradients[f"{edit}_channel{channel}{dot}{name}"] = value.grad
    return y.detach(), gradients


def of_one_pass(net: nn.Module, x: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs and gradients of all channels together."""
    with routed(ROUTE):
        y = net(torch.cat(x))
    y.square().mean().backward()
    return y.detach(), {key: value.grad for key, value in adapter_tensors(net, "default").items()}


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    """The same keys, and tensors that are close."""
    assert set(found) == set(wanted), f"not in both: {sorted(set(found) ^ set(wanted))}"
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}", **tolerance)
