"""Adapter files: what is saved comes back bit for bit; what is damaged or foreign is refused."""

import errno
import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from segraft.adapters import (
    AdapterSpec,
    BaseMismatchError,
    activate,
    adapter_tensors,
    fingerprint,
    graft,
    load,
    read_header,
    save,
)
from segraft.adapters.graft import record_of
from segraft.errors import SegraftError


def test_saved_and_loaded_on_a_fresh_copy(kind, method, adapted, tmp_path):
    net, x = adapted(kind, method, torch.float32, bias="low_rank"), kind.input()
    path = save(net, tmp_path / "task.safetensors")
    fresh = kind.net()
    assert load(fresh, path) is fresh
    assert torch.equal(fresh(x), net(x))
    assert all(value.requires_grad == (".segraft." in name) for name, value in fresh.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["conv2d"], indirect=True)
def test_other_precisions(kind, adapted, tmp_path, dtype):
    net = adapted(kind, "dora_c", dtype)
    path = save(net, tmp_path / "task.safetensors")
    assert torch.equal(load(kind.net(dtype), path)(kind.input(dtype)), net(kind.input(dtype)))
    with pytest.raises(BaseMismatchError):
        load(kind.net(), path)


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


SPEC = AdapterSpec("dora_c", rank=2, train=("3\\..*", "norm:.*"), ranks={"0": 3})
X = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)


@pytest.fixture
def net(randomise):
    net = randomise(graft(make(), SPEC))
    net.train()(X)
    return net.eval()


@pytest.fixture
def path(net, tmp_path):
    return save(net, tmp_path / "task.safetensors", record={"labels": ["spleen"], "spacing": [1.5, 1.5, 1.5]})


def test_everything_trained_is_in_the_file(net, path):
    fresh = load(make(), path).eval()
    assert torch.equal(fresh(X), net(X))
    assert set(adapter_tensors(net, "default")) == set(safetensors.torch.load_file(path))
    assert "1.running_mean.value" in adapter_tensors(net, "default")
    assert torch.equal(fresh[1].running_mean, net[1].running_mean)
    assert record_of(fresh).specs == {"default": SPEC}


def test_loaded_under_another_name_beside_others(net, path):
    graft(net, AdapterSpec("lora"), "mine")
    activate(net, "default")
    expected = net(X)
    activate(net, "mine")
    load(net, path, "theirs")
    assert torch.equal(net(X), expected)
    with pytest.raises(SegraftError, match="'theirs' is already grafted"):
        load(net, path, "theirs")


def test_an_inactive_adapter_can_be_saved_by_name(net, tmp_path):
    expected = net(X)
    graft(net, AdapterSpec("lora"), "other")
    path = save(net, tmp_path / "first", "default")
    assert torch.equal(load(make(), path).eval()(X), expected)


def test_the_header_is_read_without_the_tensors(path, monkeypatch):
    monkeypatch.setattr(safetensors.torch, "load_file", None)
    header = read_header(path)
    assert header.path == path
    assert header.spec == SPEC
    assert header.record == {"labels": ["spleen"], "spacing": [1.5, 1.5, 1.5]}
    assert header.fingerprint == fingerprint(make())
    assert header.version
    assert header.tensors["0.weight.m"] == (3,)
    assert header.tensors["3.weight.value"] == (2, 12)


def test_a_bare_layer_can_be_saved(tmp_path, randomise):
    torch.manual_seed(0)
    layer, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    fresh.load_state_dict(layer.state_dict())
    path = save(randomise(graft(layer, AdapterSpec("dora"))), tmp_path / "layer")
    assert torch.equal(load(fresh, path)(torch.ones(2)), layer(torch.ones(2)))


# What may be wrong with a file ---------------------------------------------------------------------------------------


def load_or_refuse(path) -> None:
    """Either is right, but nothing in between."""
    net = make()
    try:
        load(net, path)
    except SegraftError:
        refused(lambda: load(net, path), path)
        assert "_segraft" not in net.__dict__


def refused(act, *mentions: object) -> None:
    with pytest.raises(SegraftError) as error:
        act()
    message = str(error.value)
    assert message.endswith((".", "?"))
    assert "\n" not in message
    for mention in mentions:
        assert str(mention) in message


def rewrite(path, *, header=None, tensors=None, metadata=None) -> None:
    """Change what the header says, or which tensors there are."""
    with safetensors.safe_open(path, framework="pt") as file:
        old = json.loads(file.metadata()["segraft"])
    held = safetensors.torch.load_file(path)
    held = tensors(held) if tensors else held
    text = json.dumps(header(old) if header else old)
    safetensors.torch.save_file(held, path, metadata={"segraft": text} if metadata is None else metadata)


def test_a_missing_file(tmp_path):
    for gone in (tmp_path / "gone.safetensors", tmp_path):
        refused(lambda gone=gone: load(make(), gone), gone)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1, exclude_max=True))
@example(cut=0.0)
def test_a_truncated_file(path, tmp_path, cut):
    whole = path.read_bytes()
    short = tmp_path / "short.safetensors"
    short.write_bytes(whole[: int(cut * len(whole))])
    refused(lambda: read_header(short), short)
    refused(lambda: load(make(), short), short)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=200), length=st.booleans())
def test_random_bytes(tmp_path, junk, length):
    file = tmp_path / "junk.safetensors"
    file.write_bytes((struct.pack("<Q", len(junk)) if length else b"") + junk)
    refused(lambda: read_header(file), file)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"format": "pt"},
        {"segraft": "no json"},
        {"segraft": "[]"},
        {"segraft": "{}"},
        {"segraft": "null"},
        {"segraft": "3"},
    ],
)
def test_a_foreign_safetensors_file(path, metadata):
    rewrite(path, metadata=metadata)
    refused(lambda: read_header(path), path, "no adapter file")


