"""MONAI bundles as bases: opened as data, segmenting as MONAI does with them, and adapted."""

import json
import shutil
import sys
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from tests.exchange.bundles import (
    CT,
    PAINTED,
    SEGRESNET,
    SIGMOID,
    SOFTMAX,
    UNET,
    dice,
    monai_item,
    monai_mask,
    network_of,
    write_bundle,
    write_scan,
)

from segraft.data.preparation import Window, ZScore, prepare_image
from segraft.errors import SegraftError
from segraft.exchange.opening import open_base
from segraft.inference import label_map, sliding_scores
from segraft.jobs import load_model
from segraft.networks.heads import find_head

pytestmark = [
    pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning"),  # MONAI's, of its default reader
    pytest.mark.filterwarnings("ignore:.*Orientationd.__init__.labels:FutureWarning"),  # of a default, changed since
]

SPLEEN = ("background", "spleen")
ORGANS = ("background", "liver", "spleen")
UNRESAMPLED = [each for each in CT if each["_target_"] != "Spacingd"]
TUMOUR = ("Tumor core", "Whole tumor", "Enhancing tumor")
MR = ("T1c", "T1", "T2", "FLAIR")
NORMAL = {"_target_": "NormalizeIntensityd", "nonzero": True, "channel_wise": True}
BRATS = {
    "transforms": [CT[0], NORMAL],
    "post": [*SIGMOID, {"_target_": "Lambdad", "keys": "pred", "func": PAINTED}],
    "inputs": MR,
}
"""As of the bundle for brain tumours."""

SWIN = {"_target_": "SwinUNETR", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "feature_size": 12}


def equal_weights(patch=(32, 32, 32)):
    return {"inferer": {"_target_": "SlidingWindowInferer", "roi_size": list(patch), "overlap": 0.25}}


@pytest.mark.parametrize(
    ("network", "outputs", "arguments"),
    [
        (UNET, SPLEEN, {}),  # resampled there and back
        (UNET, SPLEEN, {"more": equal_weights()}),
        (UNET | {"num_res_units": 0, "out_channels": 3}, ORGANS, {"transforms": UNRESAMPLED}),
        (SEGRESNET, ORGANS, {"transforms": UNRESAMPLED, "more": equal_weights()}),
        (SEGRESNET | {"out_channels": 1}, ("spleen",), {"post": SIGMOID}),
        (SEGRESNET, ORGANS, {"transforms": [*UNRESAMPLED[:3], NORMAL]}),
    ],
)
def test_segments_as_monai_does(network, outputs, arguments, tmp_path):
    """The same voxels: softmax against differences to the background, logits averaged, and the way there and back."""
    bundle = write_bundle(tmp_path / "bundle", network, outputs, **arguments)
    scan = write_scan(tmp_path / "scan.nii.gz")
    theirs, model = monai_mask(bundle, scan), load_model(f"monai:{bundle}")
    ours = model.segment(scan).mask
    assert set(np.unique(theirs)) == {0, *model.labels} or len(model.labels) > 1
    assert len(np.unique(theirs)) > 1
    assert (ours != theirs).sum() == 0


def test_masks_of_several_labels_differ_by_interpolation_alone(tmp_path):
    """MONAI interpolates the softmax, Segraft each label against the background; before that, all is the same."""
    bundle = write_bundle(tmp_path / "bundle", SEGRESNET, ORGANS)
    scan = write_scan(tmp_path / "scan.nii.gz")
    model = load_model(f"monai:{bundle}")
    item, _ = monai_item(bundle, scan)
    image = prepare_image(scan, model.preparation).as_tensor()
    found = sliding_scores(model.net, image, (32, 32, 32), average="logit")
    assert torch.equal(label_map(found, (1, 2)), item["pred"].argmax(0).as_tensor())
    theirs, ours = monai_mask(bundle, scan), model.segment(scan).mask
    assert min(dice(ours, theirs, value) for value in (0, 1, 2) if (theirs == value).sum() > 500) > 0.98


