"""Grafting, switching, stacking, taking off: the network stays the same object and the base keeps its bits."""

import copy
import pickle

import pytest
import torch
from torch import nn

from segraft.adapters import PRESETS, AdapterSpec, activate, activated, graft, merge, ungraft
from segraft.errors import SegraftError


def test_ungrafting_restores_bits_classes_keys_and_trainability(kind, method, snapshot, randomise):
    net, x = kind.net(), kind.input()
    next(net.parameters()).requires_grad_(False)
    before, expected = snapshot(net), net(x)
    layer = net[0]
    randomise(graft(net, kind.spec(method, bias="low_rank")))
    assert net[0] is layer
    assert isinstance(layer, before.classes["0"])
    assert ungraft(net) is net
    before.assert_holds(net)
    assert torch.equal(net(x), expected)


def test_base_tensors_keep_their_keys_while_grafted(kind, method, adapted):
    net, base = adapted(kind, method, torch.float32), kind.net().state_dict()
    state = net.state_dict()
    assert [key for key in state if ".segraft." not in key] == list(base)
    assert all(torch.equal(state[key], value) for key, value in base.items())
    net.load_state_dict({key: value + 1 for key, value in base.items()}, strict=False)
    ungraft(net)
    assert all(torch.equal(value, base[key] + 1) for key, value in net.state_dict().items())


def test_switching(kind, randomise):
    net, x = kind.net(), kind.input()
    outputs = {}
    with torch.no_grad():
        for name, method in (("first", "dora_c"), ("second", "cp_lora")):
            randomise(graft(net, kind.spec(method), name), name, seed=len(name))
            outputs[name] = net(x)
        activate(net, None)
        outputs[None] = net(x)
        for name in ("first", None, "second", "first"):
            activate(net, name)
            assert torch.equal(net(x), outputs[name])
        with activated(net, "second") as same:
            assert same is net
            assert torch.equal(net(x), outputs["second"])
        assert torch.equal(net(x), outputs["first"])
        ungraft(net, "first")
        assert torch.equal(net(x), outputs[None])
        activate(net, "second")
        assert torch.equal(net(x), outputs["second"])
    assert not torch.equal(outputs["first"], outputs["second"])


def test_only_what_is_active_is_trainable():
    net = nn.Sequential(nn.Linear(2, 2))
    graft(net, AdapterSpec(), "a")
    graft(net, AdapterSpec(), "b")

    def trainable():
        return {name.split(".")[2] for name, value in net.named_parameters() if value.requires_grad}

    assert trainable() == {"b"}
    activate(net, ("a", "b"))
    assert trainable() == {"a", "b"}
    activate(net, ("a", "b"), train="a")
    assert trainable() == {"a"}
    with activated(net, "b"):
        assert trainable() == {"b"}
    assert trainable() == {"a"}
    activate(net, None)
    assert trainable() == set()


def test_activated_gives_back_after_an_error():
    net = graft(nn.Sequential(nn.Linear(2, 2)), AdapterSpec())
    x = torch.ones(1, 2)
    with pytest.raises(KeyError), activated(net, None):
        raise KeyError
    net(x).sum().backward()
    assert net[0].segraft["default"]["weight"].B.grad is not None


@pytest.mark.parametrize("methods", [("lora", "cp_lora"), ("lora_c", "rs_lora"), ("tucker", "conv_lora")])
def test_a_stack_without_magnitudes_adds_the_updates(kind, methods, adapted, randomise):
    net = kind.net(torch.float64)
    for method in methods:
        randomise(graft(net, kind.spec(method), method), method, seed=len(method))
    for layer_name, layer in net.named_modules():
        for tensor in layer.segraft.edited() if hasattr(layer, "segraft") else ():
            base = kind.net(torch.float64).get_parameter(f"{layer_name}.{tensor}")
            expected = base.clone()
            for method in methods:
                activate(net, method)
                expected += getattr(layer, tensor) - base
            for order in (methods, methods[::-1]):
                activate(net, order)
                torch.testing.assert_close(getattr(layer, tensor), expected)


def test_a_stack_with_magnitudes_keeps_its_order(randomise):
    net = nn.Sequential(nn.Linear(3, 3))
    for name in ("lora", "dora"):
        randomise(graft(net, AdapterSpec(name, rank=1), name), name)
    activate(net, ("lora", "dora"))
    last = net[0].weight
    torch.testing.assert_close(last.norm(dim=1), net[0].segraft["dora"]["weight"].m.abs())
    activate(net, ("dora", "lora"))
    assert not torch.allclose(net[0].weight, last)


@pytest.mark.parametrize("method", ["dora_c", "tucker"], indirect=True)
@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_copies_are_independent(kind, method, twin_of, adapted, snapshot):
    net, x = adapted(kind, method, torch.float32, bias="low_rank"), kind.input()
    before = snapshot(net)
    with torch.no_grad():
        expected = net(x)
        twin = twin_of(net)
        before.assert_holds(twin)
        assert torch.equal(twin(x), expected)
        for value in twin.parameters():
            value.add_(1)
        assert torch.equal(net(x), expected)
        twin = twin_of(net)
        activate(twin, None)
        assert torch.equal(net(x), expected)
        ungraft(twin)
        assert torch.equal(net(x), expected)
        before.assert_holds(net)
    snapshot(kind.net()).assert_holds(twin)
    merge(twin_of(net))


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_recurrent_layers_trained_whole(twin_of, randomise):
    """They keep weak references to their weights, which their own __getstate__ leaves out."""
    net, x = nn.Sequential(nn.LSTM(3, 4)), torch.ones(2, 1, 3)
    base = net(x)[0]
    randomise(graft(net, AdapterSpec("none", train=".*")))
    expected = net(x)[0]
    assert not torch.allclose(expected, base)
    assert torch.equal(twin_of(net)(x)[0], expected)
    assert torch.equal(merge(copy.deepcopy(net))(x)[0], expected)
    activate(net, None)
    assert torch.equal(net(x)[0], base)


