"""The options of a spec: what they mean, and that nonsense is refused."""

import json
import math

import pytest
import torch
from torch import nn

from segraft.adapters import PRESETS, AdapterSpec, graft
from segraft.errors import SegraftError


def test_alpha_is_twice_the_rank_unless_given():
    assert [AdapterSpec(rank=rank).scaling(rank) for rank in (1, 8, 96)] == [2, 2, 2]
    assert AdapterSpec(rank=8, alpha=4).scaling(8) == 0.5
    assert AdapterSpec(rank=8, alpha=4).scaling(2) == 2
    assert AdapterSpec("rs_lora", rank=16).scaling(16) == 8
    assert AdapterSpec("rs_lora", rank=16, alpha=1).scaling(16) == 0.25
    assert AdapterSpec("dora_c", scale="alpha/sqrt(r)", alpha=3).scaling(9) == 1


@pytest.mark.parametrize(
    ("spec", "scaling"),
    [
        (AdapterSpec(rank=4), 2),
        (AdapterSpec(rank=4, alpha=1), 0.25),
        (AdapterSpec("rs_lora", rank=4, alpha=1), 0.5),
        (AdapterSpec("lora_c", rank=4, alpha=12, ranks={"0": 3}), 4),
        (AdapterSpec("rs_lora", rank=4, ranks={"0": 2}), 4 / math.sqrt(2)),
    ],
)
def test_the_update_is_scaled(spec, scaling, randomise):
    net = nn.Sequential(nn.Linear(5, 4)).double()
    randomise(graft(net, spec))
    edit = net[0].segraft["default"]["weight"]
    expected = net[0].state_dict()["weight"] + scaling * edit.B @ edit.A
    torch.testing.assert_close(net[0].weight, expected)


def test_presets_fill_what_is_left_open():
    assert AdapterSpec("cp_dora").factorisation == "cp"
    assert AdapterSpec("cp_dora").magnitude is True
    assert AdapterSpec("cp_dora").scale == "alpha/r"
    assert AdapterSpec("cp_dora", magnitude=False).magnitude is False
    assert AdapterSpec("rs_lora", scale="alpha/r").scale == "alpha/r"
    assert AdapterSpec("none", factorisation="tucker", magnitude=True).magnitude is True
    assert {name for name, preset in PRESETS.items() if preset.magnitude} == {"dora", "dora_c", "conv_dora", "cp_dora"}


def test_one_name_stands_for_a_list_of_one():
    spec = AdapterSpec(targets="a", exclude="b", train="c", slices={"d": "1/2"})
    assert spec == AdapterSpec(targets=["a"], exclude=["b"], train=["c"], slices={"d": ["1/2"]})
    assert spec.targets == ("a",)


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(),
        AdapterSpec("none", train=".*"),
        AdapterSpec(
            "dora_c",
            rank=3,
            alpha=0.5,
            factorisation="tucker",
            magnitude=False,
            scale="alpha/sqrt(r)",
            magnitude_dim=0,
            bias="low_rank",
            targets=("a", "b"),
            exclude="c",
            ranks={"a": 2},
            slices={"b": ("2/3", "3/3")},
            train=("head", "norm:encoder"),
        ),
    ],
)
def test_a_spec_survives_json(spec):
    assert AdapterSpec.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False))) == spec


def test_fields_of_a_newer_version_are_refused():
    with pytest.raises(SegraftError, match=r"does not know \(routing\): update"):
        AdapterSpec.from_dict({**AdapterSpec().to_dict(), "routing": "none"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lorra"}, "unknown method 'lorra': choose one of none, lora"),
        ({"factorisation": "svd"}, "unknown factorisation 'svd': choose one of lora, lora_c"),
        ({"scale": "beta"}, "unknown scale 'beta'"),
        ({"bias": "all"}, "unknown bias setting 'all'"),
        ({"magnitude_dim": 1}, "magnitude_dim 1"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"alpha": "8"}, "alpha is '8'"),
        ({"rank": 0}, "rank is 0: it must be a whole number of at least 1"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"rank": True}, "rank is True"),
        ({"rank": "8"}, "rank is '8'"),
        ({"rank": None}, "rank is None"),
        ({"ranks": {"a": 0}}, "rank for 'a' is 0"),
        ({"ranks": {"a": True}}, "rank for 'a' is True"),
        ({"method": "none", "targets": "a"}, "has no factors"),
        ({"method": "none", "ranks": {"a": 1}}, "has no factors"),
        ({"method": "none", "slices": {"a": "1/2"}}, "has no factors"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(SegraftError, match=message) as error:
        AdapterSpec(**options)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"bias": "train"}, {"bias": "low_rank"}, {"exclude": "0"}, {"magnitude": True}])
def test_options_that_mean_nothing_without_factors_are_refused(options):
    """They would be passed over in silence: no layer is adapted whose bias could train."""
    with pytest.raises(SegraftError, match="no factors"):
        AdapterSpec("none", **options)


def test_a_spec_cannot_be_changed():
    ranks = {"a": 1}
    spec = AdapterSpec(ranks=ranks)
    ranks["a"] = 0
    assert spec.ranks == {"a": 1}
    with pytest.raises(AttributeError):
        spec.rank = 2