@pytest.mark.filterwarnings("ignore:inverse has been called but no invertible:UserWarning")  # as of MONAI's own bundle
def test_regions_of_several_channels(tmp_path):
    """Four channels, z-scores of what is not zero, sigmoids, and masks painted in the order of the bundle's lambda."""
    network = SEGRESNET | {"in_channels": 4}
    bundle = write_bundle(tmp_path / "bundle", network, TUMOUR, **BRATS)
    files = [write_scan(tmp_path / f"case_000{place}.nii.gz", seed=place) for place in range(4)]
    model = load_model(f"monai:{bundle}")
    assert model.channels == MR
    assert dict(model.labels) == {1: "Tumor core", 2: "Whole tumor", 4: "Enhancing tumor"}
    assert model.labels.regions == {2: (2, 1, 4), 1: (1, 4), 4: (4,)}
    assert model.preparation.intensity == ZScore(nonzero=True)
    assert model.preparation.orientation == "own"
    ours, theirs = model.segment(model.case("case", files)).mask, monai_mask(bundle, files)
    assert len(np.unique(theirs)) > 2
    assert np.array_equal(ours, theirs)


def test_slices(tmp_path):
    """A network of two dimensions, slid over the slices of the last axis."""
    inferer = {"_target_": "SliceInferer", "roi_size": [16, 32], "spatial_dim": 2, "overlap": 0.5, "mode": "gaussian"}
    bundle = write_bundle(
        tmp_path / "b", UNET | {"spatial_dims": 2}, SPLEEN, transforms=UNRESAMPLED, more={"inferer": inferer}
    )
    scan = write_scan(tmp_path / "scan.nii.gz")
    model = load_model(f"monai:{bundle}")
    assert model.preparation.patch == (16, 32, 1)
    assert np.array_equal(model.segment(scan).mask, monai_mask(bundle, scan))


def test_swin_unetr_computes_as_it_was_trained(tmp_path):
    """Its bundle gives img_size, which MONAI no longer takes, and was made before MONAI joined tokens otherwise."""
    bundle = write_bundle(tmp_path / "old", SWIN, ORGANS, metadata={"monai_version": "1.4.0"})
    opened = open_base(f"monai:{with_argument(bundle, 'img_size', 96)}")
    assert opened.network == "segraft.networks.swin:OriginalSwinUNETR"
    assert "img_size" not in opened.arguments
    assert any("img_size of SwinUNETR is left out" in note for note in opened.notes)
    assert any("before 1.5" in note for note in opened.notes)
    new = open_base(f"monai:{write_bundle(tmp_path / 'new', SWIN, ORGANS)}")
    assert new.network == "monai.networks.nets:SwinUNETR"


def with_argument(bundle, name, value):
    path = bundle / "configs" / "inference.json"
    content = json.loads(path.read_text())
    content["network_def"][name] = value
    path.write_text(json.dumps(content))
    return bundle


def test_what_is_opened(tmp_path):
    opened = open_base(f"monai:{write_bundle(tmp_path / 'b', SEGRESNET, ORGANS, more=equal_weights((32, 40, 48)))}")
    assert opened.network == "monai.networks.nets:SegResNet"
    assert dict(opened.labels) == {1: "liver", 2: "spleen"}
    assert opened.background
    assert opened.outputs == ORGANS
    assert opened.channels == ("",)
    assert opened.preparation is not None
    assert opened.preparation.intensity == Window(low=-57, high=164)
    assert (opened.preparation.patch, opened.preparation.overlap) == ((32, 40, 48), 0.25)
    assert (opened.preparation.average, opened.preparation.weights) == ("logit", "constant")