def test_a_bare_layer_is_a_network(randomise, snapshot):
    net, x = nn.Conv2d(1, 2, 3), torch.randn(1, 1, 4, 4)
    before, expected = snapshot(net), net(x)
    randomise(graft(net, AdapterSpec("dora_c", train="bias")))
    assert not torch.allclose(net(x), expected)
    ungraft(net)
    before.assert_holds(net)


def test_adapters_on_different_layers(randomise):
    net, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2)
    base = [layer.weight.detach().clone() for layer in net]
    for name, place in (("a", "0"), ("b", "1")):
        randomise(graft(net, AdapterSpec(targets=place), name), name)
    assert torch.equal(net[0].weight, base[0])
    activate(net, "a")
    assert torch.equal(net[1].weight, base[1])
    assert not torch.equal(net[0].weight, base[0])
    ungraft(net, "a")
    assert type(net[0]) is nn.Linear
    assert type(net[1]) is not nn.Linear
    net(x)


@pytest.mark.parametrize("parent_first", [True, False])
def test_grafting_a_part_and_the_whole_does_not_mix_them_up(parent_first):
    """Each would switch and overwrite the adapters of the other."""
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    first, second = (net, net[0]) if parent_first else (net[0], net)
    graft(first, AdapterSpec("dora"))
    factors = net[0][0].segraft["default"]
    with pytest.raises(SegraftError):
        graft(second, AdapterSpec("lora"))
    assert net[0][0].segraft["default"] is factors


# Names that nn.Module and nn.ModuleDict use themselves, beside ordinary ones.
NAMES = [
    "task 1",
    "Milz-Ö",
    "active",
    "edits",
    "train",
    "type",
    "half",
    "items",
    "keys",
    "values",
    "training",
    "segraft",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_without_dots_serves(name, snapshot):
    net = nn.Sequential(nn.Linear(2, 2))
    before, x = snapshot(net), torch.ones(1, 2)
    expected = net(x)
    try:
        graft(net, AdapterSpec("dora"), name)
    except SegraftError:
        before.assert_holds(net)
        return
    assert torch.equal(net(x), expected)
    activate(net, None)
    activate(net, name)
    ungraft(net, name)
    before.assert_holds(net)


@pytest.mark.parametrize("attribute", ["keys", "items", "values", "pop"])
def test_any_parameter_name_can_be_trained_whole(attribute):
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(attribute, nn.Parameter(torch.ones(3)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * getattr(self, attribute)

    net = graft(nn.Sequential(Memory()), AdapterSpec("none", train=".*"))
    net(torch.ones(3)).sum().backward()
    assert sum(value.grad is not None for value in net.parameters()) == 1


def test_parameter_lists_can_be_trained_whole(randomise):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterList([torch.ones(2), torch.ones(2)])
            self.shifts = nn.ParameterDict({"a": torch.zeros(2)})
            self.token = nn.Parameter(torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for scale in self.scales:
                x = x * scale
            return x + self.shifts["a"] + self.token

    net = graft(Net(), AdapterSpec("none", train=".*"))
    net(torch.ones(2)).sum().backward()
    assert [name for name, value in net.named_parameters() if value.grad is not None] == [
        name for name, value in net.named_parameters() if "segraft" in name
    ]
    randomise(net)
    assert not torch.allclose(net(torch.ones(2)), torch.ones(2))
    activate(net, None)
    assert torch.equal(net(torch.ones(2)), torch.ones(2))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_grafted_by_name(preset):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    graft(net, AdapterSpec(preset, train="2.bias"))
    net(torch.ones(1, 1, 4, 4)).sum().backward()
    assert all(value.grad is not None for value in net.parameters() if value.requires_grad)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda net: activate(net, "other"), "no adapter is named 'other': this network has default"),
        (lambda net: activate(net, ("default", "other")), "no adapter is named 'other'"),
        (lambda net: activate(net, "default", train="other"), "no adapter is named 'other'"),
        (lambda net: activate(net, ("default", "default")), "active only once"),
        (lambda net: ungraft(net, "other"), "no adapter is named 'other'"),
        (lambda net: graft(net, AdapterSpec()), "'default' is already grafted"),
        (lambda net: graft(net, AdapterSpec(), "a.b"), "without dots"),
        (lambda net: graft(net, AdapterSpec(), ""), "without dots"),
        (lambda net: graft(net, AdapterSpec(targets="none such"), "new"), "matches no"),
        (lambda net: activated(net, "other").__enter__(), "no adapter is named 'other'"),
    ],
)
def test_what_is_refused_changes_nothing(act, message, randomise, snapshot):
    net = randomise(graft(nn.Sequential(nn.Linear(2, 2)), AdapterSpec("dora")))
    before, expected = snapshot(net), net(torch.ones(1, 2))
    with pytest.raises(SegraftError, match=message):
        act(net)
    before.assert_holds(net)
    assert torch.equal(net(torch.ones(1, 2)), expected)


@pytest.mark.parametrize(
    "act", [ungraft, lambda net: activate(net, None), lambda net: activated(net, None).__enter__()]
)
def test_a_plain_network_has_no_adapters(act):
    with pytest.raises(SegraftError, match="has no adapter: graft one"):
        act(nn.Linear(1, 1))
