"""Base files and weights from elsewhere: round trips, and everything that must be refused."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from segraft.adapters import AdapterSpec, fingerprint, graft, ungraft
from segraft.errors import SegraftError
from segraft.networks import UNet, build, load_base, load_weights, read_base, save_base
from segraft.networks.bases import FILE_NAME

ARGUMENTS = {"in_channels": 1, "out_channels": 2, "spatial_dims": 2, "widths": [2, 3], "norm": "batch"}


class Aliased(nn.Module):
    """One convolution under two names, which share their tensors."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, out_channels, 1)
        self.again = self.first


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def small(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    net = UNet(1, 2, widths=(2, 3), norm="batch")
    net(torch.rand(4, 1, 4, 4))  # running statistics away from their start
    return net


def assert_same(net: nn.Module, other: nn.Module) -> None:
    ours, theirs = net.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype
        assert torch.equal(value, theirs[key]), key


def assert_one_sentence(error: SegraftError, path: Path) -> None:
    text = str(error)
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith((".", "?"))


@pytest.fixture
def saved(tmp_path) -> Path:
    """A base file."""
    return save_base(small(), tmp_path, network="unet", arguments=ARGUMENTS, record={"labels": {"1": "clot"}}).path


# --- base files


def test_round_trip_is_bit_for_bit(tmp_path):
    net = small()
    base = save_base(net, tmp_path / "new" / "folder", network="unet", arguments=ARGUMENTS, record={"seed": 3})
    assert base.path == tmp_path / "new" / "folder" / FILE_NAME
    loaded, read = load_base(base.path)
    assert read == base == read_base(base.path.parent)
    assert read.record == {"seed": 3}
    assert read.fingerprint == fingerprint(net) == fingerprint(loaded)
    assert_same(net, loaded)
    with torch.inference_mode():
        image = torch.rand(1, 1, 8, 8)
        assert torch.equal(net.eval()(image), loaded.eval()(image))


def test_round_trip_of_a_network_with_an_aliased_module(tmp_path, monkeypatch):
    monkeypatch.setattr(nn, "Aliased", Aliased, raising=False)
    monkeypatch.setenv("SEGRAFT_TRUST", "torch.nn")
    net = Aliased(3, 4)
    save_base(net, tmp_path, network="torch.nn:Aliased", arguments={"in_channels": 3, "out_channels": 4})
    loaded, _ = load_base(tmp_path)
    assert_same(net, loaded)
    assert loaded.first is loaded.again


def test_a_network_that_was_adapted_and_ungrafted_is_the_same_base(tmp_path):
    net = small()
    before = fingerprint(net)
    ungraft(graft(net, AdapterSpec("dora_c", train="head")))
    assert save_base(net, tmp_path, network="unet", arguments=ARGUMENTS).fingerprint == before
    load_base(tmp_path)


def test_overwriting_leaves_no_other_file(saved):
    save_base(small(1), saved.parent, network="unet", arguments=ARGUMENTS)
    assert [path.name for path in saved.parent.iterdir()] == [FILE_NAME]
    assert_same(load_base(saved)[0], small(1))


@pytest.mark.parametrize("absent", ["in_channels", "out_channels"])
def test_a_base_that_could_not_be_built_again_is_not_written(tmp_path, absent):
    arguments = {name: value for name, value in ARGUMENTS.items() if name != absent}
    with pytest.raises(SegraftError, match="give in_channels and out_channels") as caught:
        save_base(small(), tmp_path, network="unet", arguments=arguments)
    assert_one_sentence(caught.value, tmp_path)
    assert not list(tmp_path.iterdir())


def test_changed_weights_are_refused(saved):
    with saved.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    tensors = load_file(saved)
    tensors["head.weight"][0, 0, 0, 0] += 1e-3
    save_file(tensors, saved, metadata=header["__metadata__"])
    with pytest.raises(SegraftError, match="was changed after it was written") as caught:
        load_base(saved)
    assert_one_sentence(caught.value, saved)
    assert read_base(saved).fingerprint[:16] in str(caught.value)


def test_one_flipped_bit_is_refused(saved):
    content = bytearray(saved.read_bytes())
    content[-3] ^= 1
    saved.write_bytes(content)
    with pytest.raises(SegraftError, match="was changed after it was written"):
        load_base(saved)


@pytest.mark.parametrize("reader", [read_base, load_base])
@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_base_is_refused(saved, reader, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(SegraftError, match="is not a readable safetensors file") as caught:
        reader(saved)
    assert_one_sentence(caught.value, saved)


def test_a_missing_base_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / FILE_NAME):
        with pytest.raises(SegraftError, match="does not exist") as caught:
            read_base(path)
        assert_one_sentence(caught.value, tmp_path / FILE_NAME)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "no JSON",
        "[]",
        "{}",
        '{"network": "unet", "arguments": {"in_channels": 1}, "fingerprint": "", "record": {}}',
        '{"network": "unet", "arguments": null, "fingerprint": "", "record": {}}',
    ],
)
def test_safetensors_of_others_are_no_base(tmp_path, header):
    path = tmp_path / FILE_NAME
    save_file(small().state_dict(), path, metadata=None if header is None else {"segraft_base": header})
    with pytest.raises(SegraftError, match="is no base file") as caught:
        load_base(path)
    assert_one_sentence(caught.value, path)