def test_references_and_conditions_are_followed(tmp_path):
    """As of the bundle for the whole body: values elsewhere in the file, and a choice between two resolutions."""
    more = {
        "displayable_configs": {"highres": False, "sw_overlap": 0.25},
        "image_key": "image",
        "pixdim": "$[1.5, 1.5, 1.5] if @displayable_configs#highres else [3.0, 3.0, 3.0]",
        "modelname": "$'model.pt' if @displayable_configs#highres else 'model_lowres.pt'",
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": [32, 32, 32],
            "overlap": "@displayable_configs#sw_overlap",
            "padding_mode": "replicate",
            "mode": "gaussian",
            "device": "$torch.device('cpu')",
        },
        "checkpointloader": {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/' + @modelname",
            "load_dict": {"model": "@network"},
        },
    }
    spacing = {"_target_": "Spacingd", "keys": "@image_key", "pixdim": "@pixdim", "mode": "bilinear"}
    bundle = write_bundle(
        tmp_path / "b",
        SEGRESNET,
        ORGANS,
        more=more,
        transforms=[{**each, "keys": "@image_key"} if each is not CT[3] else spacing for each in CT],
    )
    shutil.copy(bundle / "models" / "model.pt", bundle / "models" / "model_lowres.pt")
    opened = open_base(f"monai:{bundle}")
    assert opened.preparation is not None
    assert opened.preparation.spacing == (3.0, 3.0, 3.0)
    assert opened.preparation.overlap == 0.25
    assert opened.weights.name == "model_lowres.pt"
    assert any("filled up with zeros" in note for note in opened.notes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"transforms": [*CT[:4], NORMAL, {"_target_": "ScaleIntensityd", "minv": -1.0}]}, "ScaleIntensityd"),
        ({"transforms": [CT[0], {"_target_": "Resized", "spatial_size": [9, 9, 9]}, CT[4]]}, "Resized"),
        ({"transforms": [CT[0], {**CT[3], "pixdim": "$numpy.ones(3)"}, CT[4]]}, "expressions of bundles are not run"),
        ({"more": {"inferer": {"_target_": "SimpleInferer"}}}, "SimpleInferer"),
        ({"more": {"inferer": {"_target_": "SlidingWindowInferer", "roi_size": [-1, 9, 9]}}}, "roi_size"),
    ],
)
def test_what_cannot_be_prepared_alike_is_told(changes, told, tmp_path):
    bundle = write_bundle(tmp_path / "b", SEGRESNET, ORGANS, **changes)
    opened = open_base(f"monai:{bundle}")
    assert opened.preparation is None
    assert any(told in note for note in opened.notes)
    with pytest.raises(SegraftError, match="cannot segment as it is, but can be adapted") as refused:
        load_model(f"monai:{bundle}")
    assert told in str(refused.value)
    assert "segraft import" not in str(refused.value)  # which opens no bundles


@pytest.mark.parametrize(
    ("network", "outputs", "changes", "told"),
    [
        (SEGRESNET, ORGANS, {"post": SIGMOID}, "each output off by itself"),
        (SEGRESNET, ORGANS, {"post": [*SIGMOID[:1], *SOFTMAX]}, "softmax and sigmoid"),
        (SEGRESNET | {"out_channels": 1}, ("spleen",), {}, "has one: is it a sigmoid"),
        (SEGRESNET, ORGANS, {"more": {"network_def": "$torch.nn.Identity()"}}, "computes its network"),
        (SEGRESNET, ORGANS, {"more": {"network_def": None, "network": None}}, "has none of network_def"),
        (
            SEGRESNET,
            ORGANS,
            {"more": {"network_def": SEGRESNET | {"act": {"_target_": "torch.nn.ReLU"}}}},
            "builds the argument act",
        ),
        (SEGRESNET, ORGANS, {"more": {"network_def": {"_target_": "SegResNet"}}}, "in_channels|out_channels"),
        (SEGRESNET, ORGANS, {"more": {"network_def": SEGRESNET | {"_target_": "os.system"}}}, "--trust os"),
        (
            SEGRESNET,
            ORGANS,
            {"more": {"network_def": SEGRESNET | {"_target_": "scripts.nets.Mine"}}},
            "--trust scripts",
        ),
        (SEGRESNET, ORGANS, {"more": {"network_def": SEGRESNET | {"init_filters": "$2 ** 3"}}}, "expressions of"),
    ],
)
def test_what_cannot_be_opened_is_refused(network, outputs, changes, told, tmp_path):
    bundle = write_bundle(tmp_path / "b", network, outputs, **changes)
    with pytest.raises(SegraftError, match=told):
        open_base(f"monai:{bundle}")


