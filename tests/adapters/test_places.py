"""Which layers a spec means: parts, regular expressions, ranks by place; what matches nothing is an error."""

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, graft, parts_of
from segraft.adapters.graft import grafted_layers
from segraft.errors import SegraftError


class Net(nn.Module):
    """A small U of named parts."""

    parts = {"encoder": ("stem", "down"), "decoder": ("up",), "head": ("head",)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3)
        self.stem_norm = nn.BatchNorm2d(2)
        self.down = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.up = nn.Sequential(nn.ConvTranspose2d(4, 2, 2), nn.GroupNorm(1, 2))
        self.head = nn.Conv2d(2, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.down(self.stem_norm(self.stem(x)))))


def layers(spec: AdapterSpec) -> dict[str, int]:
    """Name -> rank of every adapted layer."""
    net = graft(Net(), spec)
    return {
        name: layer.segraft["default"]["weight"].rank
        for name, layer in grafted_layers(net)
        if hasattr(layer.segraft["default"]._modules.get("weight"), "rank")
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"stem", "down.0", "down.2", "up.0", "head"}),
        ({"targets": "encoder"}, {"stem", "down.0", "down.2"}),
        ({"targets": ("encoder", "head")}, {"stem", "down.0", "down.2", "head"}),
        ({"targets": r"down\..*"}, {"down.0", "down.2"}),
        ({"targets": r".*\.0"}, {"down.0", "up.0"}),
        ({"targets": ("down.0",)}, {"down.0"}),
        ({"exclude": "head"}, {"stem", "down.0", "down.2", "up.0"}),
        ({"exclude": ("decoder", r"down\.2")}, {"stem", "down.0", "head"}),
        ({"targets": "encoder", "exclude": "stem"}, {"down.0", "down.2"}),
        ({"train": "head"}, {"stem", "down.0", "down.2", "up.0"}),
    ],
)
def test_targets(options, expected):
    assert set(layers(AdapterSpec(**options))) == expected


def test_parts_do_not_take_names_that_only_begin_alike():
    """Part `encoder` holds `stem`, not `stem_norm`."""
    net = graft(Net(), AdapterSpec("none", train="encoder"))
    trainable = {name.partition(".segraft")[0] for name, value in net.named_parameters() if value.requires_grad}
    assert trainable == {"stem", "down.0", "down.1", "down.2"}


def test_parts_of():
    assert parts_of(Net()) == Net.parts
    assert parts_of(nn.Linear(1, 1)) == {}


def test_ranks_by_place_the_last_holds():
    spec = AdapterSpec(rank=2, ranks={"encoder": 3, r"down\.2": 5, "head": 1})
    assert layers(spec) == {"stem": 3, "down.0": 3, "down.2": 5, "up.0": 2, "head": 1}
    spec = AdapterSpec(rank=2, ranks={r"down\.2": 5, "encoder": 3})
    assert layers(spec)["down.2"] == 3


def test_a_rank_may_exceed_that_of_the_weight(randomise):
    net = nn.Sequential(nn.Linear(2, 3))
    randomise(graft(net, AdapterSpec("dora", rank=50)))
    assert net[0].segraft["default"]["weight"].A.shape == (50, 2)
    net(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "middle"}, "'middle' matches no linear, .* its parts are encoder, decoder, head;"),
        ({"targets": ("encoder", "middle")}, "'middle' matches no"),
        ({"targets": "down"}, "'down' matches no .* must match a whole name"),
        ({"exclude": "middle"}, "'middle' matches no"),
        ({"ranks": {"middle": 1}}, "'middle' matches no"),
        ({"slices": {"middle": "1/2"}}, "'middle' matches no"),
        ({"targets": "encoder", "ranks": {"head": 1}}, "'head' matches no"),
        ({"targets": "down(", "rank": 1}, "'down\\(' is not a valid regular expression"),
        ({"train": "middle"}, "'middle' matches no parameter"),
        ({"train": "norm:head"}, "'head' matches no norm parameter"),
        ({"train": "bias:middle"}, "'middle' matches no bias parameter"),
        ({"train": ("head", "("), "exclude": "head"}, "not a valid regular expression"),
        ({"train": ".*"}, "nothing to adapt"),
        ({"exclude": ".*"}, "nothing to adapt"),
        ({"targets": ()}, "nothing to adapt"),
        ({"slices": {"stem": "3/2"}}, "slice '3/2' of 'stem': write 'j/n'"),
        ({"slices": {"stem": "0/2"}}, "slice '0/2'"),
        ({"slices": {"stem": "second"}}, "slice 'second'"),
        ({"slices": {"stem": "1"}}, "slice '1'"),
        ({"slices": {"stem": "1/2/3"}}, "slice '1/2/3'"),
        ({"slices": {"stem": "-1/2"}}, "slice '-1/2'"),
        ({"slices": {"stem": "1/3"}}, "its 2 rows do not divide into 3"),
        ({"slices": {"stem": ("1/2", "1/1")}}, "slices 1/2, 1/1 of 'stem' overlap"),
        ({"slices": {"stem": ("2/2", "2/2")}}, "overlap"),
        ({"slices": {r"up\.0": "1/2"}}, "'up.0' is transposed or grouped"),
        ({"slices": {"stem": ()}}, "stem"),
    ],
)
def test_places_that_make_no_sense_are_refused_and_nothing_changes(options, message, snapshot):
    net = Net()
    net.head.weight.requires_grad_(False)
    before = snapshot(net)
    with pytest.raises(SegraftError, match=message) as error:
        graft(net, AdapterSpec(**options))
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)
    before.assert_holds(net)


def test_what_lies_outside_the_targets_may_be_excluded():
    """The layer is there: to say that the expression matches no layer of this network would be untrue."""
    assert set(layers(AdapterSpec(targets="encoder", exclude="head"))) == {"stem", "down.0", "down.2"}


def test_row_blocks_that_touch_do_not_overlap():
    net = nn.Sequential(nn.Linear(3, 12))
    graft(net, AdapterSpec("lora", slices={"0": ("3/6", "1/3", "4/4")}))
    assert list(net[0].segraft["default"]._modules) == ["weight_4_6", "weight_0_4", "weight_9_12"]
