"""Strategies: what exactly each trains."""

import re

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, adapter_tensors, fingerprint, graft
from segraft.errors import SegraftError
from segraft.networks import MultiViewUNet, UNet
from segraft.training.module import SegmentationTask
from segraft.training.strategies import STRATEGIES, require_parts, selectors

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
    "bitfit_encoder": {name for name in NORM_BIASES if name in ENCODER},
    "affine_encoder": {n for name in NORM_BIASES if name in ENCODER for n in (name, name.replace("bias", "weight"))},
    "decoder": DECODER | HEAD,
    "encoder": ENCODER,
    "full": DECODER | HEAD | ENCODER,
    "all": DECODER | HEAD | ENCODER,
}
"""Of a U-Net."""

BLOCKS = ["M1_1", "M1_2", "M1_3", "M1_4", "M1_5", "M2_1", "M2_2", "M3"]
TABLE_2 = {
    "none": [],
    "shallow": ["M1_1", "M3"],
    "deep": ["M1_3", "M1_4"],
    "encoding": ["M1_1", "M1_2", "M1_3"],
    "decoding": ["M1_4", "M1_5", "M3"],
    "all": BLOCKS,
}
"""Of the multi-view U-Net."""


def small() -> UNet:
    return UNet(widths=(2, 3), norm="instance")


def trained_whole(net) -> set[str]:
    keys = adapter_tensors(net, "default")
    return {key.removesuffix(".value") for key in keys if key.endswith(".value")}


def factorised(net) -> set[str]:
    return {key.rsplit(".weight", 1)[0] for key in adapter_tensors(net, "default") if key.endswith(".B")}


def test_every_strategy_is_here():
    assert set(EXPECTED) | set(TABLE_2) == set(STRATEGIES)
    assert EXPECTED["full"] == {name for name, _ in small().named_parameters()}


@pytest.mark.parametrize("name", EXPECTED)
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


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in ("full", "all")])
def test_a_strategy_combines_with_an_adapter_where_layers_remain(name):
    net = graft(small(), AdapterSpec("dora_c", rank=1, train=selectors([name])))
    weights = {key.removesuffix(".weight") for key in EXPECTED[name] if key.endswith(".weight")}
    assert trained_whole(net) == EXPECTED[name]
    assert factorised(net) == set().union(*CONVOLUTIONS.values()) - weights
    assert all(value.requires_grad for value in adapter_tensors(net, "default").values())


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "none"])
def test_a_strategy_combines_with_an_adapter_on_top(name):
    net = graft(small(), AdapterSpec("dora_c", rank=1, targets=".*", train=selectors([name])))
    assert trained_whole(net) == EXPECTED[name]
    assert factorised(net) == set().union(*CONVOLUTIONS.values())


def test_full_leaves_nothing_for_factors_unless_targets_are_named():
    with pytest.raises(SegraftError, match="name targets"):
        graft(small(), AdapterSpec("dora_c", train=selectors(["full"])))


def multi_view_strategy(*names: str, method: str = "none", **options) -> MultiViewUNet:
    net, spec = MultiViewUNet(width=4), AdapterSpec(method, train=selectors(names), **options)
    require_parts(net, spec.train)
    return graft(net, spec)


@pytest.mark.parametrize("name", TABLE_2)
def test_a_strategy_of_table_2_trains_exactly_its_modules(name):
    plain = MultiViewUNet(width=4)
    expected = {key for key, _ in plain.named_parameters() if key.split(".")[0] in TABLE_2[name]}
    assert {key.split(".")[0] for key in expected} == set(TABLE_2[name])
    net = multi_view_strategy(name)
    assert trained_whole(net) == expected
    trainable = [(key, value) for key, value in net.named_parameters() if value.requires_grad]
    assert len(trainable) == len(expected)
    mark = fingerprint(net)
    if name == "none":
        return
    before = {key: value.detach().clone() for key, value in trainable}
    optimiser = torch.optim.SGD([value for _, value in trainable], lr=0.1)
    net(torch.rand(2, 1, 8, 8)).square().mean().backward()
    optimiser.step()
    moved = {key.split(".")[0] for key, value in trainable if not torch.equal(value, before[key])}
    assert moved == set(TABLE_2[name])
    assert fingerprint(net) == mark


@pytest.mark.parametrize("name", [name for name in TABLE_2 if name not in ("none", "all")])
def test_a_strategy_of_table_2_combines_with_an_adapter(name):
    net = multi_view_strategy(name, method="dora_c", rank=1)
    assert {key.split(".")[0] for key in factorised(net)} == set(BLOCKS) - set(TABLE_2[name])


def test_decoder_is_decoding_and_the_blocks_on_the_skips():
    wider, narrower = (trained_whole(multi_view_strategy(name)) for name in ("decoder", "decoding"))
    assert narrower < wider
    assert {key.split(".")[0] for key in wider - narrower} == {"M2_1", "M2_2"}


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (["shallow"], "strategy 'shallow' trains M1.1 and M3, which UNet has not got (its parts are encoder, bott"),
        (["Deep"], "strategy 'deep' trains M1.3 and M1.4, which UNet has not got"),
        (["bitfit", "encoding"], "strategy 'encoding' trains M1.1 and M1.2 and M1.3, which UNet"),
        (["decoding", "head"], "strategy 'decoding' trains M1.4 and M1.5 and M3, which UNet"),
    ],
)
def test_a_strategy_of_another_network(train, says):
    with pytest.raises(SegraftError, match=re.escape(says)) as caught:
        require_parts(small(), selectors(train))
    assert "\n" not in str(caught.value)


def test_a_strategy_on_a_network_that_names_no_parts():
    """A network from elsewhere whose parts nobody knows."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1))
    with pytest.raises(SegraftError, match=r"'head' trains head, which Sequential has not got \(it names no parts\)"):
        require_parts(net, selectors(["head"]))
    with pytest.raises(SegraftError, match="matches no parameter"):
        graft(net, AdapterSpec("none", train=selectors(["head"])))


class HasAHead(nn.Module):
    """Has one of the two parts of `decoder`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3)
        self.parts = {"head": ("last",)}


def test_only_what_is_missing_is_named():
    require_parts(HasAHead(), selectors(["head"]))
    with pytest.raises(
        SegraftError, match=r"'decoder' trains decoder, which HasAHead has not got \(its parts are head\)"
    ):
        require_parts(HasAHead(), selectors(["decoder"]))


@pytest.mark.parametrize(
    "train", [["none"], ["bitfit", "affine"], ["full"], ["all"], [r"M1\.1"], ["bias:M1.1"], ["M3"], [r"nowhere\..*"]]
)
def test_what_is_no_strategy_for_parts_is_left_to_grafting(train):
    require_parts(small(), selectors(train))


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
        (["Shallow"], ("M1.1", "M3")),
        (["DECODING", "deep"], ("M1.4", "M1.5", "M3", "M1.3")),
        (["Head", "ALL", "full", "None"], ("head", ".*")),
        (["M1.1", r"Encoder\..*"], ("M1.1", r"Encoder\..*")),
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
