"""Bases for other labels, from `adapt` to `evaluate`: which output each label takes, what is said of it."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from segraft.data.preparation import Preparation
from segraft.jobs.model import load_model
from segraft.networks import build, save_base

NET = {"widths": [4, 8]}
SHORT = (
    "--shots",
    "2",
    "--epochs",
    "1",
    "--device",
    "cpu",
    "--method",
    "lora",
    "--rank",
    "1",
    "--learning-rate",
    "1e-12",
)


def net_of(outputs: int) -> nn.Module:
    torch.manual_seed(7)
    return build("unet3d", in_channels=1, out_channels=outputs, arguments=NET).eval()


def write_base(folder: Path, names: tuple[str, ...], regions: dict[str, list[int]] | None = None) -> nn.Module:
    """A base of ours whose outputs have these names."""
    net = net_of(len(names))
    record = {
        "labels": {str(number): name for number, name in enumerate(names, start=1)},
        "preparation": Preparation(patch=(16, 16, 16)).model_dump(mode="json"),
        **({"regions": regions} if regions else {}),
    }
    arguments = {**NET, "in_channels": 1, "out_channels": len(names)}
    save_base(net, folder, network="unet3d", arguments=arguments, record=record)
    return net


OURS_MATRIX = {
    "the same": (("core", "rim"), "core,rim", (), None, None),
    "added": (("core",), "core,rim", (), [0, None], "start new, as the base has none of their names: rim"),
    "fewer": (("core", "spleen", "rim"), "rim", (), [2], "go on under their names: rim"),
    "reordered": (("core", "rim"), "rim,core", (), [1, 0], None),
    "others, as many": (("liver", "spleen"), "core,rim", (), None, "liver as core, spleen as rim; let them start new"),
    "others, as many, new": (("liver", "spleen"), "core,rim", ("--new-labels", "all"), [None, None], "asked for: core"),
    "others, one new": (("liver", "spleen"), "core,rim", ("--new-labels", "rim"), [0, None], "as asked for: rim"),
    "of one name, but new": (("core",), "core", ("--new-labels", "1"), [None], "as asked for: core"),
    "others, more": (("liver",), "core,rim", (), [None, None], "none of their names: core, rim"),
    "renamed in the data": (("liver", "inner part"), "inner part=1", (), [1], "under their names: inner part"),
    "renamed in the base": (("a", "b"), "core,rim", ("--base-labels", "rim,core"), [1, 0], None),
    "regions of labels": (("core", "rim"), "both=1+2,core=1", (), [None, 0], "none of their names: both"),
    "a label of regions": (("both", "core"), "core", (), [1], None),
}
"""Names of the base's outputs, labels asked for, options, which outputs are recorded, what a note says."""


@pytest.mark.parametrize(("names", "labels", "options", "rows", "says"), OURS_MATRIX.values(), ids=OURS_MATRIX)
def test_bases_of_ours(segraft, work, tmp_path, names, labels, options, rows, says):
    regions = {"1": [1, 2], "2": [1]} if names == ("both", "core") else None
    net = write_base(tmp_path / "base", names, regions)
    source = ("--base", tmp_path / "base")
    check(segraft, work, tmp_path, net, (*source, *options), labels, (rows, None), says)


WEIGHTS_MATRIX = {
    "a softmax": (3, "rim", ("--base-labels", "background,core,rim"), [2], 0, "background's output is taken off"),
    "a softmax, as many": (
        2,
        "core,rim",
        ("--base-labels", "background,rim"),
        [None, 1],
        0,
        "none of their names: core",
    ),
    "unknown, as many": (2, "core,rim", (), None, None, "not known, so they go on as core, rim, in this order"),
    "unknown, others": (3, "core,rim", (), [None, None], None, "what its 3 outputs stand for is not known"),
    "unknown, new": (2, "core,rim", ("--new-labels", "all"), [None, None], None, "as asked for: core, rim"),
    "known, as many": (2, "core,rim", ("--base-labels", "a,b"), None, None, "a as core, b as rim"),
    "known, one new": (
        2,
        "core,rim",
        ("--base-labels", "a,b", "--new-labels", "core"),
        [None, 1],
        None,
        "asked for: core",
    ),
}
"""Outputs of the weights, labels asked for, options, outputs and background that are recorded, what a note says."""


