"""docs/heads-and-inputs.md as a user follows it: every command, in order, in one folder."""

import json
import re
import runpy
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from typer.testing import CliRunner

from segraft.adapters import read_header
from segraft.cli import app
from segraft.data.preparation import Preparation
from segraft.networks import build, save_base

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "heads-and-inputs.md"
commands = runpy.run_path(str(HERE / "pages.py"))["commands"]
SIZE = (16, 16, 16)


def write_cohort(folder: str, channels: tuple[str, ...]) -> None:
    """Three cases with two labels."""
    rng, entries = np.random.default_rng(0), []
    Path(folder).mkdir()
    for case in ("p0", "p1", "p2"):
        where = np.linalg.norm(np.moveaxis(np.indices(SIZE), 0, -1) - rng.integers(6, 10, 3), axis=-1)
        label = (where < 5).astype(np.uint8) + (where < 3)
        nib.save(nib.Nifti1Image(label.astype(np.uint8), np.eye(4)), f"{folder}/{case}_label.nii.gz")
        for name in channels:
            image = (rng.normal(100, 10, SIZE) + 100 * label).astype(np.float32)
            nib.save(nib.Nifti1Image(image, np.eye(4)), f"{folder}/{case}_{name}.nii.gz")
        files = {name: f"{case}_{name}.nii.gz" for name in channels}
        entries.append({"image": files if len(files) > 1 else files[channels[0]], "label": f"{case}_label.nii.gz"})
    modality = {str(place): name for place, name in enumerate(channels)}
    listing = {"name": folder, "modality": modality, "labels": {"1": "rim", "2": "core"}, "training": entries}
    Path(folder, "dataset.json").write_text(json.dumps(listing))


def write_what_the_page_names() -> None:
    for folder, channels in (("D", ("FLAIR",)), ("two", ("T1", "FLAIR")), ("t1", ("T1",)), ("petct", ("CT", "PET"))):
        write_cohort(folder, channels)
    arguments = {"widths": [4, 8]}
    net = build("unet3d", in_channels=1, out_channels=1, arguments=arguments)
    preparation = Preparation(patch=SIZE).model_dump(mode="json")
    record = {"labels": {"1": "core"}, "channels": ["FLAIR"], "preparation": preparation}
    channels = {"in_channels": 1, "out_channels": 1}
    save_base(net, "base", network="unet3d", arguments=arguments | channels, record=record)
    torch.save(net.state_dict(), "weights.pt")
    Path("scan.nii.gz").write_bytes(Path("D/p0_FLAIR.nii.gz").read_bytes())
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    Path("mine").mkdir()
    Path("mine/nets.py").write_text(code)
    own = build("mine.nets:Net", in_channels=1, out_channels=1, arguments={"width": 4})
    torch.save(own.state_dict(), "net.pt")


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_what_the_page_names()
    for command in commands(PAGE):
        program, *arguments = shlex.split(command)
        assert program == "segraft"
        short = ("--epochs", "1", "--device", "cpu") if arguments[0] == "adapt" else ()
        result = CliRunner().invoke(app, [*arguments, *short])
        assert result.exit_code == 0, (command, result.output, result.exception)
    expected = {
        "more": {"outputs": [0, None]},
        "fewer": {},
        "other": {"outputs": [None]},
        "renamed": {},
        "t1_flair": {"inputs": {"channels": [None, 0], "start": "zero"}},
        "t1": {"inputs": {"channels": [None], "start": "share"}},
        "pet_ct": {"inputs": {"channels": [0, None], "start": "zero"}},
        "parts": {"outputs": [0, None]},
        "probe": {"outputs": [0, None]},
        "layers": {"outputs": [0, None]},
        "mine_run": {"outputs": [0, None]},
        "mine_body": {},
    }
    for run, surgery in expected.items():
        described = read_header(Path(run) / "adapter.safetensors").record["base"]
        assert {name: described[name] for name in ("outputs", "inputs") if name in described} == surgery, run
    assert Path("mask.nii.gz").is_file()
    assert Path("mine.nii.gz").is_file()
