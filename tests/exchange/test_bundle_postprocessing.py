"""What MONAI's transforms make of the network's outputs is followed, or named."""

import re
from pathlib import Path

import numpy as np
import pytest
from tests.exchange.bundles import (
    CT,
    PAINTED,
    SEGRESNET,
    SIGMOID,
    SOFTMAX,
    monai_mask,
    write_bundle,
    write_scan,
)

from segraft.errors import SegraftError
from segraft.exchange.bundle_config import Config
from segraft.exchange.bundle_outputs import labels_of
from segraft.exchange.bundle_postprocessing import activation_of
from segraft.exchange.opening import open_base
from segraft.jobs import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning"),  # MONAI's, of its default reader
    pytest.mark.filterwarnings("ignore:.*Orientationd.__init__.labels:FutureWarning"),  # of a default, changed since
]

UNRESAMPLED = [each for each in CT if each["_target_"] != "Spacingd"]
ORGANS = ("background", "liver", "spleen")
OFF = {"_disabled_": True}
SIGMOIDS = [SIGMOID[0], SOFTMAX[1]]
"""Without a threshold."""


def step(name, **arguments):
    return {"_target_": name, "keys": "pred", **arguments}


def mapped(before, after):
    return step("MapLabelValued", orig_labels=before, target_labels=after)


def painted(func):
    return step("Lambdad", func=func)


def read(steps, count=3):
    values = {"post": {"_target_": "Compose", "transforms": steps}, "on": True}
    return activation_of(Config(values, Path("c.json")), "post", count)


def only_one(cut):
    return [SIGMOID[0], step("AsDiscreted", threshold=cut)]


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (only_one(0.3), "AsDiscreted: threshold is 0.3"),
        ([step("AsDiscreted", threshold=0.5)], "threshold is 0.5 of what no sigmoid came before"),
        ([SIGMOID[0] | OFF, step("AsDiscreted", threshold=0.5)], "of what no sigmoid came before"),
        ([SOFTMAX[0], step("AsDiscreted", threshold=0.5)], "of what no sigmoid came before"),
        ([SIGMOID[0], step("AsDiscreted", argmax=True)], "argmax of a sigmoid"),
        ([*SOFTMAX, step("AsDiscreted", argmax=True)], "argmax comes after argmax"),
        ([SIGMOID[0], step("AsDiscreted", threshold_values=True, logit_thresh=0.5)], "threshold_values is True"),
        ([SIGMOID[0], step("AsDiscreted", rounding="torchrounding")], "rounding is"),
        ([step("Activationsd", other="$torch.tanh"), SOFTMAX[2]], "Activationsd.*expressions of bundles are not run"),
        ([*SOFTMAX, step("scripts.post.RemoveLeftd")], "RemoveLeftd: it is not known"),
        ([*SOFTMAX, step("LabelFilterd", applied_labels=[1])], "LabelFilterd"),
        ([step("MeanEnsembled"), *SOFTMAX], "MeanEnsembled"),
        ([*SOFTMAX, "$print(1)"], "it is not known"),
        ([*SOFTMAX, step("Identityd", _disabled_="$f()")], "Identityd: .*expressions of bundles are not run"),
        ([*SOFTMAX, painted("$lambda x: x * 3")], r"Lambdad: what \$lambda x: x \* 3 does cannot be told"),
        ([*SIGMOIDS, painted(PAINTED)], "does not cut outputs off at 0.5"),  # at 0 of a sigmoid, which is everywhere
        ([painted(PAINTED.replace("> 0", ">= 0.5"))], "does not cut outputs off at 0.5"),
        ([*SIGMOIDS, painted(PAINTED.replace("> 0", "> 0.8"))], "does not cut outputs off at 0.5"),
        ([*SIGMOID, painted(PAINTED.replace("> 0", ">= 0"))], "does not cut outputs off at 0.5"),
        ([*SIGMOID, painted("$lambda x: torch.where(x[[2]] > 0, 4, 0)")], "does not paint each output once"),
        ([*SIGMOID, painted(PAINTED.replace("[[1]]", "[[0]]"))], "does not paint each output once"),
        ([*SIGMOID, painted(PAINTED.replace("0, 1,", "0, 0,"))], "the value of a label in masks is 0"),
        ([*SIGMOID, painted(PAINTED.replace("0, 1,", "0, 2,"))], "two labels have one value"),
        ([*SOFTMAX, mapped([1, 2], [5, 5])], "two labels have one value"),
        ([*SOFTMAX, mapped([1, 2], [5, 0])], "the value of a label in masks is 0"),
        ([*SOFTMAX, mapped([0], [9])], "the background becomes 9"),
        ([*SOFTMAX, mapped([1], [70000])], "is 70000"),
        ([*SOFTMAX, mapped([1], [2, 3])], "orig_labels is"),
        ([SOFTMAX[0], mapped([1], [7]), SOFTMAX[2]], "before there is a mask"),
        ([*SIGMOID, mapped([1], [7])], "before there is a mask of one channel"),
    ],
)
def test_what_is_not_done_alike_is_named(steps, told):
    unlike = read(steps).unlike
    assert len(unlike) == 1
    assert re.search(told, unlike[0])


