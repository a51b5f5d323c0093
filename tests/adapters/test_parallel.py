"""The update beside the frozen weight: what it keeps exact, what it does not form, and where it must not be used."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from segraft.adapters import AdapterSpec, activate, graft
from segraft.adapters.choosing import cheapest
from segraft.adapters.composing import channel_norm, compose
from segraft.adapters.execution import execution
from segraft.adapters.grafted import base_tensor, grafts_of
from segraft.adapters.parallel import ParallelLayer, norm_of_sum
from segraft.adapters.stages import chain
from segraft.adapters.stock import operator_of

METHODS = ["lora_c", "conv_lora", "cp_lora", "dora_c", "conv_dora", "cp_dora"]


def adapted(layer, method="dora_c", *, scale=0.3, **options):
    net = graft(nn.Sequential(layer), AdapterSpec(method, **{"rank": 2, **options}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if ".segraft." in name:
                value.add_(scale * torch.randn(value.shape, generator=generator).to(value))
    return net


def edit_of(net, name="default"):
    return grafts_of(net[0]).edits(name)["weight"]


def ran(net, x, way=None):
    """The name of the function that a call of a net of one layer went through."""
    with execution(way):
        return type(net(x).grad_fn).__name__.removesuffix("Backward")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda bias: nn.Conv2d(20, 36, 3, padding=1, bias=bias), (2, 20, 9, 7)),
        (lambda bias: nn.Conv3d(20, 33, 3, padding=1, bias=bias), (1, 20, 4, 5, 6)),
        (lambda bias: nn.Conv2d(20, 36, 3, stride=2, bias=bias), (2, 20, 9, 7)),
        (lambda bias: nn.Linear(20, 36, bias=bias), (5, 20)),
    ],
    ids=["conv2d", "conv3d", "strided2d", "linear"],
)
def test_at_the_start_the_output_is_the_bases_bit_for_bit(make, shape, bias, method):
    torch.manual_seed(0)
    plain, x = make(bias), torch.randn(shape)
    net = graft(nn.Sequential(copy.deepcopy(plain)), AdapterSpec(method, rank=2))
    with execution("parallel"):
        y = net(x)
    assert isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction)
    assert torch.equal(y, plain(x))


@given(st.integers(0, 10_000), st.sampled_from([1e-30, 1e-3, 1.0, 1e3]), st.booleans(), st.sampled_from([2, 40]))
@settings(max_examples=60, deadline=None)
def test_the_norm_is_that_of_the_composed_weight(seed, scale, zeros, rank):
    generator = torch.Generator().manual_seed(seed)
    net = adapted(nn.Conv2d(3, 5, 3).double(), "dora_c", rank=rank)
    edit = edit_of(net)
    with torch.no_grad():
        for factor in edit.factors():
            factor.copy_(torch.randn(factor.shape, generator=generator))
        edit.factors()[0].mul_(scale)
        base = torch.randn(5, 3, 3, 3, generator=generator, dtype=torch.float64)
        if zeros:
            base[1] = 0  # a channel of which W0 has nothing
        update = edit.matrices()
        found, _ = norm_of_sum(base, channel_norm(base, edit.slot, None), update)
        _, expected = compose(base, update, edit.m, edit.slot, None)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0 if scale > 1e-20 else 1e-300)


@pytest.mark.parametrize("method", ["dora_c", "conv_dora"])
def test_a_channel_of_zeros_stays_one(method):
    layer = nn.Conv2d(4, 6, 3, padding=1).double()
    with torch.no_grad():
        layer.weight[2] = 0
    net, x = graft(nn.Sequential(layer), AdapterSpec(method, rank=2)), torch.randn(1, 4, 5, 5, dtype=torch.float64)
    for way in ("composed", "parallel"):
        net.zero_grad()
        with execution(way):
            y = net(x)
            y.square().sum().backward()
        assert torch.equal(y[:, 2], layer._parameters["bias"][2].detach().expand_as(y[:, 2]))
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_no_tensor_of_the_weights_size_is_kept(method):
    net, x = adapted(nn.Conv2d(40, 44, 3, padding=1), method), torch.randn(1, 40, 5, 5)
    base = base_tensor(net[0], "weight")
    with execution("parallel"):
        kept = net(x).grad_fn.saved_tensors
    large = [value for value in kept if value is not None and value.numel() >= base.numel()]
    assert [value.data_ptr() for value in large] == [base.data_ptr()]


@pytest.mark.parametrize("method", METHODS)
def test_it_is_chosen_where_weights_outnumber_activations(method):
    torch.manual_seed(0)
    deep = adapted(nn.Conv2d(512, 512, 3, padding=1), method, rank=8, scale=0.01)
    for size, expected in ((8, True), (64, False)):
        x = torch.randn(1, 512, size, size)
        operator, _ = operator_of(deep[0], x)
        edit = edit_of(deep)
        shape = tuple(base_tensor(deep[0], "weight").shape)
        ways = cheapest(operator, chain(edit.contraction), 8, x, shape, magnitude=edit.m is not None)
        assert (ways[0] == "parallel") is expected
    assert ran(deep, torch.randn(1, 512, 8, 8)) == "ParallelLayer"


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (lambda: adapted(nn.ConvTranspose2d(4, 6, 2, stride=2)), lambda: torch.randn(1, 4, 5, 5)),
        (lambda: adapted(nn.Conv2d(4, 6, 3).bfloat16()), lambda: torch.randn(1, 4, 5, 5).bfloat16()),
        (
            lambda: graft(adapted(nn.Conv2d(4, 6, 3)), AdapterSpec("lora", rank=1), "second"),
            lambda: torch.randn(1, 4, 5, 5),
        ),
    ],
    ids=["transposed", "bf16", "a stack"],
)
def test_where_it_cannot_be_another_way_is_taken(net, x):
    net, x = net(), x()
    if len(grafts_of(net[0])) > 1:
        activate(net, ["default", "second"])
        edit_of(net).requires_grad_(requires_grad=False)
    assert ran(net, x, "parallel") == "AdaptedLayer"


def test_under_autocast_another_way_is_taken():
    net, x = adapted(nn.Conv2d(4, 6, 3)), torch.randn(1, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert ran(net, x, "parallel") == "AdaptedLayer"


@pytest.mark.parametrize("method", ["conv_lora", "dora_c"])
def test_within_a_checkpoint_the_gradients_are_the_same(method):
    net, x = adapted(nn.Conv2d(4, 6, 3).double(), method), torch.randn(1, 4, 5, 5, dtype=torch.float64)

    def gradients(forward, way):
        net.zero_grad()
        with execution(way):
            forward(x.detach().requires_grad_()).square().sum().backward()
        return [value.grad.clone() for value in net.parameters() if value.requires_grad]

    expected = gradients(net, "composed")
    for reentrant in (True, False):
        found = gradients(lambda x, r=reentrant: checkpoint(net, x, use_reentrant=r), "parallel")
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_norm_of_a_base_that_changes_is_measured_again(overwrite):
    net, x = adapted(nn.Conv2d(4, 6, 3).double()), torch.randn(1, 4, 5, 5, dtype=torch.float64)
    with execution("parallel"):
        net(x)
    base = base_tensor(net[0], "weight")
    new = torch.randn_like(base)
    overwrite(net, new)
    with execution("parallel"):
        found = net(x)
    with execution("composed"):
        torch.testing.assert_close(found, net(x), rtol=1e-10, atol=1e-10)


def test_what_was_measured_of_the_base_is_not_copied_along():
    net = adapted(nn.Conv2d(4, 6, 3))
    with execution("parallel"):
        net(torch.randn(1, 4, 5, 5))
    assert grafts_of(net[0]).derived
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not grafts_of(other[0]).derived


def test_float32_agrees_with_the_merged_weight_to_rounding():
    torch.manual_seed(0)
    net, x = adapted(nn.Conv2d(64, 64, 3, padding=1), scale=0.05), torch.randn(1, 64, 8, 8)
    with execution("parallel"):
        found = net(x)
    assert isinstance(found.grad_fn, ParallelLayer._backward_cls)
    with torch.no_grad():
        merged = net.eval()(x)
    torch.testing.assert_close(found, merged, rtol=1e-5, atol=1e-5)
