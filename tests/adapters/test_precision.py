"""Composition happens in float32 at least, whatever the base or autocast; the result is cast once."""

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, activate, graft, merge

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("method", ["conv_lora", "conv_dora"], indirect=True)
def test_the_update_is_added_in_float32_and_cast_once(dtype, method):
    torch.manual_seed(0)
    net = graft(nn.Sequential(nn.Conv2d(16, 16, 3)).to(dtype), AdapterSpec(method, rank=8, alpha=8))
    edit = net[0].segraft["default"]["weight"]
    assert all(value.dtype == torch.float32 for value in edit.parameters())
    with torch.no_grad():
        edit.B.normal_(std=2e-2)
    w0 = net.state_dict()["0.weight"]
    delta = torch.einsum("or,rixy->oixy", edit.B, edit.A)
    exact = w0.float() + delta
    if edit.m is not None:
        exact = edit.m.reshape(-1, 1, 1, 1) * exact / exact.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    weight = net[0].weight
    assert weight.dtype == dtype
    # Half a unit in the last place is all that one rounding can cost (and a hair for the order of float32 sums).
    unit = torch.finfo(dtype).eps * exact.abs().log2().floor().exp2()
    assert ((weight.float() - exact).abs() <= 0.5001 * unit + 1e-7).all()
    if edit.m is None:
        assert torch.equal(weight, exact.to(dtype))
        assert not torch.equal(weight, w0 + delta.to(dtype))


def test_two_updates_that_bfloat16_would_lose_one_by_one():
    """Beside 1.0 the next bfloat16 is 1.0078: 0.003 is lost, twice 0.003 is not."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False)).to(torch.bfloat16)
    net[0].weight.data.fill_(1)
    for name in ("a", "b"):
        edit = graft(net, AdapterSpec("lora", rank=1, alpha=1), name)[0].segraft[name]["weight"]
        edit.A.data.fill_(1)
        edit.B.data.fill_(0.003)
        assert net[0].weight == 1
    activate(net, ("a", "b"))
    assert net[0].weight == 1.0078125
    merge(net)
    assert net[0].weight == 1.0078125
    assert net[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_row_blocks_and_biases_add_up_in_float32(dtype):
    net = nn.Sequential(nn.Linear(2, 2)).to(dtype)
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[0].bias.fill_(1)
    eps = torch.finfo(dtype).eps
    for name in ("a", "b"):
        spec = AdapterSpec("lora", rank=1, alpha=1, bias="low_rank", slices={"0": "2/2"})
        edits = graft(net, spec, name)[0].segraft[name]
        edits["weight_1_2"].A.data.fill_(1)
        edits["weight_1_2"].B.data.fill_(0.4 * eps)
        edits["bias_1_2"].beta.data.fill_(0.4 * eps)
    activate(net, ("a", "b"))
    assert net[0].weight.tolist() == [[1, 1], [1 + eps, 1 + eps]]
    assert net[0].bias.tolist() == [1, 1 + eps]


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_does_not_reach_the_composition(kind, method, adapted, dtype):
    net = adapted(kind, method, torch.float32, bias="low_rank")
    for layer in net.modules():
        for tensor in layer.segraft.edited() if hasattr(layer, "segraft") else ():
            exact = getattr(layer, tensor)
            with torch.autocast("cpu", dtype):
                assert getattr(layer, tensor).dtype == torch.float32
                assert torch.equal(getattr(layer, tensor), exact)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d-groups", "attention"], indirect=True)
def test_merged_equals_unmerged_under_autocast(kind, method, adapted):
    net, x = adapted(kind, method, torch.float32), kind.input()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = net(x)
    merge(net)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(net(x), expected)


@pytest.mark.parametrize("kind", ["linear", "conv2d"], indirect=True)
def test_factors_train_under_autocast(kind, method):
    net = graft(kind.net(), kind.spec(method))
    with torch.autocast("cpu", torch.bfloat16):
        net(kind.input()).float().square().sum().backward()
    for name, value in net.named_parameters():
        if value.requires_grad:
            assert value.grad.dtype == torch.float32, name
            assert value.grad.isfinite().all(), name


def test_double_precision_stays_double(kind, method, adapted):
    net = adapted(kind, method, torch.float64, bias="low_rank")
    assert {value.dtype for value in net.parameters()} == {torch.float64}
    assert net(kind.input(torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_network_converted_after_grafting_still_composes_in_float32(dtype):
    """Then the factors are low precision too: products of them must not be."""
    torch.manual_seed(0)
    net = graft(nn.Sequential(nn.Linear(32, 32, bias=False)), AdapterSpec("lora", rank=16, alpha=16)).to(dtype)
    edit = net[0].segraft["default"]["weight"]
    edit.B.data.normal_(std=0.1)
    exact = net.state_dict()["0.weight"].float() + edit.B.float() @ edit.A.float()
    assert torch.equal(net[0].weight, exact.to(dtype))
