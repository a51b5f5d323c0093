"""Adapters per channel in one pass, held against switching: an ordinary adapter per channel, one channel at a time."""

import copy

import pytest
import torch
from tests.adapters.routes import (
    CHANNELS,
    NETS,
    ROUTE,
    SPECS,
    assert_alike,
    build,
    images,
    of_one_pass,
    of_switching,
    spec_of,
    switched,
)
from torch import nn

from segraft.adapters import (
    AdapterSpec,
    activate,
    activated,
    adapter_tensors,
    graft,
    prune,
    ranks_in_use,
    require_gradients,
    routed,
    ungraft,
)
from segraft.adapters.graft import grafted_layers
from segraft.adapters.grafted import grafts_of
from segraft.errors import SegraftError

EVERY = pytest.mark.parametrize("kind", NETS)
METHODS = pytest.mark.parametrize("method", SPECS)


@EVERY
@METHODS
def test_one_pass_is_dynamic_switching(kind, method):
    spec = spec_of(method)
    net, x = build(kind, spec), images(kind)
    other = switched(net, spec)
    for mode in (True, False):
        net.train(mode), other.train(mode)
        net.zero_grad(), other.zero_grad()
        y, gradients = of_one_pass(net, x)
        y_of_loop, gradients_of_loop = of_switching(other, x)
        torch.testing.assert_close(y, y_of_loop)
        assert_alike(gradients, gradients_of_loop)
    with torch.no_grad(), routed(ROUTE):
        torch.testing.assert_close(net(torch.cat(x)), y_of_loop)


@EVERY
@pytest.mark.parametrize("method", ["rs_lora", "dora"])
def test_in_single_precision(kind, method):
    spec = spec_of(method)
    net, x = build(kind, spec, dtype=torch.float32), images(kind, torch.float32)
    other = switched(net, spec)
    (y, gradients), (y_of_loop, gradients_of_loop) = of_one_pass(net, x), of_switching(other, x)
    torch.testing.assert_close(y, y_of_loop, rtol=1e-5, atol=1e-5)
    assert_alike(gradients, gradients_of_loop, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["rs_lora", "dora", "gated"])
def test_row_blocks_of_a_fused_weight(method):
    spec = spec_of(method, targets=r".*qkv", slices={r".*qkv": ("2/3", "3/3")})
    net, x = build("attention", spec), images("attention")
    assert "1.qkv.weight_4_8_channel0" in {key.rpartition(".")[0] for key in adapter_tensors(net, "default")}
    other = ungraft(copy.deepcopy(net))
    (y, gradients), base = of_one_pass(net, x), other(torch.cat(x))
    assert not torch.allclose(y, base)
    options = {"rank": 2, "targets": r".*qkv", "slices": {r".*qkv": ("2/3", "3/3")}, **SPECS[method]}
    for channel in range(CHANNELS):
        graft(other, AdapterSpec(**options), f"c{channel}")
        with torch.no_grad():
            for key, value in adapter_tensors(other, f"c{channel}").items():
                edit, _, name = key.rpartition(".")
                value.copy_(adapter_tensors(net, "default")[f"{edit}_channel{channel}.{name}"])
    y_of_loop, gradients_of_loop = of_switching(other, x)
    torch.testing.assert_close(y, y_of_loop)
    assert_alike(gradients, gradients_of_loop)


@EVERY
@pytest.mark.parametrize("method", ["rs_lora", "dora", "dora_c"])
def test_a_fresh_adapter_changes_nothing(kind, method):
    torch.manual_seed(3)
    net = NETS[kind][0]().eval()
    x = torch.cat(images(kind, torch.float32))
    before = net(x).detach()
    graft(net, spec_of(method))
    with routed(ROUTE):
        after = net(x)
    if kind == "other":
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)  # blocks are convolved one by one
    else:
        assert torch.equal(after, before)
    assert torch.equal(ungraft(net)(x), before)


@EVERY
def test_the_gradient_of_the_input(kind):
    spec = spec_of("dora_c")
    net, x = build(kind, spec), [value.requires_grad_() for value in images(kind)]
    of_one_pass(net, x)
    found = [value.grad for value in x]
    for value in x:
        value.grad = None
    of_switching(switched(net, spec), x)
    for each, value in zip(found, x, strict=True):
        torch.testing.assert_close(each, value.grad)