@pytest.mark.parametrize(
    ("steps", "exclusive", "order", "values"),
    [
        (SOFTMAX, True, (), {}),
        ([SIGMOID[0] | OFF, *SOFTMAX, step("Resized") | {"_disabled_": "$not not @on"}], True, (), {}),
        ([*SOFTMAX, step("KeepLargestConnectedComponentd"), step("SaveImaged", output_dir="$1 // f")], True, (), {}),
        ([SOFTMAX[0], {**SOFTMAX[2], "keys": ["pred", "label"], "argmax": [True, False]}], True, (), {}),
        ([SOFTMAX[0], SOFTMAX[2], step("Resized") | {"keys": "label"}], True, (), {}),  # of the reference alone
        ([SOFTMAX[0], step("AsDiscreted", argmax=True, to_onehot=3)], True, (), {}),
        ([*SOFTMAX, mapped([0, 1, 2], [0, 2, 7])], True, (), {1: 2, 2: 7}),
        ([*SOFTMAX, mapped([2], [9])], True, (), {1: 1, 2: 9}),
        ([*SIGMOID, painted(PAINTED)], False, ((1, 2), (0, 1), (2, 4)), {}),
        ([*SIGMOIDS, painted(PAINTED.replace("> 0", ">= 0.5"))], False, ((1, 2), (0, 1), (2, 4)), {}),
        ([*SIGMOID, painted(PAINTED), mapped([4], [3])], False, ((1, 2), (0, 1), (2, 4)), {2: 2, 1: 1, 4: 3}),
    ],
)
def test_read(steps, exclusive, order, values):
    found = read(steps)
    assert (found.exclusive, found.painted, dict(found.values), found.unlike) == (exclusive, order, values, ())


def test_values_follow_to_the_labels():
    config = Config({}, Path("c.json"))
    labels, background, _ = labels_of(ORGANS, 3, read([*SOFTMAX, mapped([1, 2], [2, 7])]), config)
    assert (dict(labels), background) == ({2: "liver", 7: "spleen"}, True)
    labels, _, _ = labels_of(("a", "b", "c"), 3, read([*SIGMOID, painted(PAINTED), mapped([4], [3])]), config)
    assert labels == {1: "a", 2: "b", 3: "c"}
    assert labels.regions == {2: (2, 1, 3), 1: (1, 3), 3: (3,)}
    labels, _, _ = labels_of(("a",), 1, read([*only_one(0.5), mapped([1], [8])], 1), config)
    assert labels == {8: "a"}


def test_mapped_masks_are_those_of_monai(tmp_path):
    steps = [*SOFTMAX, mapped([1, 2], [2, 7])]
    bundle = write_bundle(tmp_path / "b", SEGRESNET, ORGANS, transforms=UNRESAMPLED, post=steps)
    scan = write_scan(tmp_path / "scan.nii.gz")
    theirs = monai_mask(bundle, scan)
    assert {2, 7} <= set(np.unique(theirs))
    assert np.array_equal(load_model(f"monai:{bundle}").segment(scan).mask, theirs)


def test_predict_refuses_and_adapt_tells(tmp_path):
    """How scans are prepared is known all the same."""
    bundle = write_bundle(tmp_path / "b", SEGRESNET, ORGANS, post=[*SOFTMAX, painted("$lambda x: x * 3")])
    opened = open_base(f"monai:{bundle}")
    assert opened.preparation is not None
    assert "Lambdad" in opened.unlike[0]
    for given in (None, opened.preparation):
        with pytest.raises(SegraftError, match=r"cannot segment as it is, but can be adapted .*Lambdad"):
            load_model(f"monai:{bundle}", preparation=given)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"label_values": [1, 2, 70000]}, "is 70000"),
        ({"label_values": [-1, 1, 2]}, "is -1"),
        ({"label_values": [1, 1, 2]}, "two labels have one value"),
        ({"label_values": [1, 2]}, "for 3 outputs"),
        ({"label_values": [1, 2, True]}, "is True"),
        ({"label_values": [1, 2, 3], "label_regions": {"1": [1]}}, "not painted in the order"),
    ],
)
def test_values_that_no_mask_has_are_refused(more, told, tmp_path):
    bundle = write_bundle(tmp_path / "b", SEGRESNET, ("a", "b", "c"), post=SIGMOID, more=more)
    with pytest.raises(SegraftError, match=told):
        open_base(f"monai:{bundle}")
