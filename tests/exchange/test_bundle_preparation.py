"""MONAI's transforms and preparations say the same of a scan, or it is said why not."""

import math

import numpy as np
import pytest
import torch
from monai.transforms import Compose
from tests.exchange.bundles import CT, WINDOW, write_scan

from segraft.data.preparation import Percentiles, Preparation, Window, ZScore, prepare_image
from segraft.errors import SegraftError
from segraft.exchange.bundle_preparation import Unlike, read_transforms, write_transforms

pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")  # MONAI's, of its default reader

LOAD, RAS = CT[0], CT[2]
SCALE = {**WINDOW, "clip": True}
NORMAL = {"_target_": "NormalizeIntensityd", "nonzero": True, "channel_wise": True}
CROP = {"_target_": "CropForegroundd", "source_key": "image"}


@pytest.mark.parametrize(
    ("transforms", "fields"),
    [
        (CT, {"orientation": "RAS", "spacing": (1.5, 1.5, 2.0), "intensity": Window(low=-57, high=164)}),
        ([LOAD, NORMAL], {"orientation": "own", "intensity": ZScore(nonzero=True)}),
        ([LOAD, {"_target_": "NormalizeIntensityd"}], {"orientation": "own", "intensity": ZScore()}),
        (
            [LOAD, RAS, {"_target_": "monai.transforms.Spacingd", "pixdim": 2}, SCALE, CROP],
            {
                "orientation": "RAS",
                "spacing": (2.0, 2.0, 2.0),
                "intensity": Window(low=-57, high=164),
                "crop_foreground": True,
            },
        ),
        (
            [
                {"_target_": "ScaleIntensityRangePercentilesd", "lower": 1, "upper": 99, "b_min": 0, "b_max": 1}
                | {"clip": True}
            ],
            {"orientation": "own", "intensity": Percentiles(lower=1, upper=99)},
        ),
        ([{**RAS, "axcodes": ["R", "A", "S"]}, SCALE], {"orientation": "RAS", "intensity": Window(low=-57, high=164)}),
        ([{"_target_": "ScaleIntensityd"}], {"orientation": "own", "intensity": Percentiles(lower=0, upper=100)}),
        (
            [RAS, SCALE, {"_target_": "Lambdad", "keys": "label"}, {"_target_": "Flipd", "_disabled_": True}],
            {"orientation": "RAS", "intensity": Window(low=-57, high=164)},
        ),
    ],
)
def test_read(transforms, fields):
    assert read_transforms(transforms, 1, "image") == fields


@pytest.mark.parametrize(
    ("transforms", "channels", "told"),
    [
        ([*CT, {"_target_": "ScaleIntensityd", "minv": -1.0}], 1, "ScaleIntensityd: minv is -1.0"),
        ([LOAD, NORMAL, {"_target_": "ScaleIntensityd"}], 1, "ScaleIntensityd: it comes twice"),
        ([LOAD, {"_target_": "NormalizeIntensityd"}], 4, "channel_wise is not given"),
        ([LOAD, {**NORMAL, "subtrahend": 3.0}], 1, "subtrahend is 3.0"),
        ([LOAD, WINDOW], 1, "clip is not given"),
        ([LOAD, {**SCALE, "b_min": -1}], 1, "b_min is -1"),
        ([LOAD, {**SCALE, "a_min": 900}], 1, r"low \(900\) must be below"),
        ([LOAD, SCALE, RAS], 1, "Orientationd: it comes after the intensity"),
        ([LOAD, CROP, SCALE], 1, "CropForegroundd: it comes before the intensity"),
        ([LOAD, SCALE, {**CROP, "margin": 5}], 1, "margin is 5"),
        ([{**CT[3], "pixdim": [-1, 1, 1]}], 1, "pixdim is"),
        ([{**CT[3], "mode": "nearest"}], 1, "mode is nearest"),
        ([CT[3], RAS, SCALE], 1, "Orientationd: it comes after the spacing"),
        ([{**CT[3], "pixdim": 1.5}, RAS, SCALE], 1, "Orientationd: it comes after the spacing"),
        ([{**CT[3], "pixdim": [1, 1, math.nan]}, SCALE], 1, "pixdim is"),
        ([{**CT[3], "pixdim": ["a", 1, 1]}, SCALE], 1, "pixdim is"),
        ([LOAD, SCALE, {**CROP, "source_key": "label"}], 1, "source_key is label"),
        ([LOAD, SCALE, {"_target_": "CropForegroundd"}], 1, "source_key is not given"),
        ([{**LOAD, "keys": 5}, SCALE], 1, "LoadImaged: keys is 5"),
        ([LOAD, SCALE, {"_target_": "Resized"}], 1, "Resized"),
        ([LOAD, {"_target_": "ConcatItemsd"}, SCALE], 1, "ConcatItemsd"),
        ([LOAD, RAS], 1, "intensities are left as they are"),
    ],
)
def test_what_has_no_counterpart_is_named(transforms, channels, told):
    with pytest.raises(Unlike, match=told):
        read_transforms(transforms, channels, "image")


@pytest.mark.parametrize(
    "preparation",
    [
        Preparation(spacing=(1.5, 1.5, 2.0), intensity=Window(low=-57, high=164)),
        Preparation(orientation="LPI", intensity=Percentiles(lower=2, upper=90), crop_foreground=True),
        Preparation(orientation="own", intensity=ZScore(nonzero=True)),
        Preparation(spacing=(2.0, 2.0, 2.0), intensity=ZScore(), crop_foreground=True),
    ],
)
def test_written_transforms_prepare_alike(preparation, tmp_path):
    """Run by MONAI they give the voxels and places that Segraft's preparation gives, and are read back as it is."""
    scan = write_scan(tmp_path / "scan.nii.gz")
    transforms = write_transforms(preparation, 1)
    item = parsed(transforms)({"image": str(scan)})
    ours = prepare_image(scan, preparation)
    torch.testing.assert_close(item["image"].as_tensor(), ours.as_tensor(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(item["image"].affine, ours.affine, atol=1e-4)
    assert Preparation(**read_transforms(transforms, 1, "image")) == preparation


def parsed(transforms) -> Compose:
    from monai.bundle import ConfigParser

    return ConfigParser({"c": {"_target_": "Compose", "transforms": transforms}}).get_parsed_content("c")


@pytest.mark.parametrize(
    ("preparation", "channels", "told"),
    [
        (Preparation(head=True), 1, "heads are levelled"),
        (Preparation(intensity=(ZScore(), Window(low=0, high=1))), 2, "settings of their own"),
    ],
)
def test_what_monai_has_no_transform_for_is_refused(preparation, channels, told):
    with pytest.raises(SegraftError, match=told):
        write_transforms(preparation, channels)