# --- weights from elsewhere


@pytest.mark.parametrize("prefix", ["", "module.", "net.", "model.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt"])
def test_state_dicts_load_bit_for_bit(tmp_path, prefix, suffix):
    path, net = tmp_path / f"weights{suffix}", small(1)
    tensors = {prefix + key: value for key, value in net.state_dict().items()}
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    other = small(2)
    load_weights(other, path)
    assert_same(net, other)


@pytest.mark.parametrize("under", ["state_dict", "model", "network_weights", "net"])
def test_nested_state_dicts_load(tmp_path, under):
    net, other = small(1), small(2)
    torch.save({under: net.state_dict(), "epoch": 3, "best": 0.5}, tmp_path / "weights.pt")
    load_weights(other, tmp_path / "weights.pt")
    assert_same(net, other)


def test_a_prefix_that_only_some_keys_have_is_kept(tmp_path):
    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

    net, other = Wrapping(), Wrapping()
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    load_weights(other, tmp_path / "weights.pt")
    assert_same(net, other)


@pytest.mark.parametrize("wrap", [lambda trap: trap, lambda trap: {"state_dict": small().state_dict(), "args": trap}])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, wrap, zipped):
    path, created = tmp_path / "weights.pt", tmp_path / "created"
    torch.save(wrap(Trap(created)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SegraftError, match="could run code") as caught:
        load_weights(small(), path)
    assert_one_sentence(caught.value, path)
    assert not created.exists()


def test_a_plain_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    path, created = tmp_path / "weights.pkl", tmp_path / "created"
    path.write_bytes(pickle.dumps(Trap(created), protocol=2))
    with pytest.raises(SegraftError) as caught:
        load_weights(small(), path)
    assert_one_sentence(caught.value, path)
    assert not created.exists()
    pickle.loads(path.read_bytes())
    assert created.exists()  # it would have run


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(small(), tmp_path / "weights.pt")
    with pytest.raises(SegraftError, match="save its state_dict alone"):
        load_weights(small(), tmp_path / "weights.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_weights_are_refused(tmp_path, suffix, share):
    path, net = tmp_path / f"weights{suffix}", small()
    if suffix == ".pt":
        torch.save(net.state_dict(), path)
    else:
        save_file(net.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(SegraftError) as caught:
        load_weights(net, path)
    assert_one_sentence(caught.value, path)


@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 3}, torch.zeros(2), {1: torch.zeros(2)}, {"state_dict": {"a": 1}}], ids=str
)
def test_what_holds_no_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(SegraftError, match="holds no state dict") as caught:
        load_weights(small(), path)
    assert_one_sentence(caught.value, path)


def test_missing_files_of_weights_are_refused(tmp_path):
    with pytest.raises(SegraftError, match="does not exist"):
        load_weights(small(), tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.bias"), "1 tensors are missing, such as head.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 tensors are unexpected, such as extra"),
        (lambda t: t.update({"head.bias": torch.zeros(3)}), "1 tensors have another shape, such as head.bias"),
        (
            lambda t: t.update({"head.bias_": t.pop("head.bias")}),
            "1 tensors are missing, such as head.bias; 1 tensors are unexpected, such as head.bias_",
        ),
        (lambda t: t.clear(), "tensors are missing"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path, change, message, suffix):
    path = tmp_path / f"weights{suffix}"
    tensors = dict(small(1).state_dict())
    change(tensors)
    if suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    net = small(2)
    with pytest.raises(SegraftError, match="do not fit UNet") as caught:
        load_weights(net, path)
    assert message in str(caught.value)
    assert_one_sentence(caught.value, path)
    assert_same(net, small(2))


class Wrapper(nn.Module):
    """All its keys begin with `net.`, which in a checkpoint is often a prefix to take off."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.net = nn.Conv2d(in_channels, out_channels, 1)


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        (f"{__name__}:Wrapper", {}),
        ("monai.networks.nets:UNet", {"spatial_dims": 2, "channels": [2, 4], "strides": [2]}),  # keys: model.…
    ],
)
def test_networks_whose_keys_share_a_prefix(tmp_path, monkeypatch, network, arguments):
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Wrapper.__module__])
    arguments = {"in_channels": 1, "out_channels": 1, **arguments}
    rest = {name: value for name, value in arguments.items() if not name.endswith("_channels")}
    net = build(network, in_channels=1, out_channels=1, arguments=rest)
    save_base(net, tmp_path, network=network, arguments=arguments)
    loaded, _ = load_base(tmp_path)
    assert fingerprint(loaded) == fingerprint(net)
    torch.save({f"module.{key}": value for key, value in net.state_dict().items()}, tmp_path / "w.pt")
    load_weights(build(network, in_channels=1, out_channels=1, arguments=rest), tmp_path / "w.pt")
