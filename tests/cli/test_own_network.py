"""A network of the user's, in a package on the path, that names no parts and has names of its own for its arguments."""

import json
import shutil

import pytest
import torch

from segraft.adapters import parts_of
from segraft.jobs.model import load_model
from segraft.networks import build

STILL = ("--learning-rate", "1e-12")

CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, in_chans=1, num_classes=1, out="tensor", aux=False):
        super().__init__()
        self.stem = nn.Conv3d(in_chans, 4, 3, padding=1)
        self.last = nn.Conv3d(4, num_classes, 1)
        self.aux = nn.Conv3d(4, num_classes, 1) if aux else None
        self.out = out

    def forward(self, x):
        hidden = torch.relu(self.stem(x))
        logits = self.last(hidden)
        deep = self.out == "tuple in training" and self.training
        return {"list": [logits], "dict": {"out": logits}}.get(self.out, (logits, logits) if deep else logits)


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Conv3d(1, 2, 1)

    def forward(self, x):
        return self.last(x)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "package_of_mine").mkdir()
    (tmp_path / "package_of_mine" / "nets.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return "package_of_mine.nets"


def weights(package, path, network="Net", **arguments):
    torch.manual_seed(5)
    net = build(f"{package}:{network}", in_channels=1, out_channels=arguments.pop("outputs", 2), arguments=arguments)
    torch.save(net.state_dict(), path)
    return net.eval()


def given(package, work, path, *options, network="Net", **arguments):
    return ("adapt", "--base", f"{package}:{network}", "--weights", path, "--network-args", json.dumps(arguments),
            "--data", work / "D", "--shots", "2", "--epochs", "1", "--patch", "16", "16", "16", "--device", "cpu",
            "--method", "lora", "--rank", "1", *options)  # fmt: skip


def test_what_depends_on_the_labels_is_the_head(package):
    assert parts_of(build(f"{package}:Net", in_channels=2, out_channels=3)) == {"head": ("last",)}
    assert parts_of(build(f"{package}:Net", in_channels=2, out_channels=3, arguments={"aux": True})) == {}
    assert parts_of(build(f"{package}:Fixed", in_channels=1, out_channels=2)) == {}
    torch.manual_seed(3)
    state = build(f"{package}:Net", in_channels=1, out_channels=1).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    from package_of_mine.nets import Net

    assert torch.equal(Net(1, 1).stem.weight, state["stem.weight"])
    assert torch.equal(torch.rand(1), drawn), "looking for the head draws nothing"


@pytest.mark.parametrize(
    ("labels", "options", "rows"),
    [
        ("core,rim", (), None),
        ("rim", ("--base-labels", "core,rim"), [1]),
        ("core,rim", ("--base-labels", "rim,liver", "--train", "head"), [None, 0]),
        ("core,rim", ("--new-labels", "rim", "--method", "none", "--train", r"last\..*"), [0, None]),
    ],
)
def test_other_labels(segraft, fresh, package, work, tmp_path, labels, options, rows):
    weights(package, tmp_path / "w.pt")
    made = segraft(*given(package, work, tmp_path / "w.pt", "--labels", labels, *options), "--out", tmp_path / "run")
    assert made.code == 0, made.err
    assert segraft("inspect", tmp_path / "run", "--json").json["base"].get("outputs") == rows
    assert ("not known" in made.err) == (rows is None or "--new-labels" in options)
    run = fresh if rows == [None, 0] else segraft
    told = run("predict", tmp_path / "run", work / "D" / "imagesTr" / "p7.nii.gz", "-o", tmp_path / "mask.nii")
    assert told.code == 0, told.err


@pytest.mark.parametrize("arguments", [{}, {"in_chans": 1}], ids=["told by the file", "told by the user"])
def test_other_channels(segraft, package, work, tmp_path, arguments):
    base, entries = weights(package, tmp_path / "w.pt", outputs=1), []
    (tmp_path / "E").mkdir()
    for name in ("p0", "p1"):
        files = {"CT": "imagesTr", "PET": "imagesTr", "label": "labelsTr"}
        for kind, folder in files.items():
            shutil.copy(work / "D" / folder / f"{name}.nii.gz", tmp_path / "E" / f"{name}_{kind}.nii.gz")
        image = {kind: f"{name}_{kind}.nii.gz" for kind in ("CT", "PET")}
        entries.append({"image": image, "label": f"{name}_label.nii.gz"})
    listing = {"name": "E", "modality": {"0": "CT", "1": "PET"}, "labels": {"1": "core", "2": "rim"}}
    (tmp_path / "E" / "dataset.json").write_text(json.dumps(listing | {"training": entries}))
    options = ("--data", tmp_path / "E", "--inputs", "share", "--base-channels", "CT", "--labels", "core")
    made = segraft(*given(package, work, tmp_path / "w.pt", *options, **arguments), *STILL, "--out", tmp_path / "run")
    assert made.code == 0, made.err
    net, image = load_model(tmp_path / "run").net, torch.randn(1, 2, 8, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(net(image), base(image[:, :1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "arguments", "labels", "says"),
    [
        ("Net", {"out": "list"}, "core,rim", ["Net gives list", "as one tensor"]),
        ("Net", {"out": "dict"}, "core,rim", ["Net gives dict", "as one tensor"]),
        ("Net", {"out": "tuple in training"}, "core,rim", ["Net gives tuple", "deep supervision must be off"]),
        ("Net", {"aux": True}, "rim", ["have another shape"]),
        ("Net", {"num_clases": 2}, "core,rim", ["unexpected keyword argument 'num_clases'"]),
        ("Fixed", {}, "rim", ["Fixed gives (1, 2, 16, 16, 16)", "1 labels"]),
    ],
)
def test_what_cannot_be_used(segraft, package, work, tmp_path, network, arguments, labels, says):
    weights(package, tmp_path / "w.pt", network, **{k: v for k, v in arguments.items() if k == "aux"})
    command = given(package, work, tmp_path / "w.pt", "--labels", labels, network=network, **arguments)
    outcome = segraft(*command, "--out", tmp_path / "run")
    assert outcome.code == 2, outcome
    assert outcome.err.count("\n") - outcome.err.count("note: ") == 1
    assert all(word in outcome.err for word in says), outcome.err
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