@pytest.mark.parametrize(
    ("outputs", "labels", "options", "rows", "background", "says"), WEIGHTS_MATRIX.values(), ids=WEIGHTS_MATRIX
)
def test_weights_from_elsewhere(segraft, work, tmp_path, outputs, labels, options, rows, background, says):
    net = net_of(outputs)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    source = ("--base", "unet3d", "--network-args", '{"widths": [4, 8]}', "--weights", tmp_path / "w.pt")
    given = (*source, "--patch", "16", "16", "16", *options)
    check(segraft, work, tmp_path, net, given, labels, (rows, background), says)


def check(segraft, work, folder, net, source, labels, expected, says):
    """Adapt with next to no learning rate: each label's logits are those of the base's output that it should take."""
    made = segraft("adapt", *source, "--data", work / "D", "--labels", labels, *SHORT, "--out", folder / "run")
    assert made.code == 0, made.err
    assert says is None or says in " ".join(made.err.split())
    assert says is not None or "other names" not in made.err
    rows, background = expected
    described = segraft("inspect", folder / "run", "--json").json["base"]
    assert (described.get("outputs"), described.get("background")) == (rows, background)
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    model = load_model(folder / "run")
    with torch.inference_mode():
        found, theirs = model.net(image), net(image)
    assert found.shape[1] == len(labels.split(","))
    for place, row in enumerate(range(found.shape[1]) if rows is None else rows):
        off = 0 if background is None else theirs[:, background]
        if row is not None:
            torch.testing.assert_close(found[:, place], theirs[:, row] - off, rtol=1e-4, atol=1e-4)
        else:
            assert all((found[:, place] - each).abs().max() > 1e-2 for each in theirs.unbind(1))
    scan = work / "D" / "imagesTr" / "p7.nii.gz"
    told = segraft("predict", folder / "run", scan, "-o", folder / "mask.nii")
    assert told.code == 0, told.err
    assert set(np.unique(nib.load(folder / "mask.nii").dataobj)) <= {0, *model.labels}
    told = segraft("evaluate", folder / "run", "--data", work / "D", "--out", folder / "e", "--json")
    assert told.code == 0, told.err
    assert {row["name"] for row in told.json["cases"]} == set(model.labels.values())


def test_in_a_process_of_its_own(segraft, fresh, work, tmp_path):
    """The base is rebuilt with the same new output: the adapter's fingerprint of it still fits."""
    write_base(tmp_path / "base", ("rim",))
    made = segraft("adapt", "--base", tmp_path / "base", "--data", work / "D", *SHORT, "--out", tmp_path / "run")
    assert made.code == 0, made.err
    told = fresh("predict", tmp_path / "run", work / "D" / "imagesTr" / "p7.nii.gz", "-o", tmp_path / "mask.nii")
    assert told.code == 0, told.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--new-labels", "liver"), ["'liver' shall start new", "core, rim"]),
        (("--new-labels", "rim", "--exclude", "head"), ["no trained output for rim", "--train head"]),
        (("--base-labels", "a"), ["1 labels of the base are named, but it has 2 outputs"]),
        (("--base-labels", "core,Core"), ["two outputs of the base are named"]),
    ],
)
def test_what_is_refused(refused, work, tmp_path, options, says):
    write_base(tmp_path / "base", ("core", "rim"))
    given = ("--base", tmp_path / "base", "--data", work / "D", *SHORT)
    refused("adapt", *given, *options, "--out", tmp_path / "run", says=says)


@pytest.mark.parametrize("seed", [0, 1])
def test_new_outputs_of_a_base_with_fewer_start_as_the_seed_says(segraft, work, tmp_path, seed):
    write_base(tmp_path / "base", ("core",))
    given = ("adapt", "--base", tmp_path / "base", "--data", work / "D", *SHORT, "--train", "head", "--seed", str(seed))
    made = segraft(*given, "--out", tmp_path / "run")
    assert made.code == 0, made.err
    told = segraft("predict", tmp_path / "run", work / "D" / "imagesTr" / "p7.nii.gz", "-o", tmp_path / "mask.nii")
    assert told.code == 0, told.err
