"""docs/monai.md as a user follows it: every command and every block of Python, in order, in one folder."""

import json
import re
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tests.docs.pages import commands
from tests.exchange.bundles import CT, SEGRESNET, UNET, network_of, write_bundle, write_scan
from typer.testing import CliRunner

from segraft.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "monai.md"

pytestmark = [
    pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning"),  # MONAI's, of its default reader
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),  # that configurations are run: ours
]


def write_what_the_page_names() -> None:
    """A bundle, a cohort, scans and a checkpoint, small."""
    write_bundle(Path("bundles/spleen_ct_segmentation"), UNET, ("background", "spleen"), transforms=CT)
    for folder in ("data", "scans", "my"):
        Path(folder).mkdir()
    listed = []
    for seed in range(2):
        image = write_scan(Path(f"data/case{seed}.nii.gz"), seed=seed)
        scan = nib.load(image)
        label = (scan.get_fdata() > 40).astype(np.uint8) + (scan.get_fdata() > 150).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, scan.affine), f"data/label{seed}.nii.gz")
        listed.append({"image": f"./case{seed}.nii.gz", "label": f"./label{seed}.nii.gz"})
    labels = {"0": "background", "1": "spleen", "2": "tumour"}
    listing = {"name": "toy", "modality": {"0": "CT"}, "labels": labels, "training": listed}
    Path("data/dataset.json").write_text(json.dumps(listing))
    write_scan(Path("scans/scan.nii.gz"), seed=7)
    torch.save(network_of(SEGRESNET | {"out_channels": 2}).state_dict(), "my/model.pt")


def test_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_what_the_page_names()
    python = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(python) == 2
    for command in commands(PAGE):
        program, *arguments = shlex.split(re.sub(r"--epochs \d+", "--epochs 1 --device cpu", command))
        assert program == "segraft"
        ran = CliRunner().invoke(app, arguments)
        assert ran.exit_code == 0, (command, ran.output, ran.exception)
    for code in python:
        exec(compile(code, "monai.md", "exec"), {})  # noqa: S102  our own page
    ours, theirs = (nib.load(path) for path in ("masks_adapted/scan.nii.gz", "masks_by_monai/scan_mask.nii.gz"))
    assert np.array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
    assert len(np.unique(nib.load("masks/scan.nii.gz").dataobj)) == 2
    assert Path("task.safetensors").is_file()
    assert Path("run_own/adapter.safetensors").is_file()
