"""A cohort of four tiny scans, and trainings on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segraft.data.cohort import Case
from segraft.data.patches import PatchSource
from segraft.data.preparation import Preparation
from segraft.networks import UNet
from segraft.training.settings import TrainingSettings, check_settings

SIZE = 16


@pytest.fixture(scope="session")
def cases(tmp_path_factory) -> list[Case]:
    """Four scans of 16 x 16 x 16 voxels of 1 mm: noise, and a bright ball that is label 1."""
    folder = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"), -1)
    found = []
    for number in range(4):
        ball = np.linalg.norm(grid - rng.integers(5, 11, 3), axis=-1) < 4
        image = rng.normal(0, 10, ball.shape) + 60 * ball
        paths = folder / f"scan{number}.nii.gz", folder / f"label{number}.nii.gz"
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), paths[0])
        nib.save(nib.Nifti1Image(ball.astype(np.uint8), np.eye(4)), paths[1])
        found.append(Case(f"scan{number}", f"scan{number}", paths[:1], paths[1]))
    return found


@pytest.fixture(scope="session")
def source(cases) -> PatchSource:
    """Augmented patches of 8 x 8 x 8 voxels."""
    return PatchSource(cases, Preparation(patch=(8, 8, 8)), [1], seed=0)


@pytest.fixture(scope="session")
def flat_source(cases) -> PatchSource:
    """Slices of 8 x 8 pixels."""
    return PatchSource(cases, Preparation(patch=(8, 8, 1)), [1], seed=0)


class Dropping(nn.Module):
    """A U-Net behind dropout, which draws random numbers in every step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.drop, self.net = nn.Dropout(0.2), net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(self.drop(image))


@pytest.fixture
def make_net() -> Callable[..., nn.Module]:
    """make_net(dropout=…, seed=…, **arguments of UNet): a small network, the same every time."""

    def make(*, dropout: bool = False, seed: int = 0, **arguments: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = UNet(**({"spatial_dims": 3, "widths": (4, 8), "norm": "instance"} | arguments))
        return Dropping(net) if dropout else net

    return make


@pytest.fixture
def settings() -> Callable[..., TrainingSettings]:
    """settings(**values): of a short training on the CPU."""

    def make(**values: Any) -> TrainingSettings:
        return check_settings(**({"epochs": 2, "learning_rate": 0.02, "device": "cpu"} | values))

    return make


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return tmp_path / "run" / "last.ckpt"
