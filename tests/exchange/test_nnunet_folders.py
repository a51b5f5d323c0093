"""What of nnU-Net's folders can be opened, what is said about it, and what is refused."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segraft.data.channels import load_channels
from segraft.errors import SegraftError
from segraft.exchange.nnunet import labels_of, open_nnunet
from segraft.exchange.opening import open_base
from segraft.inference import sliding_scores
from segraft.jobs import adapt
from segraft.jobs.base_source import BaseSource
from segraft.networks import build


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "model"))


def change(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a dotted one within its configuration."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        (content["configurations"]["3d_fullres"] if key in ONE else content)[key] = value
    path.write_text(json.dumps(content))


ONE = {"previous_stage", "preprocessor_name", "normalization_schemes", "architecture", "resampling_fn_data"}
SYNTHETIC = pytest.mark.parametrize("made", ["Abdomens 3d_fullres"], indirect=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"previous_stage": "3d_lowres"}, "is the second stage of a cascade"),
        ({"image_reader_writer": "NaturalImage2DIO"}, "is for images that NaturalImage2DIO reads"),
        ({"label_manager": "Mine"}, "name Mine as their label_manager"),
        ({"preprocessor_name": "Mine"}, "name Mine as their preprocessor_name"),
        ({"normalization_schemes": ["Mine"]}, "cannot be followed"),
        ({"resampling_fn_data": "system"}, "cannot be followed"),
        ({"transpose_forward": None}, "cannot be followed"),
        ({"architecture": {}}, "cannot be followed .KeyError: 'arch_kwargs'"),
    ],
)
@SYNTHETIC
def test_plans_that_are_not_followed_are_refused(copy, changes, message):
    change(copy / "plans.json", **changes)
    with pytest.raises(SegraftError, match=message):
        open_nnunet(copy, None)


@SYNTHETIC
def test_a_folder_that_is_none_or_lacks_a_part_is_told(copy, tmp_path):
    with pytest.raises(SegraftError, match=r"dataset.json does not exist: give the folder of one configuration"):
        open_nnunet(tmp_path, None)
    with pytest.raises(SegraftError, match=r"give .*model with --fold 0"):
        open_nnunet(copy / "fold_0", None)
    with pytest.raises(SegraftError, match="has no trained fold 3: choose one of 0 with --fold"):
        open_nnunet(copy, "3")
    (copy / "plans.json").write_text("{")
    with pytest.raises(SegraftError, match=r"plans.json cannot be read"):
        open_nnunet(copy, None)
    shutil.rmtree(copy / "fold_0")
    (copy / "plans.json").write_text("{}")
    with pytest.raises(SegraftError, match=r"has no fold_0/checkpoint_final.pth"):
        open_nnunet(copy, None)


@SYNTHETIC
def test_folds_and_checkpoints_are_chosen_and_the_choice_is_told(copy):
    assert open_nnunet(copy, None).notes == ()
    (copy / "fold_0" / "checkpoint_final.pth").unlink()
    (note,) = open_nnunet(copy, None).notes
    assert "checkpoint_best.pth is taken" in note
    shutil.copytree(copy / "fold_0", copy / "fold_all")
    opened = open_base(f"nnunet:{copy}", fold="all")
    assert opened.weights == copy / "fold_all" / "checkpoint_best.pth"
    assert "of the trained folds 0, all fold all is taken" in opened.notes[0]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@SYNTHETIC
def test_no_code_of_a_checkpoint_runs(copy, tmp_path):
    path = copy / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    torch.save({**content, "logging": Bomb(tmp_path / "ran")}, path)
    with pytest.raises(SegraftError, match="holds pickled objects besides tensors"):
        open_nnunet(copy, None)
    assert not (tmp_path / "ran").exists()
    torch.save(content["network_weights"], path)
    with pytest.raises(SegraftError, match=r"is no checkpoint of nnU-Net v2, as it lacks init_args"):
        open_nnunet(copy, None)


@pytest.mark.parametrize(
    ("architecture", "classes", "message"),
    [
        ("os.system", {}, "plans name the class 'os.system', and only those of torch.nn and dynamic"),
        ("torch.nn.Conv3d", {}, "plans name the class 'torch.nn.Conv3d'"),
        ("dynamic_network_architectures.architectures.unet.torch", {}, "is no class of a network or layer"),
        ("PlainConvUNet", {"conv_op": "torch.nnx.Conv3d"}, "'torch.nnx.Conv3d'"),
        ("PlainConvUNet", {"conv_op": "torch.nn.functional.conv3d"}, "is no class of a network or layer"),
    ],
)
def test_plans_name_no_other_code(architecture, classes, message):
    if "." not in architecture:
        architecture = f"dynamic_network_architectures.architectures.unet.{architecture}"
    arguments = {"architecture": architecture, "settings": {}, "classes": classes}
    with pytest.raises(SegraftError, match=message):
        build("nnunet", in_channels=1, out_channels=1, arguments=arguments)


@pytest.mark.parametrize(
    ("dataset", "labels", "regions", "background"),
    [
        ({"labels": {"background": 0, "b": 2, "a": 1, "ignore": 3}}, {1: "a", 2: "b"}, {}, True),
        ({"labels": {"background": 0, "a": [1]}}, {1: "a"}, {}, True),
        (
            {"labels": {"background": 0, "all": [1, 2, 3], "core": 3}, "regions_class_order": [1, 3]},
            {1: "all", 3: "core"},
            {1: (1, 2, 3), 3: (3,)},
            False,
        ),
    ],
)
def test_outputs_are_in_nnunets_order(dataset, labels, regions, background):
    found, first = labels_of(dataset)
    assert (dict(found), found.regions, first) == (labels, regions, background)
    assert list(found) == list(labels)


@SYNTHETIC
def test_only_patch_and_overlap_may_be_chosen(made, tmp_path):
    with pytest.raises(SegraftError, match="spacing cannot be chosen, as another tool prepared the scans"):
        adapt(made.base, _listed(made, tmp_path), tmp_path / "run", preparation={"spacing": (1, 1, 1)})
    assert not (tmp_path / "run").exists()


@SYNTHETIC
def test_a_package_that_is_not_there_is_told(made, monkeypatch):
    opened = open_base(made.base)
    arguments = {key: value for key, value in opened.arguments.items() if key != "in_channels"}
    (files, *_) = made.scans()
    scan = load_channels([files[0]], who="the scan")
    for module, run in {
        "nnunetv2.utilities.plans_handling.plans_handler": lambda: open_base(made.base),
        "nnunetv2.preprocessing.cropping.cropping": lambda: opened.preparation.prepare(scan),
        "nnunetv2.inference.sliding_window_prediction": lambda: sliding_scores(
            torch.nn.Identity(), torch.zeros(1, 4, 4, 4), (4, 4, 4), windows="even"
        ),
    }.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SegraftError, match=r"package .*is not there .*pip install 'segraft\[nnunet\]'"):
            run()
    for name in [name for name in sys.modules if name.startswith("dynamic_network_architectures")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures", None)
    with pytest.raises(
        SegraftError, match=r"need the package dynamic_network_architectures: pip install 'segraft\[nnunet\]'"
    ):
        build("nnunet", in_channels=1, out_channels=1, arguments=arguments)


@SYNTHETIC
def test_weights_beside_a_folder_are_refused(made, tmp_path):
    with pytest.raises(SegraftError, match="has its own weights: leave --weights out"):
        adapt(BaseSource(made.base, "weights.pt"), _listed(made, tmp_path), tmp_path / "run")


@pytest.mark.parametrize("made", ["Brains 2d"], indirect=True)
def test_cohorts_of_other_channels_are_refused(made, tmp_path):
    content = json.loads((made.data / "dataset.json").read_text())
    for place, name in enumerate(("FLAIR", "T1")):
        content["channel_names"][str(place)] = name
    listed = made.data / "turned.json"
    listed.write_text(json.dumps(content))
    with pytest.raises(SegraftError, match="was trained on the channels T1, FLAIR"):
        adapt(made.base, listed, tmp_path / "run")


def _listed(made, tmp_path: Path) -> Path:
    """The data set without the voxels that do not count."""
    import nibabel as nib

    folder = Path(shutil.copytree(made.data, tmp_path / "data"))
    for path in (folder / "labelsTr").iterdir():
        image = nib.load(path)
        data = np.asarray(image.dataobj).copy()
        data[data == 3] = 0
        nib.save(nib.Nifti1Image(data, image.affine), path)
    content = json.loads((folder / "dataset.json").read_text())
    del content["labels"]["ignore"]
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder
