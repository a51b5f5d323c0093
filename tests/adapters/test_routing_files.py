"""Adapters per channel: copies and files."""

import copy
import io
import pickle

import pytest
import torch
from tests.adapters.routes import CHANNELS, NETS, ROUTE, build, images, spec_of

from segraft.adapters import AdapterSpec, load, read_header, routed, save
from segraft.adapters.graft import grafted_layers
from segraft.adapters.grafted import grafts_of


@pytest.mark.parametrize("kind", ["attention", "convolution"])
def test_copies(kind):
    net, x = build(kind, spec_of("dora_c")), torch.cat(images(kind))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with routed(ROUTE):
            assert torch.equal(other(x), net(x))
    held = io.BytesIO()
    torch.save(net, held)
    held.seek(0)
    with routed(ROUTE):
        assert torch.equal(torch.load(held, weights_only=False)(x), net(x))


@pytest.mark.parametrize("method", ["dora_c", "gated"])
def test_files(method, tmp_path):
    net, x = build("convolution", spec_of(method)), torch.cat(images("convolution"))
    if method == "gated":
        with torch.no_grad():
            for _, layer in grafted_layers(net):
                for edit in grafts_of(layer).channel_edits():
                    edit.v[: edit.channel] = 0
    path = save(net, tmp_path / "task.safetensors")
    header = read_header(path)
    assert header.spec == spec_of(method)
    assert {key.split(".")[1] for key in header.tensors if key.startswith("0.")} == {
        f"weight_channel{c}" for c in range(CHANNELS)
    }
    torch.manual_seed(3)
    other = load(NETS["convolution"][0]().double(), path)
    with routed(ROUTE):
        torch.testing.assert_close(other(x), net(x))


def test_one_set_of_factors_is_saved_as_before():
    assert "channels" not in AdapterSpec("rs_lora").to_dict()
    assert AdapterSpec.from_dict(spec_of("rs_lora").to_dict()) == spec_of("rs_lora")