@pytest.mark.parametrize("kind", ["linear", "convolution", "other"])
def test_channels_that_are_not_there_get_gradients_of_zero(kind):
    net, x = build(kind, spec_of("rs_lora")), images(kind)
    with routed([1]):
        y = net(x[0])
    y.square().mean().backward()
    require_gradients(net)
    for key, value in adapter_tensors(net, "default").items():
        assert (value.grad.abs().sum() > 0) == ("_channel1." in key), key
    other = switched(net, spec_of("rs_lora"))
    activate(other, "c1")
    torch.testing.assert_close(y, other(x[0]))


def test_a_channel_may_come_twice():
    net, x = build("linear", spec_of("rs_lora")), images("linear")
    with routed([1, 1, 0]):
        y = net(torch.cat(x)).chunk(3)
    with routed([1]):
        torch.testing.assert_close(torch.cat(y[:2]), net(torch.cat(x[:2])))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_on_top_of_another_adapter_and_of_what_is_trained_whole(kind):
    """The first adapter is shared by all channels, and both train (but under a weight that is trained whole)."""
    net = build(kind, AdapterSpec("lora_c", rank=2), "shared")
    graft(net, spec_of("rs_lora", targets=r"\d", train=r"0\.(weight|bias)"))
    with torch.no_grad():
        for value in adapter_tensors(net, "default").values():
            value.add_(0.1 * torch.randn_like(value))
    activate(net, ["shared", "default"])
    x = images(kind)
    y, gradients = of_one_pass(net, x)
    shared = {key: value for key, value in adapter_tensors(net, "shared").items() if not key.startswith("0.weight.")}
    found = gradients | {f"shared.{key}": value.grad for key, value in shared.items()}
    net.zero_grad()
    outputs = []
    for channel, own in zip(ROUTE, x, strict=True):
        with routed([channel]):
            outputs.append(net(own))
    torch.cat(outputs).square().mean().backward()
    again = {key: value.grad for key, value in adapter_tensors(net, "default").items()}
    again |= {f"shared.{key}": value.grad for key, value in shared.items()}
    torch.testing.assert_close(y, torch.cat(outputs).detach())
    assert_alike(found, again)
    assert all(value.abs().sum() > 0 for value in found.values())
    with pytest.raises(SegraftError, match=r"'default' has a weight per channel .* last of the stack"):
        activate(net, ["default", "shared"])
    with activated(net, "shared"):
        net(x[0])  # needs no order of channels
    with routed(ROUTE), activated(net, None):
        assert torch.equal(net(x[0]), ungraft(copy.deepcopy(net))(x[0]))


@pytest.mark.parametrize("kind", ["linear", "convolution", "other"])
def test_pruned_channels_of_different_ranks(kind):
    net, x = build(kind, spec_of("gated", rank=3)), images(kind)
    with torch.no_grad():
        for _, layer in grafted_layers(net):
            for edit in grafts_of(layer).channel_edits():
                edit.v[: {0: 3, 1: 1, 2: 0}[edit.channel]] = 0
    with torch.no_grad(), routed(ROUTE):
        before = net(torch.cat(x))
        used = ranks_in_use(net)
        assert used.used == (0 + 2 + 3) * len(list(grafted_layers(net)))
        prune(net)
        torch.testing.assert_close(net(torch.cat(x)), before)
    y, gradients = of_one_pass(net, x)
    torch.testing.assert_close(y, before)
    assert all(value is not None for value in gradients.values())


def test_a_channel_of_zeros_with_a_magnitude():
    """A row of zeros in the base has a norm of zero: no gradient may become NaN."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        net[0].weight[1] = 0
    graft(net, spec_of("dora"))
    with routed(ROUTE):
        net(torch.randn(6, 4)).square().sum().backward()
    for value in adapter_tensors(net, "default").values():
        assert torch.isfinite(value.grad).all()


def test_the_inner_block_counts():
    net, x = build("linear", spec_of("rs_lora")), images("linear")
    with routed([0]):
        first = net(x[0])
        with routed([1]):
            assert not torch.allclose(net(x[0]), first)
        assert torch.equal(net(x[0]), first)
