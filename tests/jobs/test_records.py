"""Files whose records hold what Segraft does not write there: one sentence each, whatever reads them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import segraft
from segraft.errors import SegraftError
from segraft.jobs import evaluate, load_model, push
from segraft.jobs.inspecting import describe
from segraft.jobs.locating import read_adapter
from segraft.networks import build, load_base, read_base, save_base
from segraft.networks.records import record_problem

ARGUMENTS = {"in_channels": 1, "out_channels": 1, "widths": [2, 4], "spatial_dims": 3}
TASK = {
    "labels": {"1": "rim"},
    "preparation": segraft.data.preparation.Preparation(patch=(8, 8, 8)).model_dump(mode="json"),
    "cases": {"a": "b" * 16},
    "dataset": "Toy",
    "patient_pattern": None,
    "training": {"losses": [1.0, 0.5], "converged": False},
    "versions": {"torch": "2.0"},
}


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    net = build("unet", in_channels=1, out_channels=1, arguments={"widths": [2, 4], "spatial_dims": 3})
    base = save_base(net, tmp_path, network="unet", arguments=ARGUMENTS, record=TASK)
    segraft.graft(net, segraft.AdapterSpec("lora", rank=1))
    described = {"network": "unet", "arguments": ARGUMENTS, "path": "base.safetensors"}
    return base.path, segraft.save(net, tmp_path / "adapter.safetensors", record=TASK | {"base": described})


def spoil(path, *place, value):
    with safe_open(path, framework="pt") as file:
        ((key, text),) = file.metadata().items()
    header = json.loads(text)
    inner = header
    for name in place[:-1]:
        inner = inner.setdefault(name, {})
    inner[place[-1]] = value
    save_file(load_file(path), path, metadata={key: json.dumps(header)})


ODD = [
    (("labels",), ["a"]),
    (("labels",), "x"),
    (("labels", "one"), "x"),
    (("labels", "1"), 5),
    (("regions",), [1]),
    (("regions", "1"), 3),
    (("channels",), [1, 2]),
    (("channels",), "ct"),
    (("cases",), ["a"]),
    (("cases", "a"), 1),
    (("dataset",), ["a"]),
    (("preparation",), [1]),
    (("settings",), [1]),
    (("training",), "x"),
    (("training", "losses"), "abc"),
    (("training", "losses"), [None]),
    (("versions",), [1]),
    (("imported",), 1),
    (("untrained",), []),
    (("encoder",), 3),
]


@pytest.mark.parametrize(("place", "value"), ODD)
def test_records(files, tmp_path, place, value):
    base, adapter = files
    for path, read in ((base, read_base), (adapter, read_adapter), (adapter, load_model), (adapter, describe)):
        spoil(path, "record", *place, value=value)
        with pytest.raises(SegraftError) as error:
            read(path)
        text = str(error.value)
        assert str(path) in text
        assert f"record.{place[0]}" in text
        assert "\n" not in text
    with pytest.raises(SegraftError):
        evaluate(adapter, tmp_path)
    with pytest.raises(SegraftError):
        push(adapter, "ward/rim", dry_run=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("path", 5),
        ("path", None),
        ("arguments", [1]),
        ("arguments", {"in_channels": "x"}),
        ("network", 5),
        ("outputs", [1.5]),
        ("outputs", 1),
        ("background", "x"),
        ("fingerprint", 1),
    ],
)
def test_what_an_adapter_says_of_its_base(files, name, value):
    spoil(files[1], "record", "base", name, value=value)
    with pytest.raises(SegraftError, match=rf"record\.base\.{name}"):
        load_model(files[1])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("record", []),
        ("record", None),
        ("record", "x"),
        ("arguments", [1]),
        ("arguments", {"in_channels": None, "out_channels": 1}),
        ("network", 5),
        ("fingerprint", None),
        ("format", "x"),
    ],
)
def test_headers_of_bases(files, place, value):
    spoil(files[0], place, value=value)
    with pytest.raises(SegraftError, match=r"cannot be used|is no base file"):
        load_base(files[0])


@pytest.mark.parametrize(
    ("place", "value"), [("record", []), ("base", 3), ("version", None), ("spec", 3), ("ranks", 3)]
)
def test_headers_of_adapters(files, place, value):
    spoil(files[1], place, value=value)
    with pytest.raises(SegraftError, match="is no adapter file"):
        load_model(files[1])


def test_preparations_that_are_none(files):
    spoil(files[1], "record", "preparation", value={"spacing": "x", "intensity": {"kind": "window"}})
    for reads in (load_model, lambda path: push(path, "ward/rim", dry_run=True)):
        with pytest.raises(SegraftError, match=r"adapter\.safetensors"):
            reads(files[1])


def test_other_entries_are_anyones():
    assert record_problem({"mine": object(), "seed": 3}) is None
    assert record_problem(TASK | {"base": {"outputs": [None, 0], "mine": 3}, "channels": ["ct"]}) is None
