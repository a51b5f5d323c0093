"""The commands and the code of docs/onnx.md run as they stand."""

import runpy
import shlex
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from segraft.adapters import AdapterSpec
from segraft.cli import app
from segraft.jobs import adapt, predict
from segraft.training.settings import TrainingSettings

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "onnx.md"
commands = runpy.run_path(str(HERE / "pages.py"))["commands"]
tiny = runpy.run_path(str(HERE / "tiny_adapter.py"))


SETTINGS = {
    "usual": {},
    "logits, as of MONAI's bundles": {"average": "logit", "weights": "constant", "overlap": 0.25},
    "regions": {"regions": {2: (1, 2), 1: (1,)}},
    "another grid": {"spacing": (1.0, 1.0, 1.0), "average": "logit"},
}


def run_page() -> dict[str, object]:
    install, export = commands(PAGE)
    assert install == "pip install 'segraft[onnx]'"
    result = CliRunner().invoke(app, shlex.split(export)[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    names: dict[str, object] = {}
    for block in tiny["python_blocks"](PAGE):
        exec(compile(block, "onnx.md", "exec"), names)  # noqa: S102  our own page
    return names


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_page(tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    tiny["tiny_adapter"](tmp_path, **SETTINGS[settings])
    names = run_page()
    predict("run", ["scan.nii.gz"], "mask.nii.gz", device="cpu")
    expected = np.asarray(nib.load("mask.nii.gz").dataobj)
    assert names["mask"].shape == expected.shape
    assert np.unique(expected).size > 1
    assert (names["mask"] != expected).mean() < 1e-3


def test_the_way_of_averaging_shows(tmp_path, monkeypatch):
    """Else the test above would not tell whether the page follows it."""
    masks = []
    for settings in ("usual", "logits, as of MONAI's bundles"):
        (tmp_path / settings).mkdir()
        monkeypatch.chdir(tmp_path / settings)
        tiny["tiny_adapter"](tmp_path / settings, **SETTINGS[settings])
        predict("run", ["scan.nii.gz"], "mask.nii.gz", device="cpu")
        masks.append(np.asarray(nib.load("mask.nii.gz").dataobj))
    assert (masks[0] != masks[1]).mean() > 5e-3


@pytest.mark.data
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_the_page_with_a_network_of_nnunet(nnunet_folder, tmp_path, monkeypatch, configuration):
    """Which averages bare logits, over windows of its own, and mirrors patches."""
    monkeypatch.chdir(tmp_path)
    (base,) = nnunet_folder.glob(f"results/*_Hippocampus/*__{configuration}")
    data = nnunet_folder / "raw" / base.parent.name
    settings = TrainingSettings(epochs=1, volumes=1, patches=1, learning_rate=1e-2)
    adapt(f"nnunet:{base}", data, tmp_path / "run", spec=AdapterSpec("lora_c", rank=2), settings=settings)
    (scan, *_) = sorted((data / "imagesTs").glob("*_0000.nii.gz"))
    shutil.copy(scan, tmp_path / "scan.nii.gz")
    names = run_page()
    predict("run", ["scan.nii.gz"], "mask.nii.gz", device="cpu")
    expected = np.asarray(nib.load("mask.nii.gz").dataobj)
    assert np.unique(expected).size > 1
    assert (names["mask"] != expected).mean() < 1e-3
