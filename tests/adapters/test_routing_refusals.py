"""Adapters per channel: what they count and which layers they are for, and what is refused."""

import pytest
import torch
from tests.adapters.routes import ROUTE, build, images, linear, spec_of
from torch import Tensor, nn

from segraft.adapters import AdapterSpec, activate, graft, merge, parameter_table, routed, ungraft
from segraft.adapters.graft import grafted_layers
from segraft.adapters.grafted import grafts_of
from segraft.errors import SegraftError


def test_counts():
    net = graft(linear(), AdapterSpec("rs_lora", rank=2, channels=4))
    assert parameter_table(net).of("default") == 4 * 2 * (5 + 4 + 4 + 6)
    layer = grafts_of(net[0]).channel_edits()
    assert not any(torch.equal(layer[0].A, other.A) for other in layer[1:])  # each its own start


def test_errors_of_a_call():
    net, x = build("linear", spec_of("rs_lora")), torch.cat(images("linear"))
    with pytest.raises(SegraftError, match=r"Linear layer of \(4, 5\) .* called without their order"):
        net(x)
    with routed([0, 1, 3]), pytest.raises(SegraftError, match=r"names channel 3, .* channels 0 to 2"):
        net(x)
    with routed([0, 1, 2, 0]), pytest.raises(SegraftError, match=r"given \(6, 7, 5\), .* not 4 equal blocks"):
        net(x)
    with pytest.raises(SegraftError, match="there is not one weight to be read"):
        net[0].weight  # noqa: B018
    image = build("convolution", spec_of("rs_lora"))
    with routed([0]), pytest.raises(SegraftError, match="not 1 equal blocks"):
        image(torch.zeros(1, 8, 8).double())
    up = build("other", spec_of("rs_lora"))[2]
    with routed([0]), pytest.raises(SegraftError, match="more than its input"):
        up(torch.zeros(1, 4, 3, 3).double(), output_size=(7, 7))


@pytest.mark.parametrize("channels", [[], [-1], [True], [0.0]])
def test_no_channels(channels):
    with pytest.raises(SegraftError, match="name the channel of every block"), routed(channels):
        pass


def test_a_merge_is_refused():
    net = build("linear", spec_of("rs_lora"))
    with pytest.raises(SegraftError, match=r"a weight per channel .* keep it as an adapter"):
        merge(net)
    with routed(ROUTE):
        net(torch.cat(images("linear")))  # as it was
    activate(net, None)
    merge(net)


@pytest.mark.parametrize("bias", ["low_rank", "train"])
def test_biases_are_refused(bias):
    with pytest.raises(SegraftError, match=f"bias '{bias}' goes with one set of factors"):
        AdapterSpec("lora", channels=2, bias=bias)


@pytest.mark.parametrize("channels", [0, True, 2.0])
def test_impossible_numbers_of_channels(channels):
    with pytest.raises(SegraftError, match="channels is"):
        AdapterSpec("lora", channels=channels)
    with pytest.raises(SegraftError, match="no factors"):
        AdapterSpec("none", channels=2, train="0")


def test_layers_that_have_no_channels():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for layer, kind in ((nn.MultiheadAttention(4, 2), "MultiheadAttention"), (Scaled(4, 4), "Scaled")):
        net = nn.Sequential(layer, nn.Identity())
        with pytest.raises(SegraftError, match=rf"layer '0' \({kind}\) cannot have an adapter per channel"):
            graft(net, AdapterSpec("lora", channels=2, targets="0"))
        assert all(value.requires_grad for value in net.parameters())


def test_the_networks_channels():
    net = linear()
    net.image_channels = 4
    with pytest.raises(SegraftError, match="takes images of 4 channels, and the adapter is for 3"):
        graft(net, spec_of("rs_lora"))
    graft(net, AdapterSpec("rs_lora", rank=1))  # one set of factors for all


def test_targets_are_the_encoder_unless_named():
    net = nn.Sequential(linear(), nn.Linear(6, 2))
    net.parts = {"encoder": ("0",), "decoder": ("1",)}
    graft(net, spec_of("rs_lora"))
    assert {name for name, layer in grafted_layers(net) if grafts_of(layer).channel_edits()} == {"0.0", "0.3"}
    ungraft(net)
    graft(net, spec_of("rs_lora", train=("decoder", r"0\.0\.weight")))
    assert {name for name, layer in grafted_layers(net) if grafts_of(layer).channel_edits()} == {"0.3"}
