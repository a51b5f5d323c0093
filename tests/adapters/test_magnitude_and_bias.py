"""Magnitudes sit on true output channels, and biases train in three ways."""

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, graft
from segraft.adapters.edits import BiasFactor
from segraft.adapters.layers import WeightSlot, channel_norm


def norm_by_output_channel(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Channel by channel, all weights that the layer multiplies to produce it."""
    transposed, groups = getattr(layer, "transposed", False), getattr(layer, "groups", 1)
    if not transposed:
        return torch.stack([weight[channel].square().sum().sqrt() for channel in range(weight.shape[0])])
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    norms = []
    for channel in range(outputs * groups):
        group, within = divmod(channel, outputs)
        squares = sum(weight[group * inputs + i, within].square().sum() for i in range(inputs))
        norms.append(squares.sqrt())
    return torch.stack(norms)


LAYERS = [
    "linear",
    "conv1d",
    "conv3d",
    "depthwise3d-multiplied",
    "conv2d-groups",
    "transposed1d",
    "transposed2d",
    "transposed3d",
    "transposed1d-groups",
    "transposed2d-groups",
    "transposed3d-groups",
    "depthwise-transposed",
    "transposed2d-all",
]


@pytest.mark.parametrize("shape", [(6, 5, 2, 2), (6, 5, 3, 3, 2), (1, 5, 2), (6, 5, 4, 4), (6, 1, 2, 2)])
def test_norms_of_transposed_weights(shape):
    """Also of a channel of zeros, which has a norm that can be divided by, and no gradient."""
    weight = torch.randn(shape, dtype=torch.float64)
    weight[:, -1] = 0
    slot = WeightSlot("weight", None, transposed=True)
    expected = weight.transpose(0, 1).flatten(1).square().sum(1).sqrt()
    torch.testing.assert_close(channel_norm(weight, slot, None), expected)
    assert float(channel_norm(weight, slot, None).min()) > 0
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(channel_norm(weight, slot, None).sum(), weight)
    there = expected.clamp_min(1e-300).view(-1, *(1 for _ in shape[2:]))
    torch.testing.assert_close(gradient, weight.detach() / there)


def test_what_is_no_number_has_no_norm():
    weight = torch.ones(4, 3, 2, 2)
    weight[1, 2, 0, 1] = torch.nan
    assert channel_norm(weight, WeightSlot("weight", None, transposed=True), None).isnan().tolist() == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("kind", LAYERS, indirect=True)
def test_the_adapted_weight_has_the_magnitudes_as_norms(kind, adapted):
    net = adapted(kind, "dora_c")
    base = kind.net(torch.float64)[0]
    start = graft(kind.net(torch.float64), kind.spec("dora_c"))[0].segraft["default"]["weight"].m
    torch.testing.assert_close(start, norm_by_output_channel(base, base.weight))
    m = net[0].segraft["default"]["weight"].m
    torch.testing.assert_close(norm_by_output_channel(base, net[0].weight), m.abs())


@pytest.mark.parametrize("kind", [name for name in LAYERS if name != "linear"], indirect=True)
def test_a_magnitude_moves_its_own_output_channel_alone(kind):
    net, x = graft(kind.net(torch.float64), kind.spec("conv_dora")), kind.input(torch.float64)
    edit, bias = net[0].segraft["default"]["weight"], net[0].bias
    shift = 0 if bias is None else bias.reshape(-1, *[1] * (x.ndim - 2))
    before = net(x) - shift
    for channel in range(edit.m.numel()):
        with torch.no_grad():
            edit.m[channel] *= 3
            after = net(x) - shift
            edit.m[channel] /= 3
        expected = before.clone()
        expected[:, channel] *= 3
        torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("kind", LAYERS, indirect=True)
def test_magnitudes_over_the_first_stored_dimension(kind, randomise):
    """As Table 3 of the haemorrhage paper counts them: for transposed layers that is the input side."""
    net = graft(kind.net(torch.float64), kind.spec("dora_c", magnitude_dim=0))
    edit = net[0].segraft["default"]["weight"]
    weight = kind.net(torch.float64)[0].weight
    assert edit.m.shape == (weight.shape[0],)
    torch.testing.assert_close(edit.m, weight.flatten(1).norm(dim=1))
    randomise(net)
    torch.testing.assert_close(net[0].weight.flatten(1).norm(dim=1), edit.m.abs())


def test_magnitude_of_row_blocks(randomise):
    net = nn.Sequential(nn.Linear(4, 6)).double()
    base = net[0].weight.detach().clone()
    randomise(graft(net, AdapterSpec("dora", slices={"0": "2/3"})))
    edit = net[0].segraft["default"]["weight_2_4"]
    assert edit.m.shape == (2,)
    torch.testing.assert_close(net[0].weight[2:4].norm(dim=1), edit.m.abs())
    assert torch.equal(net[0].weight[[0, 1, 4, 5]], base[[0, 1, 4, 5]])


def test_frozen_biases_have_no_factors():
    net = graft(nn.Sequential(nn.Linear(2, 3)), AdapterSpec("lora"))
    assert set(net[0].segraft["default"]._modules) == {"weight"}


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d-groups", "transposed3d"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"alpha": 0.5}, {"scale": "alpha/sqrt(r)"}], ids=str)
def test_low_rank_biases(kind, options, adapted):
    net = adapted(kind, "lora", bias="low_rank", rank=3, **options)
    b0 = kind.net(torch.float64)[0].bias
    beta = net[0].segraft["default"]["bias"].beta
    assert beta.shape == (3, b0.shape[0])
    scaling = kind.spec("lora", rank=3, **options).scaling(3)
    expected = torch.stack([b0[o] + scaling * sum(beta[r, o] for r in range(3)) for o in range(b0.shape[0])])
    torch.testing.assert_close(net[0].bias, expected)


def test_low_rank_biases_of_row_blocks(randomise):
    net = nn.Sequential(nn.Linear(4, 6)).double()
    b0 = net[0].bias.detach().clone()
    randomise(graft(net, AdapterSpec("lora", rank=2, bias="low_rank", slices={"0": ("2/3", "3/3")})))
    edits = net[0].segraft["default"]
    assert torch.equal(net[0].bias[:2], b0[:2])
    torch.testing.assert_close(net[0].bias[2:4], b0[2:4] + 2 * edits["bias_2_4"].beta.sum(0))
    torch.testing.assert_close(net[0].bias[4:], b0[4:] + 2 * edits["bias_4_6"].beta.sum(0))


def test_whole_biases(randomise):
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 3, bias=False))
    b0 = net[0].bias.detach().clone()
    randomise(graft(net, AdapterSpec("lora", bias="train")))
    assert torch.equal(net[0].bias, net[0].segraft["default"]["bias"].value)
    assert not torch.equal(net[0].bias, b0)
    assert torch.equal(net[0].state_dict()["bias"], b0)
    assert not hasattr(net[1], "segraft")


def test_a_bias_trained_whole_has_no_factor_beside():
    net = graft(nn.Sequential(nn.Linear(2, 3)), AdapterSpec("lora", bias="low_rank", train="bias:.*"))
    assert [type(edit).__name__ for edit in net[0].segraft["default"].values()] == ["Replacement", "LowRank"]


@pytest.mark.parametrize("bias", ["low_rank", "train"])
@pytest.mark.parametrize("kind", ["attention", "attention-cross"], indirect=True)
def test_the_input_bias_of_attention_is_adapted_too(kind, bias):
    """Also where q, k and v have weights of their own: they share one bias."""
    net = graft(kind.net(), kind.spec("lora", bias=bias))
    assert "in_proj_bias" in net[0].attention.segraft.edited()


def test_a_bias_that_two_layers_share_is_not_untied():
    from segraft.errors import SegraftError

    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].bias = net[0].bias
    graft(net, AdapterSpec("lora"))
    assert net[1].bias is net[0].bias
    for bias in ("low_rank", "train"):
        other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        other[1].bias = other[0].bias
        with pytest.raises(SegraftError, match="bias cannot be adapted"):
            graft(other, AdapterSpec("lora", bias=bias))


def test_attention_with_weights_apart_has_a_bias_factor_for_each_of_them():
    """q, k and v share one bias; each weight's factor moves its own third of it."""
    net = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    edits = graft(nn.Sequential(net), AdapterSpec("lora", rank=2, alpha=2, bias="low_rank"))[0].segraft["default"]
    factors = {key: edit for key, edit in edits.items() if isinstance(edit, BiasFactor)}
    assert list(factors) == ["in_proj_bias_0_4", "in_proj_bias_4_8", "in_proj_bias_8_12"]
    with torch.no_grad():
        for place, edit in enumerate(factors.values()):
            edit.beta.fill_(place + 1)
        shift = net.in_proj_bias - net._parameters["in_proj_bias"]
    torch.testing.assert_close(shift, torch.tensor([2.0] * 4 + [4.0] * 4 + [6.0] * 4))
