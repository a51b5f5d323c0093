"""The commands of docs/nnunet.md run as they stand, for one epoch, on a model that nnU-Net made."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from segraft.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "nnunet.md"
commands = runpy.run_path(str(Path(__file__).with_name("pages.py")))["commands"]


@pytest.mark.data
@pytest.mark.usefixtures("real_data")
def test_the_page(nnunet_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ("raw", "results"):
        shutil.copytree(nnunet_folder / kind / "Dataset291_Hippocampus", f"nnUNet_{kind}/Dataset004_Hippocampus")
    programs = set()
    for command in commands(PAGE):
        program, *arguments = shlex.split(re.sub(r"--epochs \d+", "--epochs 1", command))
        programs.add(program)
        if program == "segraft":
            result = CliRunner().invoke(app, arguments, catch_exceptions=False)
            assert result.exit_code == 0, (command, result.output)
        else:
            script = Path(sys.executable).with_name(program)
            quick = ["-device", "cpu", "-npp", "1", "-nps", "1"]
            # On one core: it takes all, and threads that wait by spinning would hold up those of other tests.
            environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_def_n_proc": "1"}
            done = subprocess.run([script, *arguments, *quick], capture_output=True, text=True, env=environment)
            assert done.returncode == 0, (command, done.stderr)
    assert programs == {"segraft", "nnUNetv2_predict_from_modelfolder"}
    (ours,), (theirs,) = Path("adapted").glob("*.nii.gz"), Path("theirs").glob("*.nii.gz")
    mine, found = (np.asarray(nib.load(path).dataobj) for path in (ours, theirs))
    assert (mine != found).mean() < 0.005
    np.testing.assert_allclose(nib.load(ours).affine, nib.load(theirs).affine, atol=1e-4)