TEXT = st.text(st.characters(categories=("L", "N", "P")), max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(["format", "version", "spec", "base", "record"]), value=JSON)
def test_a_header_with_any_other_value_is_read_or_refused(path, tmp_path, field, value):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    rewrite(copy, header=lambda header: {**header, field: value})
    load_or_refuse(copy)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(list(SPEC.to_dict())), value=JSON)
@example(field="ranks", value=["abc"])
@example(field="slices", value=[1])
@example(field="alpha", value="8")
@example(field="method", value="lora of tomorrow")
@example(field="targets", value=["middle"])
@example(field="targets", value=[3])
@example(field="targets", value=["("])
@example(field="slices", value={"3": [1]})
def test_a_spec_with_any_other_value_is_read_or_refused(path, tmp_path, field, value):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    rewrite(copy, header=lambda header: {**header, "spec": {**header["spec"], field: value}})
    load_or_refuse(copy)


def test_a_file_of_a_newer_version(path):
    rewrite(path, header=lambda header: {**header, "format": 99, "version": "9.0"})
    refused(lambda: load(make(), path), path, "segraft 9.0: update segraft")
    rewrite(path, header=lambda header: {**header, "format": 1, "spec": {**header["spec"], "routing": "v"}})
    refused(lambda: load(make(), path), path, "routing", "update segraft")


def drop(tensors):
    return {key: value for key, value in tensors.items() if key != "0.weight.B"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (drop, "1 tensors are missing, such as 0.weight.B"),
        (lambda t: {**t, "0.weight.C": torch.ones(1)}, "1 tensors are unexpected, such as 0.weight.C"),
        (lambda t: {**t, "0.weight.m": torch.ones(4)}, "1 tensors have another shape"),
        (
            lambda t: {**drop(t), "0.weight.b": t["0.weight.B"]},
            "are missing, such as 0.weight.B; 1 tensors are unexpected",
        ),
        (lambda t: {**t, "0.weight.m": t["0.weight.m"].to(torch.int32)}, "0.weight.m"),
        (lambda t: {**t, "0.weight.m": t["0.weight.m"].to(torch.complex64)}, "0.weight.m"),
    ],
    ids=["missing", "unexpected", "reshaped", "renamed", "integer", "complex"],
)
@pytest.mark.parametrize("occupied", [False, True])
def test_tampered_tensors_leave_the_network_as_it_was(path, tensors, message, occupied, snapshot, randomise):
    rewrite(path, tensors=tensors)
    net = make().eval()
    if occupied:
        randomise(graft(net, AdapterSpec("lora"), "mine"), "mine")
    before, expected = snapshot(net), net(X)
    refused(lambda: load(net, path), path, message)
    before.assert_holds(net)
    assert torch.equal(net(X), expected)


def test_another_base(path, snapshot):
    net = make()
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] += 1
    before = snapshot(net)
    with pytest.raises(BaseMismatchError, match=f"{fingerprint(make())[:16]}.*{fingerprint(net)[:16]}") as error:
        load(net, path)
    assert str(path) in str(error.value)
    assert isinstance(error.value, SegraftError)
    before.assert_holds(net)


# Saving --------------------------------------------------------------------------------------------------------------


def test_a_base_made_trainable_is_not_saved(net, tmp_path):
    net.get_submodule("3")._parameters["bias"].requires_grad_(True)
    refused(lambda: save(net, tmp_path / "task.safetensors"), "'3.bias' is trainable", "`train`")
    assert not list(tmp_path.iterdir())


def test_which_adapter_must_be_clear(net, tmp_path):
    refused(lambda: save(make(), tmp_path / "a"), "has no adapter")
    refused(lambda: save(net, tmp_path / "a", "other"), "no adapter is named 'other': this network has default")
    graft(net, AdapterSpec("lora"), "second")
    activate(net, ("default", "second"))
    refused(lambda: save(net, tmp_path / "a"), "say which adapter", "default, second")
    activate(net, None)
    refused(lambda: save(net, tmp_path / "a"), "say which adapter")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def half_written(monkeypatch):
    """half_written(error): from now on every write stops half-way with this error."""

    def stop(error: BaseException) -> None:
        def write(path: Path, data: bytes) -> int:
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
            raise error

        monkeypatch.setattr(Path, "write_bytes", write)

    return stop


def test_an_interrupted_write_leaves_no_file(net, tmp_path, half_written):
    half_written(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save(net, tmp_path / "task.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_and_one_sentence(net, path, half_written):
    before = path.read_bytes()
    half_written(OSError(errno.ENOSPC, "No space left on device"))
    refused(lambda: save(net, path), "No space left on device", "choose another output path")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_path_that_cannot_be_written(net, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    refused(lambda: save(net, tmp_path / "file" / "task.safetensors"), "file", "choose another output path")
    refused(lambda: save(net, tmp_path / "folder"), "folder")
    assert save(net, tmp_path / "new" / "folders" / "task.safetensors").is_file()


@pytest.mark.parametrize("record", [{"path": object()}, {"loss": float("nan")}], ids=["object", "nan"])
def test_a_record_that_is_no_json_is_refused(net, tmp_path, record):
    with pytest.raises((SegraftError, TypeError, ValueError)):
        save(net, tmp_path / "task.safetensors", record=record)
    assert not list(tmp_path.iterdir())


def test_the_same_adapter_gives_the_same_bytes(net, tmp_path):
    first, second = save(net, tmp_path / "a"), save(net, tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
