"""Fixtures that every folder shares."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
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


os.environ["SEGRAFT_TRUST"] = "tests"  # for what is made once for many tests


@pytest.fixture(autouse=True)
def _networks_of_the_tests_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may name networks that a test defines; what a test vouches for besides is forgotten after it."""
    monkeypatch.setenv("SEGRAFT_TRUST", "tests")


@pytest.fixture(autouse=True)
def _same_weights_on_every_run() -> None:
    """Networks that a test builds without a seed of its own start from the same weights."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def seg_by_hand() -> Callable[[Path, np.ndarray, tuple[int, ...]], dict[str, np.ndarray]]:
    """seg_by_hand(path, affine, shape): segment label -> where it is, read by the standard with pydicom's tags alone.

    Bits are packed without gaps between frames, the first pixel lowest (PS3.5, 8.1.1); a frame's pixel lies at
    P = S + column·Δcolumn·X + row·Δrow·Y (PS3.3, C.7.6.2.1.1).
    """

    def read(path: Path, affine: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        dataset = pydicom.dcmread(path)
        rows, columns, frames = dataset.Rows, dataset.Columns, int(dataset.NumberOfFrames)
        bits = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
        pixels = bits[: frames * rows * columns].reshape(frames, rows, columns)
        shared = dataset.SharedFunctionalGroupsSequence[0]
        spacing = np.array(shared.PixelMeasuresSequence[0].PixelSpacing, dtype=float)
        cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
        names = {int(each.SegmentNumber): str(each.SegmentLabel) for each in dataset.SegmentSequence}
        found = {name: np.zeros(shape, dtype=bool) for name in names.values()}
        for frame, groups in zip(pixels, dataset.PerFrameFunctionalGroupsSequence, strict=True):
            corner = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
            of = groups if "SegmentIdentificationSequence" in groups else shared  # all frames' alike, if there is one
            number = int(of.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
            for row, column in np.argwhere(frame):
                lps = corner + column * spacing[1] * cosines[:3] + row * spacing[0] * cosines[3:]
                voxel = np.linalg.solve(affine[:3, :3], lps * [-1, -1, 1] - affine[:3, 3])
                assert np.abs(voxel - np.rint(voxel)).max() < 0.01
                found[names[number]][tuple(np.rint(voxel).astype(int))] = True
        return found

    return read
