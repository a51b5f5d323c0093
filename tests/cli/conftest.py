"""A tiny cohort, a tiny base and adapter, and the command line called as a user calls it."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nibabel as nib
import numpy as np
import pytest

from segraft.cli import main

TINY = ("--network-args", '{"widths": [4, 8]}', "--epochs", "2", "--device", "cpu")


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Outcome]


def run_in_process(*arguments: object) -> Outcome:
    out, err, code = io.StringIO(), io.StringIO(), 0
    handler = signal.getsignal(signal.SIGINT)
    try:
        with (
            patch.object(sys, "argv", ["segraft", *map(str, arguments)]),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        signal.signal(signal.SIGINT, handler)
    return Outcome(code, out.getvalue(), err.getvalue())


def run_subprocess(*arguments: object) -> Outcome:
    command = [sys.executable, "-c", "from segraft.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return Outcome(done.returncode, done.stdout, done.stderr)


def write_cohort(folder: Path, names: Sequence[str], *, seed: int = 0, **keys: Any) -> Path:
    """Noise with a bright ball (label 1) and a brighter one (label 2) per scan; returns the folder."""
    rng = np.random.default_rng(seed)
    for place, name in enumerate(names):
        shape = (16, 16, 16 + 8 * (place % 2))
        voxels = np.indices(shape).transpose(1, 2, 3, 0)
        image, label = rng.normal(100, 10, shape).astype(np.float32), np.zeros(shape, np.uint8)
        for value, centre in ((1, (5, 5, 5)), (2, (11, 10, 11))):
            ball = np.linalg.norm(voxels - (np.array(centre) + rng.integers(-1, 2, 3)), axis=-1) < 3
            label[ball], image[ball] = value, image[ball] + 100 * value
        write_nifti(folder / "imagesTr" / f"{name}.nii.gz", image)
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", label)
    write_listing(folder, names, **keys)
    return folder


def write_nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([1, 1, 1.5, 1]) if affine is None else affine), path)
    return path


def write_listing(folder: Path, names: Sequence[str], **keys: Any) -> None:
    content = {
        "name": "Toy",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "core", "2": "rim"},
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names],
    }
    (folder / "dataset.json").write_text(json.dumps(content | keys))


@pytest.fixture(scope="session")
def segraft() -> Command:
    """segraft(*arguments): the command line in this process, with `sys.argv` and all."""
    return run_in_process


@pytest.fixture(scope="session")
def fresh() -> Command:
    """fresh(*arguments): the command line in a process of its own."""
    return run_subprocess


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Options of a small and short training."""
    return TINY


@pytest.fixture(scope="session")
def make_cohort() -> Callable[..., Path]:
    """make_cohort(folder, names, seed=…, **keys of dataset.json)."""
    return write_cohort


@pytest.fixture(scope="session")
def save_nifti() -> Callable[..., Path]:
    """save_nifti(path, data, affine)."""
    return write_nifti


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cohort of eight (D), a base trained on label 1 of four, an adapter for label 2 from three."""
    work = tmp_path_factory.mktemp("work")
    write_cohort(work / "D", [f"p{number}" for number in range(8)])
    made = run_in_process(
        "pretrain", "--data", work / "D", "--labels", "1", "--cases", "4", "--out", work / "base", *TINY, "--json"
    )
    assert made.code == 0, made.err
    (work / "pretrain.json").write_text(made.out)
    made = run_in_process(
        *("adapt", "--base", work / "base", "--data", work / "D", "--labels", "2", "--shots", "3"),
        *("--rank", "2", "--epochs", "2", "--device", "cpu", "--out", work / "run", "--json"),
    )
    assert made.code == 0, made.err
    (work / "adapt.json").write_text(made.out)
    return work


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """A cohort of its own for a test that spoils it."""
    return write_cohort(tmp_path / "D", ["p0", "p1", "p2"], seed=40)


def files_below(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """refused(*arguments, says=[…]): the command ends with code 2, one sentence, and leaves no trace."""

    def check(*arguments: object, says: Sequence[object] = ()) -> str:
        before = files_below(tmp_path)
        outcome = run_in_process(*arguments)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        assert outcome.err.startswith("segraft: ")
        assert outcome.err.endswith(".\n") or outcome.err.endswith("?\n")
        assert outcome.err.count("\n") == 1, outcome.err
        assert "Traceback" not in outcome.err
        for word in says:
            assert str(word) in outcome.err
        assert files_below(tmp_path) == before
        return outcome.err

    return check
