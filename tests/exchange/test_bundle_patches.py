"""MONAI's inferers as patches of a preparation, or why not."""

from pathlib import Path

import pytest

from segraft.exchange.bundle_config import Config
from segraft.exchange.bundle_patches import read_patches
from segraft.exchange.bundle_preparation import Unlike

CONFIG = Config({"size": [8, 9, 10]}, Path("c.json"))
SLIDING = {"_target_": "monai.inferers.SlidingWindowInferer", "roi_size": [8, 9, 10]}
SLICES = {"_target_": "SliceInferer", "roi_size": [8, 9], "spatial_dim": 2}
FIELDS = {"patch": (8, 9, 10), "overlap": 0.25, "average": "logit", "weights": "constant"}


@pytest.mark.parametrize(
    ("inferer", "fields"),
    [
        (SLIDING, FIELDS),
        (SLIDING | {"roi_size": "@size", "sw_device": "$torch.device('cpu')", "progress": True}, FIELDS),
        (SLIDING | {"roi_size": 8, "cval": 0.0, "sigma_scale": 0.125}, FIELDS | {"patch": (8, 8, 8)}),
        (
            SLIDING | {"overlap": [0.5, 0.5, 0.5], "mode": "gaussian"},
            FIELDS | {"overlap": 0.5, "weights": "gaussian"},
        ),
        (SLICES, FIELDS | {"patch": (8, 9, 1)}),
    ],
)
def test_read(inferer, fields):
    assert read_patches(inferer, CONFIG) == (fields, ())


@pytest.mark.parametrize(
    ("inferer", "told"),
    [
        (None, "no inferer"),
        (SLIDING | {"cval": -1.0}, "cval is -1.0"),
        (SLIDING | {"sigma_scale": 0.5, "mode": "gaussian"}, "sigma_scale is 0.5"),
        (SLIDING | {"with_coord": True}, "with_coord is True"),
        (SLIDING | {"mode": "max"}, "mode is max"),
        (SLIDING | {"unheard_of": 1}, "unheard_of is 1"),
        (SLIDING | {"cval": "$numpy.pi"}, "expressions of bundles are not run"),
        (SLIDING | {"_disabled_": True}, "is disabled"),
        (SLIDING | {"overlap": 1.0}, "overlap is 1.0"),
        (SLIDING | {"overlap": -0.1}, "overlap is -0.1"),
        (SLIDING | {"overlap": "much"}, "overlap is much"),
        (SLIDING | {"overlap": float("nan")}, "overlap is nan"),
        (SLIDING | {"overlap": [[1], [2]]}, r"overlap is \[\[1\], \[2\]\]"),
        (SLIDING | {"overlap": [0.5, 0.25, 0.5]}, "overlap is"),
        (SLIDING | {"overlap": []}, "overlap is"),
        (SLIDING | {"roi_size": [True, 8, 8]}, "roi_size is"),
        (SLIDING | {"roi_size": [10**7] * 3}, "roi_size is"),
        (SLIDING | {"roi_size": [8, 8]}, "roi_size is"),
        (SLICES | {"spatial_dim": 0}, "spatial_dim is 0"),
        ({"_target_": "SliceInferer", "roi_size": [8, 9]}, "spatial_dim is 0"),
    ],
)
def test_what_is_not_done_alike_is_named(inferer, told):
    with pytest.raises(Unlike, match=told):
        read_patches(inferer, CONFIG)


def test_a_border_that_goes_on_is_told():
    assert "filled up with zeros" in read_patches(SLIDING | {"padding_mode": "replicate"}, CONFIG)[1][0]
