"""Adapters, bases and weights that are damaged, exchanged or hostile."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def copied(work, tmp_path):
    """Copies of base and run, side by side as they were."""
    for name in ("base", "run"):
        shutil.copytree(work / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def predict(refused, copied, work):
    """predict(model, …, says=[…]): a prediction with this model is refused."""

    def check(model, *more, says):
        scan = work / "D" / "imagesTr" / "p7.nii.gz"
        return refused("predict", model, scan, "-o", copied / "mask.nii", *more, says=says)

    return check


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def cut_header(path):
    path.write_bytes(path.read_bytes()[:20])


DAMAGE = {
    "cut": cut,
    "cut header": cut_header,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no adapter"),
    "missing": lambda path: path.unlink(),
    "other safetensors": lambda path: save_file({"x": torch.zeros(3)}, path),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("file", ["run/adapter.safetensors", "base/base.safetensors"])
def test_a_damaged_file(predict, copied, damage, file):
    damage(copied / file)
    predict(copied / "run" / "adapter.safetensors", says=[Path(file).name])


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("file", ["run/adapter.safetensors", "base/base.safetensors"])
def test_inspect_a_damaged_file(refused, copied, damage, file):
    damage(copied / file)
    refused("inspect", copied / file, says=[copied / file])


def test_changed_weights_of_a_base(predict, copied):
    path = copied / "base" / "base.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 0x01
    path.write_bytes(raw)
    predict(copied / "run", says=["base.safetensors", "fingerprint"])


def test_a_base_named_as_an_adapter(predict, copied):
    shutil.copy(copied / "base" / "base.safetensors", copied / "run" / "adapter.safetensors")
    predict(copied / "run", says=[copied / "run" / "adapter.safetensors", "is a base"])


def test_an_adapter_named_as_a_base(predict, copied):
    shutil.copy(copied / "run" / "adapter.safetensors", copied / "base" / "base.safetensors")
    predict(copied / "run", says=["base.safetensors", "is no base file"])


def test_an_adapter_on_another_base(predict, segraft, work, copied, tiny):
    made = segraft(
        *("pretrain", "--data", work / "D", "--labels", "1", "--cases", "2", "--seed", "8"),
        *("--out", copied / "other", *tiny, "--json"),
    )
    ours = json.loads((work / "pretrain.json").read_text())["fingerprint"]
    theirs = made.json["fingerprint"]
    assert ours != theirs
    predict(copied / "run", "--base", copied / "other", says=["adapter.safetensors", ours[:16], theirs[:16]])


def test_an_adapter_on_a_base_of_another_size(predict, segraft, work, copied):
    made = segraft(
        *("pretrain", "--data", work / "D", "--labels", "1", "--cases", "2", "--epochs", "1", "--device", "cpu"),
        *("--network-args", '{"widths": [4, 4, 8]}', "--out", copied / "other"),
    )
    assert made.code == 0, made.err
    predict(copied / "run", "--base", copied / "other", says=["adapter.safetensors", "fingerprint"])


def test_an_adapter_with_other_tensors(predict, copied):
    path = copied / "run" / "adapter.safetensors"
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path, metadata=header)
    predict(copied / "run", says=[path, "missing"])


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_weights_is_not_run(refused, work, tmp_path, writer):
    content = {"state_dict": {}, "extra": Hostile(tmp_path / "was_here")}
    path = tmp_path / "weights.pt"
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    refused(
        *("adapt", "--base", "unet3d", "--weights", path, "--data", work / "D", "--labels", "2", "--shots", "2"),
        *("--out", tmp_path / "run"),
        says=[path],
    )
    assert not (tmp_path / "was_here").exists()


def test_weights_of_another_network(refused, work, tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    refused(
        *("adapt", "--base", "unet3d", "--weights", tmp_path / "weights.pt", "--data", work / "D", "--labels", "2"),
        *("--shots", "2", "--out", tmp_path / "run"),
        says=[tmp_path / "weights.pt", "missing", "unexpected"],
    )


@pytest.mark.parametrize("network", ["os:system", "subprocess:call"])
def test_a_base_that_names_no_network_runs_nothing(refused, tmp_path, network):
    """A base file from elsewhere may name anything as its network; only networks may be built."""
    trace = tmp_path / "was_here"
    arguments = {
        "os:system": {"command": f"touch {trace}"},
        "subprocess:call": {"args": ["touch", str(trace)]},
    }[network]
    header = {
        "format": 1,
        "network": network,
        "arguments": {"in_channels": 1, "out_channels": 1, **arguments},
        "fingerprint": "0" * 64,
        "record": {"labels": {"1": "core"}, "preparation": {}},
    }
    path = tmp_path / "base.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"segraft_base": json.dumps(header)})
    (tmp_path / "scan.nii").write_bytes(b"")
    refused("predict", path, tmp_path / "scan.nii", "-o", tmp_path / "mask.nii", says=[network])
    assert not trace.exists()
