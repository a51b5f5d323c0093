"""The commands and the code of docs/onnx.md run as they stand."""

import runpy
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
from typer.testing import CliRunner

from segraft.cli import app
from segraft.jobs import predict

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "onnx.md"
commands = runpy.run_path(str(HERE / "pages.py"))["commands"]
tiny = runpy.run_path(str(HERE / "tiny_adapter.py"))


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny["tiny_adapter"](tmp_path)
    install, export = commands(PAGE)
    assert install == "pip install 'segraft[onnx]'"
    result = CliRunner().invoke(app, shlex.split(export)[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output

    names: dict[str, object] = {}
    for block in tiny["python_blocks"](PAGE):
        exec(compile(block, "onnx.md", "exec"), names)  # noqa: S102  our own page
    predict("run", ["scan.nii.gz"], "mask.nii.gz", device="cpu")
    expected = np.asarray(nib.load("mask.nii.gz").dataobj)
    assert names["mask"].shape == expected.shape
    assert np.unique(expected).size > 1
    assert (names["mask"] != expected).mean() < 1e-3