def test_folders_that_are_no_bundles(tmp_path):
    with pytest.raises(SegraftError, match="is no folder of a MONAI bundle"):
        open_base(f"monai:{tmp_path / 'nowhere'}")
    with pytest.raises(SegraftError, match=r"no configs/inference\.json"):
        open_base(f"monai:{tmp_path}")
    bundle = write_bundle(tmp_path / "b", SEGRESNET, ORGANS, weights=False)
    with pytest.raises(SegraftError, match=r"no models/model\.pt"):
        open_base(f"monai:{bundle}")
    (bundle / "models" / "model.ts").touch()
    with pytest.raises(SegraftError, match="TorchScript alone"):
        open_base(f"monai:{bundle}")
    with pytest.raises(SegraftError, match="no folds"):
        open_base(f"monai:{bundle}", fold="1")
    outside = tmp_path / "elsewhere.pt"
    torch.save({}, outside)
    loader = {"_target_": "CheckpointLoader", "load_path": str(outside)}
    with pytest.raises(SegraftError, match="outside of the bundle"):
        open_base(f"monai:{write_bundle(tmp_path / 'c', SEGRESNET, ORGANS, more={'checkpointloader': loader})}")


def test_yaml_and_old_metadata(tmp_path):
    """As of the older bundles: YAML, and channels that the metadata does not name."""
    bundle = write_bundle(tmp_path / "b", SEGRESNET, ORGANS, metadata={"network_data_format": {}})
    path = bundle / "configs" / "inference.json"
    path.with_suffix(".yaml").write_text(yaml.safe_dump(json.loads(path.read_text())))
    path.unlink()
    opened = open_base(f"monai:{bundle}")
    assert dict(opened.labels) == {1: "label 1", 2: "label 2"}
    assert any("does not name the outputs" in note for note in opened.notes)


def test_predict_tells_what_differs(tmp_path, capsys):
    from segraft.cli import main

    largest = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred"}
    bundle = write_bundle(tmp_path / "b", SEGRESNET, ORGANS, post=[*SOFTMAX, largest])
    scan = write_scan(tmp_path / "scan.nii.gz")
    arguments = [
        "segraft",
        "predict",
        f"monai:{bundle}",
        str(scan),
        "-o",
        str(tmp_path / "m.nii.gz"),
        "--device",
        "cpu",
    ]
    with mock.patch.object(sys, "argv", arguments), pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert "KeepLargestConnectedComponentd of its postprocessing is left out" in capsys.readouterr().err
    assert (tmp_path / "m.nii.gz").is_file()


def test_weights_are_read_as_data(tmp_path):
    bundle = write_bundle(tmp_path / "b", SEGRESNET, ORGANS, weights=False)
    torch.save({"model": network_of(SEGRESNET).state_dict()}, bundle / "models" / "model.pt")
    load_model(f"monai:{bundle}")  # in a checkpoint's container
    torch.save(network_of(SEGRESNET), bundle / "models" / "model.pt")
    with pytest.raises(SegraftError, match="could run code"):
        load_model(f"monai:{bundle}")


@pytest.mark.parametrize("network", [UNET | {"out_channels": 3}, SEGRESNET])
def test_labels_take_the_outputs_of_their_names(network, tmp_path):
    """Of two organs one is known: its output is the old one's, less the background's, whatever the network."""
    from segraft.data.cohort import Cohort
    from segraft.jobs.base_source import BaseSource

    bundle = write_bundle(tmp_path / "b", network, ORGANS)
    write_scan(tmp_path / "c.nii.gz")
    nib.save(
        nib.Nifti1Image(np.zeros((40, 36, 24), np.uint8), nib.load(tmp_path / "c.nii.gz").affine), tmp_path / "l.nii.gz"
    )
    listing = {
        "name": "toy",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "kidney", "2": "Spleen"},
        "training": [{"image": "./c.nii.gz", "label": "./l.nii.gz"}],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(listing))
    cohort = Cohort.read(tmp_path / "dataset.json")
    loaded = BaseSource(f"monai:{bundle}").load(cohort.select_labels(()), cohort)
    assert loaded.new == {0}
    image = torch.rand(1, 1, 16, 16, 16)
    theirs, ours = network_of(network)(image), loaded.net.eval()(image)
    torch.testing.assert_close(ours[:, 1], theirs[:, 2] - theirs[:, 0], rtol=1e-4, atol=1e-4)
    head = find_head(loaded.net)
    assert head is not None
    assert head.outputs == 2
