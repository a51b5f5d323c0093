"""Bases for images of other channels, from `adapt` to `evaluate`: which each takes, how new ones start."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segraft.adapters import read_header
from segraft.data.preparation import Percentiles, Preparation, Window
from segraft.jobs.model import load_model
from segraft.networks import build, read_base, save_base

NET = {"widths": [4, 8]}
SHORT = ("--shots", "1", "--epochs", "1", "--device", "cpu", "--method", "lora", "--rank", "1")
STILL = (*SHORT, "--learning-rate", "1e-12")


def write_cohort(folder: Path, save_nifti, names: list[str]) -> Path:
    """Three cases with a file for each of these channels."""
    rng, entries = np.random.default_rng(0), []
    for case in ("p0", "p1", "p2"):
        where = np.linalg.norm(np.moveaxis(np.indices((16, 16, 16)), 0, -1) - rng.integers(6, 10, 3), axis=-1)
        label = (where < 5).astype(np.uint8)
        save_nifti(folder / f"{case}_label.nii.gz", label)
        for name in names:
            image = rng.normal(100, 10, label.shape) + 100 * label
            save_nifti(folder / f"{case}_{name}.nii.gz", image.astype(np.float32))
        files = {name: f"{case}_{name}.nii.gz" for name in names}
        image = files if len(names) > 1 else files[names[0]]
        entries.append({"image": image, "label": f"{case}_label.nii.gz"})
    modality = {str(place): name for place, name in enumerate(names)}
    listing = {"name": "Some", "modality": modality, "labels": {"1": "core"}, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(listing))
    return folder


@pytest.fixture(scope="module")
def cohorts(save_nifti, tmp_path_factory) -> dict[str, Path]:
    """By their channels."""
    listed = ("FLAIR", "FLAIR T1", "T1 FLAIR", "FLAIR T1 T2", "ADC DWI", "T1")
    return {name: write_cohort(tmp_path_factory.mktemp("D"), save_nifti, name.split()) for name in listed}


def write_base(folder: Path, channels: str, **preparation: object) -> nn.Module:
    """A base of ours for these channels; "2 unnamed" has as many."""
    names = [] if "unnamed" in channels else channels.split()
    count = len(names) or int(channels[0])
    torch.manual_seed(7)
    net = build("unet3d", in_channels=count, out_channels=1, arguments=NET).eval()
    settled = Preparation(patch=(16, 16, 16), **preparation)
    record = {
        "labels": {"1": "core"},
        "preparation": settled.model_dump(mode="json"),
        **({"channels": names} if names else {}),
    }
    arguments = {**NET, "in_channels": count, "out_channels": 1}
    save_base(net, folder, network="unet3d", arguments=arguments, record=record)
    torch.save(net.state_dict(), folder / "w.pt")
    return net


FROM_ELSEWHERE = ("--base", "unet3d", "--network-args", '{"widths": [4, 8]}', "--patch", "16", "16", "16")

MATRIX = {
    "added": ("FLAIR", "FLAIR T1 T2", ("zero",), [0, None, None], "under their names: FLAIR."),
    "added, told new": ("FLAIR", "FLAIR T1 T2", ("share",), [0, None, None], "start with --inputs share: T1, T2."),
    "fewer": ("FLAIR T1", "T1", ("share",), [1], "that the scans have not got by name: FLAIR."),
    "another order": ("FLAIR T1", "T1 FLAIR", ("share",), [1, 0], None),
    "others, as many": ("FLAIR T1", "ADC DWI", ("share",), [None, None], "share: ADC, DWI."),
    "others, by position": ("FLAIR T1", "ADC DWI", (), None, "FLAIR as ADC, T1 as DWI"),
    "one of unknown name": ("1 unnamed", "FLAIR T1", ("mean",), [None, None], "mean: FLAIR, T1."),
    "one that is named": ("1 unnamed", "FLAIR T1", ("zero", "--base-channels", "T1"), [None, 0], "names: T1."),
    "many to one": ("3 unnamed", "T1", ("share",), [None], None),
    "as many, unnamed": ("2 unnamed", "FLAIR T1", ("share",), None, None),
    "the same": ("FLAIR T1", "FLAIR T1", ("share",), None, None),
}
"""Channels of the base and the cohort, --inputs and more, which are recorded, what a note says."""


@pytest.mark.parametrize("elsewhere", [False, True], ids=["ours", "weights"])
@pytest.mark.parametrize(("base", "data", "options", "rows", "says"), MATRIX.values(), ids=MATRIX)
def test_channels(segraft, cohorts, tmp_path, base, data, options, rows, says, elsewhere):
    net = write_base(tmp_path / "base", base)
    source = ("--base", tmp_path / "base")
    named = base if elsewhere and "unnamed" not in base else ""
    if elsewhere:
        source = (*FROM_ELSEWHERE, "--weights", tmp_path / "base" / "w.pt")
        options = (*options, *(("--base-channels", named.replace(" ", ",")) if named else ()))
    given = ("--inputs", *options) if options and options[0][0] != "-" else options
    made = segraft("adapt", *source, *given, "--data", cohorts[data], *STILL, "--out", tmp_path / "run")
    assert made.code == 0, made.err
    assert says is None or says in " ".join(made.err.split())
    described = segraft("inspect", tmp_path / "run", "--json").json["base"]
    start = given[1] if given else None
    assert described.get("inputs") == (None if rows is None else {"channels": rows, "start": start})
    model, channels = load_model(tmp_path / "run"), data.split()
    assert model.channels == (tuple(channels) if len(channels) > 1 else ("",))
    check_first_output(net, model.net, rows, start, len(channels))
    files = [cohorts[data] / f"p0_{name}.nii.gz" for name in channels]
    named = [word for name, file in zip(channels, files, strict=True) for word in ("--channel", f"{name}={file}")]
    scan = files if len(files) == 1 else named
    told = segraft("predict", tmp_path / "run", *scan, "-o", tmp_path / "mask.nii")
    assert told.code == 0, told.err
    told = segraft("evaluate", tmp_path / "run", "--data", cohorts[data], "--out", tmp_path / "e", "--json")
    assert told.code == 0, told.err
    assert told.json["cases"]


def check_first_output(net, adapted, rows, start, count):
    """By the linearity of first layers: what an image gives whose channels each hold a multiple of one scan."""
    scan = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    image = torch.cat([scan * (1 + place) for place in range(count)], 1)
    takes = next(net.parameters()).shape[1]
    if rows is None:
        theirs = image
    else:  # channels of the base that new ones' weights are made of, as the start says
        shown = {row: 1.0 + place for place, row in enumerate(rows) if row is not None}
        new = sum(1 + place for place, row in enumerate(rows) if row is None)
        left, fresh = [row for row in range(takes) if row not in shown], rows.count(None)
        if fresh and start == "share":
            shown |= dict.fromkeys(left, new / fresh)
        if fresh and start == "mean":
            shown = {row: shown.get(row, 0) + new / count for row in range(takes)}
        theirs = torch.cat([scan * shown.get(row, 0) for row in range(takes)], 1)
    with torch.inference_mode():
        torch.testing.assert_close(adapted(image), net(theirs), rtol=1e-3, atol=1e-4)


REFUSED = {
    "not asked for": ("FLAIR", "FLAIR T1", (), ["takes images of 1 channel", "have 2 channels", "--inputs share"]),
    "not asked for, fewer": ("FLAIR T1", "T1", (), ["takes images of 2 channels", "--inputs share"]),
    "another order": ("FLAIR T1", "T1 FLAIR", (), ["in the order T1, FLAIR"]),
    "unknown start": ("FLAIR", "FLAIR T1", ("--inputs", "ones"), ["choose share, zero, mean"]),
    "blind": ("FLAIR", "ADC DWI", ("--inputs", "zero"), ["see nothing", "share or mean"]),
    "frozen": (
        "FLAIR",
        "FLAIR T1",
        ("--inputs", "zero", "--targets", "decoder"),
        ["'encoder.0.0' would never see T1", r"--train 'encoder\.0\.0\..*'", "--inputs mean"],
    ),
    "names": (
        "FLAIR",
        "FLAIR T1",
        ("--inputs", "zero", "--base-channels", "a,b"),
        ["2 channels of the base are named"],
    ),
}


@pytest.mark.parametrize(("base", "data", "options", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(refused, cohorts, tmp_path, base, data, options, says):
    write_base(tmp_path / "base", base)
    given = ("adapt", "--base", tmp_path / "base", "--data", cohorts[data], *SHORT)
    refused(*given, *options, "--out", tmp_path / "run", says=says)


def test_weights_of_another_number_are_told_in_words(refused, cohorts, tmp_path):
    write_base(tmp_path / "base", "FLAIR")
    given = ("adapt", *FROM_ELSEWHERE, "--weights", tmp_path / "base" / "w.pt", "--data", cohorts["FLAIR T1"], *SHORT)
    says = ["w.pt takes images of 1 channel", "have 2 channels (FLAIR, T1)", "--inputs share"]
    refused(*given, "--out", tmp_path / "run", says=says)


def test_what_is_named_is_trained(segraft, cohorts, tmp_path):
    """The cure that the refusal names: the layer is trained whole, and its weights for the new channel move."""
    write_base(tmp_path / "base", "FLAIR")
    given = ("--base", tmp_path / "base", "--data", cohorts["FLAIR T1"], *SHORT, "--targets", "decoder")
    made = segraft("adapt", *given, "--inputs", "zero", "--train", r"encoder\.0\.0\..*", "--out", tmp_path / "run")
    assert made.code == 0, made.err
    weight = load_model(tmp_path / "run").net.encoder[0][0].weight
    assert weight[:, 1].abs().max() > 0


def test_intensities_go_with_their_channels(segraft, cohorts, tmp_path):
    settings = (Window(low=0, high=300), Percentiles(lower=1, upper=99))
    write_base(tmp_path / "base", "FLAIR T1", intensity=settings)
    for data, expected in (
        ("T1", settings[1]),
        ("FLAIR T1 T2", (*settings, Percentiles())),
        ("T1 FLAIR", settings[::-1]),
    ):
        out = tmp_path / data
        made = segraft("adapt", "--base", tmp_path / "base", "--data", cohorts[data], "--inputs", "share", *SHORT,
                       "--out", out)  # fmt: skip
        assert made.code == 0, made.err
        found = Preparation(**read_header(out / "adapter.safetensors").record["preparation"])
        assert found.intensity == expected


def test_a_base_of_one_channel_knows_its_name(segraft, fresh, cohorts, tmp_path):
    """Trained and adapted by the commands, with a label that is new too, and read in a process of its own."""
    tiny = ("--network-args", '{"widths": [4, 8]}', "--epochs", "1", "--device", "cpu", "--patch", "16", "16", "16")
    made = segraft("pretrain", "--data", cohorts["FLAIR"], *tiny, "--cases", "1", "--out", tmp_path / "base")
    assert made.code == 0, made.err
    assert read_base(tmp_path / "base").record["channels"] == ["FLAIR"]
    given = ("--base", tmp_path / "base", "--inputs", "zero", "--new-labels", "core", "--data", cohorts["T1 FLAIR"])
    made = segraft("adapt", *given, *SHORT, "--out", tmp_path / "run")
    assert made.code == 0, made.err
    described = segraft("inspect", tmp_path / "run", "--json").json["base"]
    assert described["inputs"] == {"channels": [None, 0], "start": "zero"}
    assert described["outputs"] == [None]
    files = [cohorts["T1 FLAIR"] / f"p0_{name}.nii.gz" for name in ("T1", "FLAIR")]
    told = fresh("predict", tmp_path / "run", "--channel", f"T1={files[0]}", "--channel", f"FLAIR={files[1]}", "-o",
                 tmp_path / "mask.nii")  # fmt: skip
    assert told.code == 0, told.err


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        ("swin_unetr", {"feature_size": 12}),
        (
            "monai.networks.nets:UNETR",
            {"img_size": [32, 32, 32], "feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2},
        ),
    ],
)
def test_transformers(segraft, cohorts, tmp_path, network, arguments):
    """Several layers see the image; published weights of SwinUNETR go on as they were trained."""
    torch.manual_seed(3)
    net = build(network, in_channels=1, out_channels=1, arguments=arguments)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "w.pt")
    sizes = ("64", "32", "32") if network == "swin_unetr" else ("32", "32", "32")
    given = ("--base", network, "--network-args", json.dumps(arguments), "--weights", tmp_path / "w.pt",
             "--patch", *sizes, "--data", cohorts["FLAIR T1"], "--patches", "1", *SHORT)  # fmt: skip
    made = segraft("adapt", *given, "--inputs", "share", "--out", tmp_path / "run")
    assert made.code == 0, made.err
    told = segraft("evaluate", tmp_path / "run", "--data", cohorts["FLAIR T1"], "--out", tmp_path / "e")
    assert told.code == 0, told.err
