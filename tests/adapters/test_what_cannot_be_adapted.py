"""A layer that cannot be adapted raises an error with its name, and the network is as it was."""

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from segraft.adapters import AdapterSpec, graft
from segraft.errors import SegraftError


def tied() -> list[nn.Module]:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    return [first, nn.ReLU(), second]


def tied_to_an_embedding() -> list[nn.Module]:
    embedding, head = nn.Embedding(3, 2), nn.Linear(2, 3)
    head.weight = embedding.weight
    return [head, embedding]


def integer() -> list[nn.Module]:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    return [layer]


CASES = {
    "embedding": (lambda: [nn.Embedding(3, 2)], {"targets": "0"}, r"layer '0' \(Embedding\) .* exclude it, or train"),
    "lstm": (lambda: [nn.LSTM(3, 2)], {"targets": "0"}, r"layer '0' \(LSTM\)"),
    "bilinear": (lambda: [nn.Bilinear(3, 2, 2)], {"targets": "0"}, r"layer '0' \(Bilinear\)"),
    "lazy": (lambda: [nn.LazyConv2d(2, 3)], {}, r"layer '0' \(LazyConv2d\) .* lazy .* run one forward pass"),
    "lazy-linear": (lambda: [nn.LazyLinear(2)], {}, r"layer '0' \(LazyLinear\) .* lazy"),
    "lazy-norm": (lambda: [nn.Linear(2, 2), nn.LazyBatchNorm1d()], {}, r"'?1.*lazy"),
    "lazy-trained-whole": (lambda: [nn.Linear(2, 2), nn.LazyLinear(2)], {"train": "1.weight", "targets": "0"}, "lazy"),
    "weight-norm": (lambda: [weight_norm(nn.Conv2d(1, 2, 3))], {}, r"layer '0' .* parametrisation"),
    "spectral-norm": (lambda: [spectral_norm(nn.Linear(2, 2))], {}, r"layer '0' .* parametrisation"),
    "old-spectral-norm": (lambda: [nn.utils.spectral_norm(nn.Linear(2, 2))], {}, r"layer '0' .* parametrisation"),
    "weight-norm-attention": (
        lambda: [weight_norm(nn.MultiheadAttention(2, 1), "in_proj_weight")],
        {},
        r"layer '0' .* parametrisation",
    ),
    "weight-norm-bias": (
        lambda: [weight_norm(nn.Linear(2, 2), "bias")],
        {"bias": "low_rank"},
        r"layer '0' .* parametrisation",
    ),
    "integer": (integer, {}, r"layer '0' \(Linear\) .* torch\.int8"),
    "integer-trained-whole": (integer, {"method": "none", "train": ".*"}, r"0\.weight .*torch\.int8"),
    "complex": (lambda: [nn.Linear(2, 2, dtype=torch.complex64)], {}, r"layer '0' \(Linear\) .* torch\.complex64"),
    "tied": (tied, {}, r"0\.weight and 2\.weight are one shared tensor"),
    "tied-one-target": (tied, {"targets": "2"}, r"0\.weight and 2\.weight are one shared tensor"),
    "tied-trained-whole": (tied, {"method": "none", "train": r"2\.weight"}, r"0\.weight and 2\.weight are one shared"),
    "tied-to-an-embedding": (tied_to_an_embedding, {"targets": "0"}, r"0\.weight and 1\.weight are one shared"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_by_name_and_nothing_has_changed(case):
    make, options, message = CASES[case]
    net = nn.Sequential(*make())
    first = next(net.parameters())
    if not is_lazy(first):
        first.requires_grad_(False)
    before = [(name, type(module)) for name, module in net.named_modules()]
    trainable = {name: value.requires_grad for name, value in net.named_parameters()}
    with pytest.raises(SegraftError, match=message) as error:
        graft(net, AdapterSpec(**options))
    assert str(error.value).endswith(".")
    assert [(name, type(module)) for name, module in net.named_modules()] == before
    assert {name: value.requires_grad for name, value in net.named_parameters()} == trainable
    assert "_segraft" not in net.__dict__


def test_what_is_not_targeted_is_no_obstacle(randomise):
    """Left to itself a spec takes linear and convolution layers, and exclusion is the way round the others."""
    net = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2), weight_norm(nn.Linear(2, 2)))
    graft(net, AdapterSpec(exclude="2"))
    assert type(net[0]) is nn.Embedding
    randomise(net)
    net(torch.tensor([0, 2])).sum().backward()
    assert net[1].segraft["default"]["weight"].B.grad is not None


def test_a_parametrised_layer_can_be_trained_whole(randomise):
    net = nn.Sequential(weight_norm(nn.Conv2d(1, 2, 3)))
    x = torch.randn(1, 1, 4, 4)
    base = net(x)
    graft(net, AdapterSpec("none", train=".*"))
    assert torch.equal(net(x), base)
    net(x).sum().backward()
    assert all(value.grad is not None for value in net.parameters() if value.requires_grad)
    randomise(net)
    assert not torch.allclose(net(x), base)
