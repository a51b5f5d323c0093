"""What starts new in an adaptation starts as its seed says, while the base stays the same."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from segraft import adapters
from segraft.adapters import AdapterSpec
from segraft.jobs import adapt, import_base, load_model
from segraft.jobs.adapting import adapting_settings
from segraft.jobs.base_source import BaseSource
from segraft.jobs.bases import build_from_start
from segraft.jobs.importing import random_base
from segraft.networks import build, load_base

NETWORK = {"spatial_dims": 3, "widths": [4, 8], "norm": "instance"}
STILL = {"learning_rate": 1e-12, "epochs": 1, "device": "cpu", "volumes": 2, "patches": 1}
"""Steps so small that nothing moves."""


@pytest.fixture
def scans(tmp_path) -> Path:
    """Two scans with two labels."""
    rng, folder = np.random.default_rng(0), tmp_path / "D"
    folder.mkdir()
    for name in "ab":
        label = np.zeros((16, 16, 16), np.uint8)
        label[2:7, 4:12, 4:12], label[9:14, 4:12, 4:12] = 1, 2
        image = rng.normal(0, 1, label.shape).astype(np.float32) + 3 * label
        for kind, values in (("image", image), ("label", label)):
            nib.save(nib.Nifti1Image(values, np.eye(4)), folder / f"{name}_{kind}.nii")
    entries = [{"image": f"{name}_image.nii", "label": f"{name}_label.nii"} for name in "ab"]
    listing = {"name": "Two", "labels": {"1": "shell", "2": "core"}, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(listing))
    return folder


def begun(base, scans: Path, out: Path, seed: int, train: str) -> dict[str, torch.Tensor]:
    """The weights that an adaptation without factors begins with, as a fresh process would build them."""
    spec = AdapterSpec("none", train=(train,))
    adapt(base, scans, out, spec=spec, settings=adapting_settings(**STILL, seed=seed))
    return load_model(out).net.state_dict()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_random_base(tmp_path, scans, seed):
    base = random_base(tmp_path / "base", network="unet", network_arguments=NETWORK, labels=["shell", "core"])
    before = adapters.fingerprint(load_base(base)[0])
    found = begun(base, scans, tmp_path / "run", seed, ".*")
    drawn = build_from_start("unet", {**NETWORK, "in_channels": 1, "out_channels": 2}, seed=seed).state_dict()
    expected = load_base(base)[0].state_dict() if seed == 0 else drawn
    for name, value in found.items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
    assert adapters.fingerprint(load_base(base)[0]) == before


def test_an_output_that_the_base_has_not(tmp_path, scans):
    torch.manual_seed(5)
    torch.save(build("unet", in_channels=1, out_channels=1, arguments=NETWORK).state_dict(), tmp_path / "w.pt")
    base = import_base(
        tmp_path / "w.pt", tmp_path / "base", network="unet", network_arguments=NETWORK, labels=["core"]
    ).path
    first, second = (begun(BaseSource(base), scans, tmp_path / str(seed), seed, "head") for seed in (1, 2))
    known = load_base(base)[0].state_dict()
    changed = {name for name in first if not torch.allclose(first[name], second[name], atol=1e-6)}
    assert changed == {"head.weight"}  # the network begins with a bias of its own choice
    for name in ("head.weight", "head.bias"):
        assert torch.allclose(first[name][1], known[name][0], atol=1e-6)  # core goes on as it was
        assert torch.allclose(second[name][1], known[name][0], atol=1e-6)
