"""Adapters per channel under autocast: as near to the exact result as switching is."""

import pytest
import torch
from tests.adapters.routes import ROUTE, build, images, of_one_pass, of_switching, spec_of, switched
from torch import nn

from segraft.adapters import graft, routed


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("method", ["rs_lora", "dora"])
def test_under_autocast(kind, method):
    spec = spec_of(method)
    net, x = build(kind, spec, dtype=torch.float32), images(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, gradients = of_one_pass(net, x)
        gradients = {key: value.clone() for key, value in gradients.items()}
        assert y.dtype == torch.bfloat16
        y_of_loop, gradients_of_loop = of_switching(switched(net, spec), x)
    net.zero_grad()
    exact, exact_gradients = of_one_pass(net, x)
    assert (y - exact).abs().max() <= 2 * (y_of_loop - exact).abs().max() + 0.01 * exact.abs().max()
    whole, theirs, ours = (
        torch.cat([found[key].flatten() for key in exact_gradients])
        for found in (exact_gradients, gradients_of_loop, gradients)
    )
    assert ours.dtype == torch.float32
    assert (ours - whole).norm() <= 2 * (theirs - whole).norm() + 0.03 * whole.norm()


@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 48), lambda: nn.Conv2d(8, 4, 3)])
def test_magnitudes_under_autocast_are_of_the_weight_itself(make):
    """A fresh adapter changes no bit, though the weight that is multiplied is rounded."""
    torch.manual_seed(0)
    net = nn.Sequential(make())
    x = torch.randn(6, 64) if isinstance(net[0], nn.Linear) else torch.randn(6, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x).detach()
        graft(net, spec_of("dora"))
        with routed(ROUTE):
            assert torch.equal(net(x), before)
