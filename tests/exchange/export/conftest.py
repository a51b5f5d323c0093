"""Finished adapters of tiny networks, made without training: factors, and what is trained whole, at random."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from segraft import adapters
from segraft.adapters import AdapterSpec, adapter_tensors, graft
from segraft.data.labels import Labels
from segraft.data.preparation import Preparation, Window
from segraft.jobs.bases import build_from_start
from segraft.jobs.model import load_model
from segraft.jobs.task import task_record
from segraft.networks import load_base, save_base

SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "unet": ({"widths": [4, 8]}, (16, 16, 1)),
    "unet3d": ({"widths": [4, 8]}, (16, 16, 8)),
    "multi_view_unet": ({"width": 4}, (16, 16, 1)),
    "swin_unetr": ({"feature_size": 12, "depths": [1, 1, 1, 1]}, (64, 32, 32)),
    "unetr": (
        {"img_size": [32, 32, 32], "feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2},
        (32, 32, 32),
    ),
    "segresnet": ({"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}, (16, 16, 8)),
}
"""Network -> arguments that make it tiny, its patch."""

PATHS = {"unetr": "monai.networks.nets:UNETR", "segresnet": "monai.networks.nets:SegResNet"}


@dataclass(frozen=True)
class Made:
    """An adapter file, its base file, and an input."""

    path: Path
    base: Path
    image: torch.Tensor

    def plain(self) -> nn.Module:
        """The base, plain."""
        return load_base(self.base)[0].eval()

    def adapted(self) -> nn.Module:
        """The base with the adapter merged, as Segraft segments with it."""
        return load_model(self.path).net

    @property
    def preparation(self) -> Preparation:
        """Of the scans."""
        return load_model(self.path).preparation

    def logits(self) -> torch.Tensor:
        """What Segraft computes with the adapter."""
        with torch.no_grad():
            return self.adapted()(self.image)


def shake(net: nn.Module, name: str = "default", scale: float = 0.1) -> None:
    """Move every tensor of an adapter from its start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, value in adapter_tensors(net, name).items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator) * scale
                value.copy_((value + noise).abs() + 0.1 if "running_var" in key else value + noise)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    """make(network, spec=…, arguments=…): an adapter file with its base."""

    def made(
        network: str,
        spec: AdapterSpec | None = None,
        *,
        labels: tuple[str, ...] = ("core", "rim"),
        regions: Mapping[int, tuple[int, ...]] | None = None,
        channels: int = 1,
        patch: tuple[int, ...] | None = None,
        change: Callable[[nn.Module], None] | None = None,
        **arguments: Any,
    ) -> Made:
        small, usual = SMALL.get(network, ({}, (16, 16, 8)))
        patch = patch or usual
        path = PATHS.get(network, network)
        settled = {"in_channels": channels, "out_channels": len(labels), **small, **arguments}
        spec = spec or AdapterSpec("dora_c", rank=2)
        preparation = Preparation(spacing=(1.0, 1.0, 2.0), intensity=Window(low=-50, high=150), patch=patch)
        record = task_record(
            Labels(dict(enumerate(labels, start=1)), regions or {}), preparation, [f"C{n}" for n in range(channels)]
        )
        base = save_base(
            build_from_start(path, settled), tmp_path / "base", network=path, arguments=settled, record=record
        )
        net, _ = load_base(base.path)
        graft(net, spec)
        shake(net)
        if change is not None:
            change(net)
        described = {"network": path, "arguments": settled, "path": "../base/base.safetensors"}
        file = adapters.save(net, tmp_path / "run" / "adapter.safetensors", record=record | {"base": described})
        image = torch.randn(2, channels, *(patch[:2] if patch[2] == 1 else patch))
        return Made(file, base.path, image)

    return made
