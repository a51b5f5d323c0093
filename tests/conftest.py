"""Fixtures that every folder shares."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples on every run; `--hypothesis-profile=search` looks for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real labelled scans; tests that need it skip where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SEGRAFT_DATA", default))
    if not (folder / "hippocampus" / "dataset.json").is_file():
        pytest.skip(f"no real scans at {folder} (set SEGRAFT_DATA)")
    return folder


@pytest.fixture(autouse=True)
def _same_weights_on_every_run() -> None:
    """Networks that a test builds without a seed of its own start from the same weights."""
    torch.manual_seed(0)
