"""Strategies: what exactly each trains."""

import pytest
import torch

from segraft.adapters import AdapterSpec, adapter_tensors, fingerprint, graft
from segraft.errors import SegraftError
from segraft.networks import UNet
from segraft.training.module import SegmentationTask
from segraft.training.strategies import STRATEGIES, selectors

CONVOLUTIONS = {
    "encoder": {"encoder.0.0", "encoder.0.3", "bottleneck.0", "bottleneck.3"},
    "decoder": {"upsampling.0", "decoder.0.0", "decoder.0.3"},
    "head": {"head"},
}
NORMS = {
    "encoder": {"encoder.0.1", "encoder.0.4", "bottleneck.1", "bottleneck.4"},
    "decoder": {"decoder.0.1", "decoder.0.4"},
}
NORM_BIASES = {f"{name}.bias" for part in NORMS.values() for name in part}
HEAD = {"head.weight", "head.bias"}
DECODER = {
    *(f"{name}.weight" for name in CONVOLUTIONS["decoder"] | NORMS["decoder"]),
    *(f"{name}.bias" for name in NORMS["decoder"]),
    "upsampling.0.bias",
}
ENCODER = {
    *(f"{name}.weight" for name in CONVOLUTIONS["encoder"] | NORMS["encoder"]),
    *(f"{name}.bias" for name in NORMS["encoder"]),
}
EXPECTED = {
    "none": set(),
    "head": HEAD,
    "bitfit": NORM_BIASES | {"upsampling.0.bias", "head.bias"},
    "affine": NORM_BIASES | {name.replace("bias", "weight") for name in NORM_BIASES},
    "decoder": DECODER | HEAD,
    "encoder": ENCODER,
    "full": DECODER | HEAD | ENCODER,
}


def small() -> UNet:
    return UNet(widths=(2, 3), norm="instance")


def trained_whole(net) -> set[str]:
    keys = adapter_tensors(net, "default")
    return {key.removesuffix(".value") for key in keys if key.endswith(".value")}


def factorised(net) -> set[str]:
    return {key.rsplit(".weight", 1)[0] for key in adapter_tensors(net, "default") if key.endswith(".B")}


def test_every_strategy_is_here():
    assert set(EXPECTED) == set(STRATEGIES)
    assert EXPECTED["full"] == {name for name, _ in small().named_parameters()}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_trains_exactly_what_it_says(name):
    net = small()
    before = fingerprint(net)
    graft(net, AdapterSpec("none", train=selectors([name])))
    assert trained_whole(net) == EXPECTED[name]
    trainable = {key for key, value in net.named_parameters() if value.requires_grad}
    assert len(trainable) == len(EXPECTED[name])
    assert all(".segraft." in key for key in trainable)
    if trainable:
        net(torch.rand(2, 1, 8, 8)).square().sum().backward()
        assert {key for key, value in net.named_parameters() if value.grad is not None} == trainable
    assert fingerprint(net) == before


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "full"])
def test_a_strategy_combines_with_an_adapter_where_layers_remain(name):
    net = graft(small(), AdapterSpec("dora_c", rank=1, train=selectors([name])))
    weights = {key.removesuffix(".weight") for key in EXPECTED[name] if key.endswith(".weight")}
    assert trained_whole(net) == EXPECTED[name]
    assert factorised(net) == set().union(*CONVOLUTIONS.values()) - weights
    assert all(value.requires_grad for value in adapter_tensors(net, "default").values())


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "none"])
def test_a_strategy_combines_with_an_adapter_on_top(name):
    net = graft(small(), AdapterSpec("dora_c", rank=1, targets=".*", train=selectors([name])))
    assert trained_whole(net) == EXPECTED[name]
    assert factorised(net) == set().union(*CONVOLUTIONS.values())


def test_full_leaves_nothing_for_factors_unless_targets_are_named():
    with pytest.raises(SegraftError, match="name targets"):
        graft(small(), AdapterSpec("dora_c", train=selectors(["full"])))


def test_affine_on_a_network_without_norms():
    net = UNet(widths=(2, 3))
    with pytest.raises(SegraftError, match="matches no norm parameter"):
        graft(net, AdapterSpec("none", train=selectors(["affine"])))


def test_neither_factors_nor_strategy_trains_nothing(settings):
    net = graft(small(), AdapterSpec("none", train=selectors(["none"])))
    with pytest.raises(SegraftError, match="nothing would be trained"):
        SegmentationTask(net, settings(), 1)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ()),
        (["none"], ()),
        (["head", "bitfit"], ("head", "bias:.*")),
        (["decoder", "head"], ("decoder", "head")),
        (["bottleneck"], ("bottleneck",)),
        ([r"encoder\.0\..*", "affine"], (r"encoder\.0\..*", "norm:.*")),
        (["norm:encoder", "norm:encoder"], ("norm:encoder",)),
    ],
)
def test_selectors(names, expected):
    assert selectors(names) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bottleneck", {key for key in ENCODER if key.startswith("bottleneck")}),
        (r"decoder\.0\.[03]\..*", {"decoder.0.0.weight", "decoder.0.3.weight"}),
        ("bias:decoder", {key for key in DECODER if key.endswith("bias")}),
        (r"norm:bottleneck\..*", {key for key in EXPECTED["affine"] if key.startswith("bottleneck")}),
    ],
)
def test_parts_and_expressions_pass_through(name, expected):
    assert trained_whole(graft(small(), AdapterSpec("none", train=selectors([name])))) == expected
