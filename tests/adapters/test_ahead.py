"""Layers prepared for all together at the start of a pass compute what they would by themselves."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from segraft.adapters import PRESETS, AdapterSpec, ahead, graft, preparing, ungraft
from segraft.adapters.ahead import ENOUGH_IN_VAIN
from segraft.adapters.execution import execution
from segraft.adapters.grafted import grafts_of

METHODS = sorted(name for name in PRESETS if name != "none")
X = torch.linspace(-1, 1, 2 * 3 * 6 * 6, dtype=torch.float64).view(2, 3, 6, 6).sin()


class Net(nn.Module):
    """Four layers; `use` says which of them run, in which order."""

    def __init__(self, use="abcd"):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.d, self.use = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Linear(12, 5), use

    def forward(self, x):
        for name in self.use:
            x = getattr(self, name)(x).tanh()
        return x


def grafted(method="conv_dora", use="abcd", **spec):
    torch.manual_seed(0)
    net = graft(Net(use).double(), AdapterSpec(method, rank=2, **spec))
    for value in net.parameters():
        if value.requires_grad:
            value.data.add_(torch.randn_like(value) / 10)
    return net


def trained(net, passes=4, forward=None, before=lambda _: None):
    """All trainable tensors after some steps."""
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)
    for each in range(passes):
        before(each)
        (forward or net)(X).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    return [p.detach().clone() for p in net.parameters() if p.requires_grad]


@pytest.fixture
def prepared(monkeypatch):
    """Shapes of weights in the order of their preparation, and a dot where a layer computes."""
    events, prepare, run = [], preparing.prepare, preparing.Prepared.run

    def record(layer, *others):
        events.append(next(name for name in "abcd" if NAMES[name] == type(layer).segraft_base and is_it(layer, name)))
        return prepare(layer, *others)

    monkeypatch.setattr(preparing, "prepare", record)
    monkeypatch.setattr(preparing.Prepared, "run", lambda *a: (events.append("."), run(*a))[1])
    return events


NAMES = {"a": nn.Conv2d, "b": nn.Conv2d, "c": nn.ConvTranspose2d, "d": nn.Linear}


def is_it(layer, name):
    return name in "cd" or layer.in_channels == {"a": 3, "b": 4}[name]


def by_themselves(monkeypatch):
    monkeypatch.setattr(ahead, "ENOUGH_IN_VAIN", 0)


@pytest.mark.parametrize("way", ["weight", "chain", "parallel", None])
@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same_bit_for_bit(method, way, monkeypatch):
    with execution(way):
        together = trained(grafted(method))
        by_themselves(monkeypatch)
        alone = trained(grafted(method))
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_all_are_prepared_when_the_first_one_runs(prepared):
    net = grafted()
    trained(net, passes=3)
    assert "".join(prepared) == "a.b.c.d." + 2 * "abcd...."


def test_a_backward_pass_may_come_after_two_forward_passes(monkeypatch):
    def twice(net):
        def forward(x):
            return net(x) + net(x + 1)

        return trained(net, forward=forward)

    together = twice(grafted())
    by_themselves(monkeypatch)
    torch.testing.assert_close(together, twice(grafted()), rtol=0, atol=0)


def written(net):
    net.c.segraft["default"]["weight"].m.data.mul_(2)
    net.c.segraft["default"]["weight"].m.add_(0.0)  # counts a version, as all but `.data` does


def replaced(net):
    edit = net.c.segraft["default"]["weight"]
    edit.m = nn.Parameter(edit.m.detach() * 2)


def scaled(net):
    net.c.segraft["default"]["weight"].scaling *= 2


def frozen(net):
    for name, value in net.c.segraft["default"]["weight"].named_parameters():
        value.requires_grad_(name == "m")


def base_written(net):
    net.c._parameters["weight"].mul_(2)


def base_moved(net):
    net.c._parameters["weight"].data = net.c._parameters["weight"].data * 2


CHANGES = [written, replaced, scaled, frozen, base_written, base_moved]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_within_a_pass_counts(change, monkeypatch):
    """After all were prepared, before the layer runs."""

    def gradients():
        net, changes = grafted(), [None, None, change]

        @net.b.register_forward_hook
        def _(*_):
            with torch.no_grad():
                (changes.pop(0) or (lambda _: None))(net)

        for _ in range(3):
            net.zero_grad()
            y = net(X)
            y.square().sum().backward()
        return y, [p.grad for p in net.parameters() if p.grad is not None]

    together = gradients()
    by_themselves(monkeypatch)
    torch.testing.assert_close(together, gradients(), rtol=0, atol=0)


def test_another_way_of_execution_counts(prepared):
    net = grafted()
    net.b.register_forward_pre_hook(lambda *_: prepared.append("|"))
    for _ in range(2):
        net(X)
    with execution("parallel"):
        net(X)
    # A transposed layer cannot, and goes on as before.
    assert "".join(prepared) == "a.|b.c.d.abcd.|...abcda.|b..d."


@pytest.mark.parametrize("way", ["weight", "chain"])
def test_recomputed_parts_prepare_by_themselves(way, monkeypatch):
    """What autograd saves of them, in the forward pass and again, must be the same."""

    def part(net, reentrant):
        def forward(x):
            x = net.a(x.requires_grad_()).tanh()
            x = checkpoint(lambda x: net.c(net.b(x).tanh()).tanh(), x, use_reentrant=reentrant)
            return net.d(x)

        return forward

    for reentrant in (False, True):
        results = []
        for enough in (ENOUGH_IN_VAIN, 0):
            monkeypatch.setattr(ahead, "ENOUGH_IN_VAIN", enough)
            net = grafted()
            with execution(way):
                results.append(trained(net, forward=part(net, reentrant)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_layer_that_runs_twice_in_a_pass_ends_it(prepared, monkeypatch):
    """Nothing is prepared in vain for long."""
    monkeypatch.setattr(ahead, "ENOUGH_IN_VAIN", 4)
    net = grafted(use="abbcd")
    together = trained(net, passes=10)
    assert "".join(prepared).endswith(4 * "a.b.b.c.d.")
    by_themselves(monkeypatch)
    torch.testing.assert_close(together, trained(grafted(use="abbcd"), passes=10), rtol=0, atol=0)


def test_a_pass_may_take_another_course(prepared, monkeypatch):
    routes = ["ab", "abcd", "abcd", "ab", "ab", "abcd", "bab", "abcd", "ba"] * 2

    def run():
        net = grafted(exclude=["d"])
        net.d, net.a = nn.Linear(12, 5).double(), grafted(exclude=["d"]).a
        graft_of = net

        def before(each):
            graft_of.use = routes[each].replace("ba", "b")

        return trained(net, passes=len(routes), forward=lambda x: net(x if net.use[0] == "a" else x[:, [0, 0, 1, 2]]))

    together = run()
    by_themselves(monkeypatch)
    torch.testing.assert_close(together, run(), rtol=0, atol=0)


def test_weights_that_are_there_for_their_own_turn_alone(prepared):
    """As training sharded over several devices gathers them: what is elsewhere is not prepared ahead."""
    net = grafted()
    base = net.c._parameters["weight"]
    whole = base.data.clone()
    net.c.register_forward_pre_hook(lambda *_: setattr(base, "data", whole.clone()))
    net.c.register_forward_hook(lambda *_: setattr(base, "data", whole.new_empty(0)))
    net.zero_grad()
    ys = [net(X) for _ in range(3)]
    torch.testing.assert_close(ys[1:], ys[:1] * 2, rtol=0, atol=0)
    assert "".join(prepared).endswith("abd..c..")


def test_a_failed_pass_leaves_nothing_wrong(monkeypatch):
    def run():
        net, failing = grafted(), [False, False, True, False, False]

        def forward(x):
            if failing.pop(0):
                with pytest.raises(RuntimeError):
                    net.d(net.b(net.a(x)))
            return net(x)

        return trained(net, forward=forward, passes=5)

    together = run()
    by_themselves(monkeypatch)
    torch.testing.assert_close(together, run(), rtol=0, atol=0)


def test_nothing_is_held():
    net = grafted()
    trained(net, passes=2)
    layer, factor = weakref.ref(net.b), weakref.ref(net.b.segraft["default"]["weight"].m)
    gc.collect()
    gc.disable()
    try:
        del net
        assert layer() is None
        assert factor() is None
    finally:
        gc.enable()


def test_an_adapter_that_was_taken_off_is_not_prepared():
    net = grafted()
    trained(net, passes=2)
    edit = weakref.ref(net.b.segraft["default"]["weight"])
    ungraft(net)
    graft(net, AdapterSpec("lora_c", rank=2))
    trained(net, passes=2)
    assert edit() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_has_a_course_of_its_own(copied, prepared):
    net = grafted()
    trained(net, passes=2)
    other = copied(net)
    courses = {id(grafts_of(getattr(other, name)).course) for name in "abcd"}
    assert len(courses) == 1
    assert courses != {id(grafts_of(net.a).course)}
    prepared.clear()
    trained(other, passes=2)
    assert "".join(prepared) == "a.b.c.d.abcd...."


def test_evaluation_prepares_nothing(prepared):
    net = grafted()
    trained(net, passes=2)
    prepared.clear()
    with torch.no_grad():
        net(X)
    assert prepared == []


def test_within_autocast(monkeypatch):
    def run():
        net = grafted().float()

        def forward(x):
            with torch.autocast("cpu", torch.bfloat16):
                return net(x.float()).float()

        return trained(net, forward=forward)

    together = run()
    by_themselves(monkeypatch)
    torch.testing.assert_close(together, run(), rtol=0, atol=0)
