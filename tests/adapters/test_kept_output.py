"""The gradient of DoRA's magnitude comes from the layer's output, whatever is done to that in place afterwards."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from segraft.adapters import AdapterSpec, graft
from segraft.adapters.execution import execution

METHODS = ["dora_c", "cp_dora"]


class Then(nn.Module):
    """A step between layers, written as a function of the layer's output."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return self.step(x)


def relu_of_a_view(y):
    y[:, :2].relu_()
    return y


def without_graph(y):
    with torch.no_grad():
        y.mul_(1.5)
    return y


def relu_then_noise_without_graph(y):
    y = y.relu_()
    with torch.no_grad():
        y.add_(y > 0)
    return y


def detached_then_relu(y):
    y.detach().relu_()
    return y


def relu_of_a_flat_view(y):
    y.flatten(1).relu_()
    return y


FOLLOWERS = {
    "nothing": nn.Identity,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu": nn.ReLU,
    "leaky relu in place": lambda: nn.LeakyReLU(inplace=True),
    "leaky relu that turns": lambda: nn.LeakyReLU(-0.5),
    "elu in place": lambda: nn.ELU(inplace=True),
    "hardtanh in place": lambda: nn.Hardtanh(inplace=True),
    "silu in place": lambda: nn.SiLU(inplace=True),
    "dropout in place": lambda: nn.Dropout(0.5, inplace=True),
    "add": lambda: Then(lambda y: y.add_(1)),
    "multiply": lambda: Then(lambda y: y.mul_(2)),
    "sigmoid": lambda: Then(lambda y: y.sigmoid_()),
    "clamp": lambda: Then(lambda y: y.clamp_(min=0.1)),
    "zero": lambda: Then(lambda y: y.masked_fill_(y < 0, 0)),
    "relu, then relu": lambda: Then(lambda y: y.relu_().relu()),
    "relu twice": lambda: Then(lambda y: y.relu_().relu_()),
    "relu, then add": lambda: Then(lambda y: y.relu_().add_(1)),
    "add, then relu": lambda: Then(lambda y: y.add_(1).relu_()),
    "relu beside": lambda: Then(lambda y: y.relu() + y.relu_()),
    "relu of a view": lambda: Then(relu_of_a_view),
    "relu of a flat view": lambda: Then(relu_of_a_flat_view),
    "write without graph": lambda: Then(without_graph),
    "relu, then write without graph": lambda: Then(relu_then_noise_without_graph),
    "relu without graph": lambda: Then(detached_then_relu),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "batch norm, relu": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "in place of itself": lambda: Then(lambda y: y.copy_(y.detach() * 3)),
}


