"""Fixtures that every folder shares."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples on every run; `--hypothesis-profile=search` looks for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("fixed")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real labelled scans; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("SEGRAFT_DATA", DATA))
    if not (folder / "hippocampus" / "dataset.json").is_file():
        pytest.skip(f"no real scans at {folder} (set SEGRAFT_DATA)")
    return folder


@pytest.fixture(scope="session")
def nnunet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw`, `preprocessed` and `results` of tiny models that nnU-Net itself made, once for all processes of the tests.

    The one of the hippocampus is among them where there are real scans.
    """
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "nnunet"
    hippocampus = Path(os.environ.get("SEGRAFT_DATA", DATA)) / "hippocampus"
    given = [hippocampus] if (hippocampus / "dataset.json").is_file() else []
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "done").is_file():
            script = Path(__file__).parent / "exchange" / "nnunet_making.py"
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            made = subprocess.run(
                [sys.executable, script, folder, *given], capture_output=True, text=True, env=environment
            )
            assert made.returncode == 0, made.stderr
            (folder / "done").touch()
    return folder


@pytest.fixture(autouse=True)
def _same_weights_on_every_run() -> None:
    """Networks that a test builds without a seed of its own start from the same weights."""
    torch.manual_seed(0)
