"""Adapters per channel: what a step keeps, what it computes again, in other threads too, and what is compiled."""

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tests.adapters.routes import CHANNELS, ROUTE, assert_alike, build, images, spec_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segraft.adapters import AdapterSpec, adapter_tensors, graft, prune, routed
from segraft.adapters.grafted import grafts_of
from segraft.errors import SegraftError
from segraft.training.recomputation import recomputing


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: nn.Linear(32, 64), (8, 32)), (lambda: nn.Conv3d(4, 8, 3), (4, 5, 5, 5))]
)
@pytest.mark.parametrize("rank", [0, 2])
def test_what_a_step_keeps(make, shape, rank):
    """Of the activations the input, once, for the factors' gradients; nothing for the frozen weight's."""
    net = nn.Sequential(make())
    x = torch.randn(2 * CHANNELS, *shape).requires_grad_()
    graft(net, AdapterSpec("arena", rank=2, channels=CHANNELS, targets=None))
    if rank == 0:
        with torch.no_grad():
            for edit in grafts_of(net[0]).channel_edits():
                edit.v.zero_()
        prune(net)
    weight, storages = net.state_dict()["0.weight"], {}

    def pack(value: Tensor) -> Tensor:
        storages[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), routed(ROUTE):
        y = net(x)
    large = {
        key for key, value in storages.items() if value.untyped_storage().nbytes() >= 4 * min(x.numel(), y.numel())
    }
    images = {x.untyped_storage().data_ptr()}
    assert large - {weight.untyped_storage().data_ptr()} <= images
    if rank == 0 and weight.ndim > 2:
        assert not large & images


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("method", ["rs_lora", "dora"])
def test_recomputed_activations_know_their_channels(kind, method):
    """The backward pass is outside `routed`."""
    inner, x = build(kind, spec_of(method)), images(kind)
    net, factors = nn.Sequential(inner), adapter_tensors(inner, "default")

    def step(channels: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        net.zero_grad()
        with routed(channels):
            y = net(torch.cat(x[: len(channels)]))
        y.square().mean().backward()
        return y.detach(), {key: value.grad.clone() for key, value in factors.items()}

    orders = (ROUTE, [1], ROUTE, [0, 2])
    wanted = [step(channels) for channels in orders]
    with recomputing(net, ["0"]):
        found = [step(channels) for channels in orders]
        assert not len(grafts_of(inner[0]).passes.alive)  # what was passed is let go
    for (y, gradients), (y_again, gradients_again) in zip(wanted, found, strict=True):
        assert torch.equal(y, y_again)
        assert_alike(gradients_again, gradients, rtol=0, atol=0)


def test_recomputation_in_another_thread():
    """Where a GPU's backward pass runs."""
    net, x = build("linear", spec_of("rs_lora")), torch.cat(images("linear"))
    with routed(ROUTE):
        loss = checkpoint(net, x, use_reentrant=False).square().mean()
        net(x).square().mean().backward()
    wanted = {key: value.grad.clone() for key, value in adapter_tensors(net, "default").items()}
    net.zero_grad()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_alike({key: value.grad for key, value in adapter_tensors(net, "default").items()}, wanted)


def test_recomputation_of_two_passes_at_once():
    """Of the same channels it is clear; of others it would be a guess, and is refused."""
    net, x = build("linear", spec_of("rs_lora")), images("linear")

    def loss(channels: list[int]) -> Tensor:
        with routed(channels):
            return checkpoint(net, torch.cat(x), use_reentrant=False).square().mean()

    (loss(ROUTE) + loss(ROUTE)).backward()
    both = loss(ROUTE) + loss([0, 1, 2])
    with pytest.raises(SegraftError, match="several passes with other channels"):
        both.backward()
    del both
    loss([0, 1, 2]).backward()
    # within another order, which is not that of the pass
    held = loss(ROUTE)
    net.zero_grad()
    with routed([0]):
        held.backward()
    found = {key: value.grad.clone() for key, value in adapter_tensors(net, "default").items()}
    net.zero_grad()
    loss(ROUTE).backward()
    assert_alike(found, {key: value.grad for key, value in adapter_tensors(net, "default").items()})


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_recomputed_parts_keep_the_channels_of_each_pass(kind):
    """Also where passes of several orders wait together, where it runs in another thread, and a second time."""
    inner = build(kind, spec_of("rs_lora"))
    net, factors, x = nn.Sequential(inner), adapter_tensors(inner, "default"), images(kind)

    def loss(*orders: list[int]) -> Tensor:
        net.zero_grad()
        total = torch.zeros((), dtype=x[0].dtype)
        for weight, channels in enumerate(orders, start=1):
            with routed(channels):
                total = total + weight * net(torch.cat(x[: len(channels)])).square().mean()
        return total

    def gradients(run: Callable[[], object]) -> dict[str, Tensor]:
        run()
        return {key: value.grad.clone() for key, value in factors.items()}

    orders = (ROUTE, [0, 1, 2], [1], [2, 0])
    wanted = gradients(loss(*orders).backward)
    with recomputing(net, ["0"]):
        found = loss(*orders)
        assert_alike(gradients(partial(found.backward, retain_graph=True)), wanted)
        net.zero_grad()
        assert_alike(gradients(partial(found.backward, retain_graph=True)), wanted)
        net.zero_grad()
        thread = threading.Thread(target=found.backward)
        with routed([0]):  # not that of any pass
            thread.start()
            thread.join()
        assert_alike({key: value.grad for key, value in factors.items()}, wanted)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where it leaves what it compiled
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_compiled(kind):
    """The order of channels cannot be traced, so these layers run eagerly within what is compiled."""
    torch.compiler.reset()
    net, x = build(kind, spec_of("rs_lora"), dtype=torch.float32), images(kind, torch.float32)
    compiled = torch.compile(net, backend="aot_eager")
    for route in (ROUTE, [0, 1, 2], ROUTE):
        with routed(route):
            found, wanted = compiled(torch.cat(x)), net(torch.cat(x))
        torch.testing.assert_close(found, wanted)
    net.zero_grad()
    found.square().mean().backward()
    found = {key: value.grad.clone() for key, value in adapter_tensors(net, "default").items()}
    net.zero_grad()
    wanted.square().mean().backward()
    assert_alike(found, {key: value.grad for key, value in adapter_tensors(net, "default").items()})
    with pytest.raises(SegraftError, match="was called without their order"):
        compiled(torch.cat(x))
    torch.compiler.reset()
