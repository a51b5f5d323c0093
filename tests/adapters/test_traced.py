"""Whoever traces the composition of a weight finds products that all compilers, exporters and transforms know."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from segraft.adapters import AdapterSpec, graft, products

pytestmark = [
    pytest.mark.skipif(not products.HAS_ONEDNN, reason="this torch or processor is without oneDNN"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.fixture(params=[4, 40], ids=["spread", "as they are"])
def net(request, monkeypatch) -> nn.Module:
    """One whose weights are composed anew at each call, by a product of any size, from either form of the matrices."""
    monkeypatch.setattr(products, "ENOUGH", 1)
    torch.manual_seed(0)
    net = graft(
        nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 1)), AdapterSpec("dora_c", rank=request.param)
    )
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.segraft["default"]["weight"].B.normal_(0, 0.1)
    return net.eval()


def vmapped(net: nn.Module, x: Tensor) -> Tensor:
    values = dict(net.named_parameters())
    stacked = {name: torch.stack([value, 2 * value]) for name, value in values.items() if name.endswith(".B")}
    together = values | stacked
    where = {name: 0 if name in stacked else None for name in together}
    return torch.vmap(lambda each: torch.func.functional_call(net, each, (x,)), in_dims=(where,))(together)[0]


def compiled(net: nn.Module, x: Tensor) -> Tensor:
    torch.compiler.reset()
    return torch.compile(net, backend="aot_eager")(x)


def counted(net: nn.Module, x: Tensor) -> Tensor:
    with FlopCounterMode(display=False):
        y: Tensor = net(x)
    return y


def pushed_forward(net: nn.Module, x: Tensor) -> Tensor:
    values = dict(net.named_parameters())
    y: Tensor = torch.func.jvp(lambda given: torch.func.functional_call(net, given, (x,)), (values,), (values,))[0]
    return y


TRACED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "vmap": vmapped,
    "jvp": pushed_forward,
    "compiled": compiled,
    "exported": lambda net, x: torch.export.export(net, (x,)).module()(x),
    "fx": lambda net, x: make_fx(net, tracing_mode="real")(x)(x),
    "counted": counted,
}


@pytest.mark.parametrize("traced", TRACED)
def test_no_product_of_onednn_is_traced(net, traced, monkeypatch):
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        expected = net(x)
        for layer in (net[0], net[2]):
            layer.segraft.composed.clear()  # so that it is composed while it is traced
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
            found = TRACED[traced](net, x)
    torch.testing.assert_close(found, expected)


def test_no_product_of_onednn_is_in_a_jit_trace(net):
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        traced = torch.jit.trace(net, (x,))
        assert "mkldnn" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), net(x))


def test_eagerly_it_is_onednns(net, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    with torch.no_grad(), pytest.raises(TypeError, match="not callable"):
        net(torch.randn(2, 8, 9, 9))