def build(*between, method="dora_c", seed=0):
    """Two or three adapted convolutions with something between."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3, padding=1)]
    for each in between:
        layers += [each, nn.Conv2d(4, 4, 3, padding=1)]
    return adapt(nn.Sequential(*layers), method)


def adapt(net, method="dora_c"):
    graft(net.double(), AdapterSpec(method, rank=2, bias="low_rank"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if ".segraft." in name:
                value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return net


def image(seed=4):
    return torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(net):
    return {name: value.grad.clone() for name, value in net.named_parameters() if value.requires_grad}


def one_pass(net, x, way, forward=None):
    net.zero_grad()
    torch.manual_seed(1)  # of dropout
    with execution(way):
        (forward or net)(x).square().sum().backward()
    return gradients(net)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("follower", FOLLOWERS)
@pytest.mark.parametrize("last", [False, True], ids=["between", "last"])
def test_what_follows_in_place(follower, method, last):
    net = build(FOLLOWERS[follower](), method=method)
    if last:
        net.append(FOLLOWERS[follower]().double().requires_grad_(False))
    try:
        expected = one_pass(net, image(), "composed")
    except RuntimeError:  # where torch cannot, neither need a way of ours, but it may not give something else instead
        assert follower in ("relu, then add", "relu twice", "relu, then write without graph", "relu beside")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            one_pass(net, image(), "chain")
        return
    for way in ("chain", "parallel", "weight", None):
        assert_equal(one_pass(net, image(), way), expected)


class Residual(nn.Module):
    """`y += skip`, of an output of an adapted layer and of one of a frozen layer."""

    def __init__(self, *, relu_first):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu_first = relu_first

    def forward(self, x):
        skip = self.first(x)
        if self.relu_first:
            skip = skip.relu_()
        y = self.second(skip)
        y += skip
        return self.first(y.relu_())


@pytest.mark.parametrize("relu_first", [False, True])
def test_residual_sums_and_a_layer_that_is_used_twice(relu_first):
    torch.manual_seed(0)
    net = adapt(Residual(relu_first=relu_first))
    expected = one_pass(net, image(), "composed")
    for way in ("chain", "parallel", "weight", None):
        assert_equal(one_pass(net, image(), way), expected)


def test_two_networks_layer_by_layer():
    nets = [build(nn.ReLU(inplace=True), nn.ReLU(inplace=True), seed=seed) for seed in (0, 1)]
    expected = [one_pass(net, image(seed), "composed") for seed, net in enumerate(nets)]
    for net in nets:
        net.zero_grad()
    with execution("chain"):
        values = [image(0), image(1)]
        for layers in zip(*nets, strict=True):
            values = [layer(value) for layer, value in zip(layers, values, strict=True)]
        (values[0].square().sum() + values[1].square().sum()).backward()
    for net, each in zip(nets, expected, strict=True):
        assert_equal(gradients(net), each)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations(reentrant):
    net, x = build(nn.ReLU(inplace=True), nn.ReLU(inplace=True)), image().requires_grad_()

    def forward(value):
        for part in (net[:2], net[2:4], net[4:]):
            value = checkpoint(part, value, use_reentrant=reentrant)
        return value

    assert_equal(one_pass(net, x, "chain", forward), one_pass(net, x, "composed"))


def test_threads():
    nets = [build(nn.ReLU(inplace=True), nn.LeakyReLU(inplace=True), seed=seed) for seed in range(3)]
    expected = [one_pass(net, image(seed), "composed") for seed, net in enumerate(nets)]
    found = [[] for _ in nets]
    together = threading.Barrier(len(nets))

    def run(place):
        together.wait()
        for _ in range(10):
            nets[place].zero_grad()
            with execution("chain"):
                nets[place](image(place)).square().sum().backward()
            found[place].append(gradients(nets[place]))

    # The seed of `one_pass` is global, so it stays out of the threads.
    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(nets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, every in zip(expected, found, strict=True):
        assert len(every) == 10
        for one in every:
            assert_equal(one, each)


def test_backward_twice_and_accumulation():
    net = build(nn.ReLU(inplace=True))
    first, second = one_pass(net, image(0), "composed"), one_pass(net, image(1), "composed")
    net.zero_grad()
    with execution("chain"):
        loss = net(image(0)).square().sum()
    loss.backward(retain_graph=True)
    assert_equal(gradients(net), first)
    loss.backward()
    assert_equal(gradients(net), {name: 2 * value for name, value in first.items()})
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    net.zero_grad()
    with execution("chain"):
        for seed in (0, 1):
            net(image(seed)).square().sum().backward()
    assert_equal(gradients(net), {name: value + second[name] for name, value in first.items()})


@pytest.mark.parametrize("way", ["chain", "parallel", "weight"])
def test_factors_that_change_between_forward_and_backward(way):
    """As of any other layer: an error or the gradients of what was computed, never those of a mixture."""
    net, x = build(nn.ReLU(inplace=True)), image()
    expected = one_pass(net, x, "composed")
    edit = net[0].segraft["default"]["weight"]
    for value in edit.parameters():
        net.zero_grad()
        with execution(way):
            loss = net(x).square().sum()
        with torch.no_grad():
            value.mul_(2)
        try:
            loss.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
        else:
            assert_equal(gradients(net), expected)
        with torch.no_grad():
            value.div_(2)


@pytest.mark.parametrize("way", ["composed", "weight", "chain", "parallel"])
def test_recomputation_frees_the_outputs_that_are_kept(way):
    """Keeping them beside the tensors that autograd saves would defeat it."""

    def living(recompute):
        net, x, alive = build(*(nn.ReLU(inplace=True) for _ in range(4))), image().requires_grad_(), []
        for layer in net:
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda _, __, y: alive.append(y.untyped_storage()._weak_ref()))
        with execution(way):
            y = checkpoint(net, x, use_reentrant=False) if recompute else net(x)
        found = sum(not torch.UntypedStorage._expired(each) for each in alive)
        for each in alive:
            torch.UntypedStorage._free_weak_ref(each)
        del y
        return found

    assert living(recompute=False) == 5
    assert living(recompute=True) == 1
