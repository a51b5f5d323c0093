"""The commands of docs/dicom.md run as they stand, on small synthetic series."""

import json
import re
import runpy
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.cli.main import main as pydicom_command
from typer.testing import CliRunner

from segraft.cli import app
from segraft.data.cohort import Cohort
from segraft.data.dicom_seg_writing import Found, Origin, write_segmentation
from segraft.data.dicom_writing import write_series

PAGE = Path(__file__).resolve().parents[2] / "docs" / "dicom.md"
commands = runpy.run_path(str(Path(__file__).with_name("pages.py")))["commands"]
LABELS = {1: "liver", 2: "left kidney"}


def patient(folder: Path, seed: int) -> Path:
    """Two bright balls in noise: the series, and beside it what was drawn."""
    rng, shape = np.random.default_rng(seed), (16, 18, 12)
    voxels = np.indices(shape).transpose(1, 2, 3, 0)
    image, mask = rng.normal(0, 10, shape), np.zeros(shape, np.uint8)
    for value, centre in ((1, (5, 5, 5)), (2, (11, 12, 8))):
        mask[np.linalg.norm(voxels - centre, axis=-1) < 3] = value
    affine = np.diag([-0.8, -0.8, 2.5, 1.0])
    write_series(
        nib.Nifti1Image(np.rint(image + 100 * mask).astype(np.int16), affine), folder / "ct", patient=folder.name
    )
    origin = Origin("by hand", "0" * 64)
    write_segmentation(Found(LABELS, mask, {}), folder / "ct", folder / "seg.dcm", origin=origin)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with what the page speaks of."""
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```json\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    listing = json.loads(example)
    first, _ = listing["training"]
    names = [f"patient{number}" for number in range(1, 9)]
    for number, name in enumerate(names):
        patient(tmp_path / "data" / name, number)
    listing["training"] = [json.loads(json.dumps(first).replace("patient1", name)) for name in names]
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(listing))
    assert Cohort.read("data").cases[0].patient == "patient1"
    patient(tmp_path, 20)
    (tmp_path / "ct").rename("ct_series")
    for name in ("patient1", "patient2"):
        patient(tmp_path / "more" / name, 21)
        (tmp_path / "incoming").mkdir(exist_ok=True)
        (tmp_path / "more" / name / "ct").rename(tmp_path / "incoming" / name)
    arguments = ["--labels", "1", "--cases", "2", "--epochs", "1", "--network-args", '{"widths": [4, 8]}']
    run("pretrain", "--data", "data", *arguments, "--out", "base")
    return tmp_path


def run(*arguments: str) -> None:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, (arguments, result.output)


def test_commands(here, capsys):
    """Each once, but training before what is trained is used."""
    found = [shlex.split(re.sub(r"--epochs \d+", "--epochs 1", command), comments=True) for command in commands(PAGE)]
    assert sorted(word[1] for word in found) == ["adapt", "evaluate", "predict", "predict", "show"]
    for words in sorted(found, key=lambda each: each[1] not in {"adapt", "evaluate"}):
        if words[0] == "pydicom":
            pydicom_command(words[1:])
            assert "'liver'" in capsys.readouterr().out
        else:
            assert words[0] == "segraft"
            run(*words[1:])
    assert (here / "run" / "evaluation.csv").is_file()
    assert [file.name for file in sorted((here / "out").iterdir())] == ["patient1.dcm", "patient2.dcm"]
    seg = pydicom.dcmread(here / "result.dcm")
    assert [str(each.SegmentLabel) for each in seg.SegmentSequence] == ["liver", "left kidney"]
