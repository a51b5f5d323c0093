"""What pages start from: a folder with `base`, `run/adapter.safetensors` and `scan.nii.gz`, tiny and untrained."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from segraft import adapters
from segraft.adapters import AdapterSpec, adapter_tensors, graft
from segraft.data.labels import Labels
from segraft.data.preparation import Preparation, Window
from segraft.jobs.bases import build_from_start
from segraft.jobs.task import task_record
from segraft.networks import save_base


def tiny_adapter(folder: Path, *, regions: Mapping[int, tuple[int, ...]] | None = None, **preparing: Any) -> None:
    """Write them into a folder.

    Args:
        folder: of the page.
        regions: that its labels, 1 and 2, are.
        preparing: fields of the preparation.
    """
    arguments = {"in_channels": 1, "out_channels": 2, "widths": [4, 8]}
    preparation = Preparation(intensity=Window(low=-50, high=150), **{"patch": (16, 16, 8), **preparing})
    record = task_record(Labels({1: "core", 2: "rim"}, regions or {}), preparation)
    net = build_from_start("unet3d", arguments)
    base = save_base(net, folder / "base", network="unet3d", arguments=arguments, record=record)
    graft(net, AdapterSpec("dora_c", rank=2, train="head"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in adapter_tensors(net, "default").values():
            value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    described = {"network": "unet3d", "arguments": arguments, "path": f"../base/{base.path.name}"}
    adapters.save(net, folder / "run" / "adapter.safetensors", record=record | {"base": described})
    noise = np.random.default_rng(0).normal(50, 60, (20, 18, 12)).astype(np.float32)
    nib.save(nib.Nifti1Image(noise, np.diag([1, 1, 1.5, 1])), folder / "scan.nii.gz")


def python_blocks(page: Path) -> list[str]:
    """The code of a page's ```python blocks, in order."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
