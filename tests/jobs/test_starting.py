"""What starts new starts as the seed of the adaptation says, and the base stays the same."""

import pytest
import torch
from safetensors.torch import load_file
from segraft.adapters import AdapterSpec
from segraft.jobs import adapt, load_model
from segraft.jobs.adapting import adapting_settings
from segraft.jobs.importing import random_base
from segraft.jobs.model import build_from_start

NETWORK = {"spatial_dims": 3, "widths": (4, 8)}


@pytest.fixture
def started(tmp_path, cohort_folder):
    """started(base, seed, train): the adapter's tensors after one step so small that nothing moves."""

    def run(base, seed, train, **settings):
        out = tmp_path / f"{base.parent.name}-{seed}-{'-'.join(train)}"
        rate = {"learning_rate": 1e-12, "epochs": 1, "device": "cpu", "seed": seed, **settings}
        spec = AdapterSpec("none", train=train)
        result = adapt(base, cohort_folder, out, spec=spec, labels=["1"], settings=adapting_settings(**rate))
        load_model(out)  # the base is the one that it was trained on
        return load_file(result.path)

    return run


def test_a_random_base_starts_as_the_seed_says(tmp_path, started):
    base = random_base(tmp_path / "base", network="unet", network_arguments=NETWORK, labels=["lesion"])
    first, second = (started(base, seed, (".*",)) for seed in (0, 1))
    drawn = build_from_start("unet", {**NETWORK, "in_channels": 1, "out_channels": 1}, seed=1).state_dict()
    for key, value in second.items():
        name = key.removesuffix(".value")
        if value.is_floating_point() and "running" not in name:
            plain = next(tensor for full, tensor in drawn.items() if full.replace(".", "") in name.replace(".", ""))
            assert torch.allclose(value, plain, atol=1e-6)
    weights = [key for key in first if first[key].ndim > 1]
    assert weights
    assert not any(torch.allclose(first[key], second[key], atol=1e-3) for key in weights)
