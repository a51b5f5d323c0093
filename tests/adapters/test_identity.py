"""A fresh adapter computes what the base computes, bit for bit."""

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, activate, graft


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_fresh_adapter_changes_no_bit_of_the_output(kind, method, train):
    net, x = kind.net().train(train), kind.input()
    with_grad = net(x)
    # torch.matmul rounds differently for a weight that requires no gradient, and a composed one under no_grad is one.
    net.requires_grad_(False)
    with torch.no_grad():
        without_grad = net(x)
    net.requires_grad_(True)
    graft(net, kind.spec(method))
    assert torch.equal(net(x), with_grad)
    with torch.no_grad():
        assert torch.equal(net(x), without_grad)


@pytest.mark.parametrize("bias", ["low_rank", "train"])
def test_adapted_biases_start_at_the_base(kind, bias):
    net, x = kind.net(), kind.input()
    expected = net(x)
    graft(net, kind.spec("dora_c", bias=bias))
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d-groups", "conv3d"], indirect=True)
def test_identity_in_other_precisions(kind, method, dtype):
    net, x = kind.net(dtype), kind.input(dtype)
    expected = net(x)
    graft(net, kind.spec(method))
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("kind", ["conv2d", "kernel1-2d", "transposed2d-groups"], indirect=True)
def test_identity_with_channels_last(kind, method):
    net = kind.net().to(memory_format=torch.channels_last)
    x = kind.input().to(memory_format=torch.channels_last)
    expected = net(x)
    graft(net, kind.spec(method))
    assert torch.equal(net(x), expected)


def test_identity_of_a_channel_of_zeros(method):
    net = nn.Sequential(nn.Conv2d(4, 3, 3))
    with torch.no_grad():
        net[0].weight[1] = 0
    x = torch.randn(1, 4, 5, 5)
    expected = net(x)
    spec = AdapterSpec("none", factorisation="tucker") if method == "tucker" else AdapterSpec(method)
    assert torch.equal(graft(net, spec)(x), expected)


def test_a_transformer_layer_on_its_fast_path():
    """In evaluation torch runs the whole layer as one kernel, which is handed the weights."""
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = net(x)
        graft(net, AdapterSpec("dora"))
        assert torch.equal(net(x), expected)
        net.linear1.segraft["default"]["weight"].B.add_(1)
        assert not torch.equal(net(x), expected)


def test_the_same_seed_gives_the_same_factors_and_the_global_state_is_left_alone(kind):
    state = torch.get_rng_state()
    first, second, other = (kind.net() for _ in range(3))
    graft(first, kind.spec("cp_lora"), seed=7)
    graft(second, kind.spec("cp_lora"), seed=7)
    graft(other, kind.spec("cp_lora"), seed=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [("fused-key-value", "qkv.weight"), ("attention-key-value", "attention.in_proj_weight")],
    indirect=["kind"],
)
def test_row_blocks_leave_the_query_alone(kind, tensor, method, adapted):
    net = adapted(kind, method, torch.float32)
    base = kind.net().get_parameter(f"0.{tensor}")
    layer_name, _, name = tensor.partition(".")
    value = getattr(net[0].get_submodule(layer_name), name)
    assert torch.equal(value[:4], base[:4])
    assert (value[4:8] != base[4:8]).all()
    assert (value[8:] != base[8:]).all()


def test_the_base_is_one_activation_away(kind, method, adapted):
    net, x = adapted(kind, method), kind.input(torch.float64)
    base = kind.net(torch.float64).requires_grad_(False)(x)
    with torch.no_grad():
        changed = net(x)
        activate(net, None)
        assert torch.equal(net(x), base)
        activate(net, "default")
        assert torch.equal(net(x), changed)
        assert not torch.allclose(changed, base)
