"""Low precision, memory formats, tensor subclasses and function transforms: every way follows the composed one."""

import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torch.func import functional_call, grad, vmap

from segraft.adapters import AdapterSpec, graft
from segraft.adapters.execution import execution
from segraft.networks import UNet

WAYS = ["composed", "weight", "chain", "parallel", None]
METHODS = ["conv_lora", "lora_c", "cp_lora", "dora_c", "conv_dora", "cp_dora"]
LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (2, 30, 12)),
    "conv2d": (lambda: nn.Conv2d(12, 20, 3, padding=1), (2, 12, 9, 8)),
    "conv2d-strided": (lambda: nn.Conv2d(12, 20, 3, padding=1, stride=2), (2, 12, 9, 8)),
    "conv2d-pointwise": (lambda: nn.Conv2d(12, 20, 1), (2, 12, 9, 8)),
    "conv2d-circular": (lambda: nn.Conv2d(12, 20, 3, padding=1, padding_mode="circular"), (2, 12, 9, 8)),
    "conv2d-one-channel": (lambda: nn.Conv2d(1, 20, 3, padding=1), (2, 1, 9, 8)),
    "conv2d-one-output": (lambda: nn.Conv2d(20, 1, 3, padding=1), (2, 20, 9, 8)),
    "transposed2d": (lambda: nn.ConvTranspose2d(12, 20, 2, stride=2), (2, 12, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(6, 10, 3, padding=1), (2, 6, 4, 5, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(6, 10, 2, stride=2), (1, 6, 3, 2, 3)),
}


def build(make, method, *, scale=0.1, **options):
    torch.manual_seed(0)
    net = nn.Sequential(make())
    graft(net, AdapterSpec(method, rank=3, **options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if ".segraft." in name:
                value.add_(scale * torch.randn(value.shape, generator=generator))
    return net


def draw(*shape, seed=4):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(net, x, way, *, autocast=None):
    """The output, the gradient of the input and of every trained tensor."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    net.zero_grad(set_to_none=True)
    with execution(way), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = net(x)
    g = draw(*y.shape, seed=11).to(y.dtype)
    y.backward(g)
    gradients = {name: value.grad for name, value in net.named_parameters() if value.requires_grad}
    return {"output": y, "input": x.grad, **gradients}


def error(found, exact):
    """Relative to the tensor's norm; a few numbers alone, each a sum over everything, may cancel by a digit."""
    relative = (found.double() - exact.double()).norm() / exact.double().norm()
    return relative.item() / (8 if exact.numel() < 4 else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_step_under_autocast_is_near_that_in_float32(layer, method, dtype):
    make, shape = LAYERS[layer]
    net, x = build(make, method, bias="low_rank"), draw(*shape)
    exact = results(net, x, "composed")
    # Input, weight, output and its gradient are each rounded once (relative error eps / 2 at most, a third of that on
    # average); the chain rounds once per stage besides.
    tolerance = 3 * torch.finfo(dtype).eps
    for way in WAYS:
        found = results(net, x, way, autocast=dtype)
        assert found["output"].dtype == dtype
        assert found["input"].dtype == torch.float32
        for name, value in exact.items():
            assert name == "output" or found[name].dtype == torch.float32, name
            assert error(found[name], value) < tolerance, (way, name)


@pytest.mark.parametrize("way", WAYS)
def test_small_updates_reach_the_weight_under_autocast(way):
    """ΔW = 2⁻¹² W0, that bfloat16 (2⁻⁸) cannot add, moves those weights that it carries past a rounding."""
    net = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False))
    graft(net, AdapterSpec("conv_lora", rank=64, alpha=64))
    edit = net[0].segraft["default"]["weight"]
    base = net[0]._parameters["weight"].detach()
    with torch.no_grad():
        edit.A.copy_(torch.eye(64).view(64, 64, 1, 1))
        edit.B.copy_(base[:, :, 0, 0] * 2**-12)
    exact = base * (1 + 2**-12)
    torch.testing.assert_close(net[0].weight.detach(), exact, rtol=1e-7, atol=0)
    # One-hot images read the weight that was used.
    x = torch.eye(64).view(64, 64, 1, 1).requires_grad_()
    with execution(way), torch.autocast("cpu", torch.bfloat16):
        used = net(x)[:, :, 0, 0].t()
    rounded = exact[:, :, 0, 0].to(torch.bfloat16)
    assert torch.equal(used, rounded)
    assert not torch.equal(rounded, base[:, :, 0, 0].to(torch.bfloat16))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", ["conv_lora", "dora_c"])
def test_a_base_in_bfloat16(layer, method):
    make, shape = LAYERS[layer]
    reference = build(make, "lora")
    with torch.no_grad():
        plain = nn.Sequential(make()).bfloat16()
        plain.load_state_dict({key: v for key, v in reference.state_dict().items() if "segraft" not in key})
    low = graft(plain, AdapterSpec(method, rank=3))
    exact = graft(nn.Sequential(make()), AdapterSpec(method, rank=3))
    with torch.no_grad():
        for (name, value), other in zip(low.named_parameters(), exact.parameters(), strict=True):
            if ".segraft." in name:
                value.add_(0.1 * draw(*value.shape, seed=len(name)))
            other.copy_(value)
    x = draw(*shape).bfloat16()
    expected = results(exact, x.float(), "composed")
    for way in WAYS:
        found = results(low, x, way)
        assert found["output"].dtype == found["input"].dtype == torch.bfloat16
        for name, value in expected.items():
            assert name in ("output", "input") or found[name].dtype == torch.float32, name
            assert error(found[name], value) < 3 * torch.finfo(torch.bfloat16).eps, (way, name)


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", [name for name, (_, shape) in LAYERS.items() if len(shape) > 3])
def test_channels_last(layer, method, dtype):
    make, shape = LAYERS[layer]
    memory_format = FORMATS[len(shape)]
    net, x = build(make, method, bias="low_rank").to(dtype), draw(*shape).to(dtype)
    exact = results(net.double(), x.double(), "composed")
    net.to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    for weights_too in (False, True):
        plain = nn.Sequential(make()).to(dtype).requires_grad_(False)
        if weights_too:
            plain.to(memory_format=memory_format)
            for value in (v for v in net.parameters() if v.ndim == x.ndim):
                value.data = value.data.contiguous(memory_format=memory_format)
        for way in WAYS:
            for each in (x, x.to(memory_format=memory_format)):
                found = results(net, each, way)
                for name, value in exact.items():
                    assert error(found[name], value) < tolerance, (way, name)
                # Where both formats have the same memory torch goes by strides that no computation keeps.
                if plain[0].weight.is_contiguous() and plain[0].weight.is_contiguous(memory_format=memory_format):
                    continue
                for layout in (memory_format, torch.contiguous_format):
                    kept = found["output"].is_contiguous(memory_format=layout)
                    assert kept == plain(each).is_contiguous(memory_format=layout), way


@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_network_is_brought_into_channels_last(method):
    """`lora_c` has factors of four dimensions on kernels of three."""
    for layer, memory_format in (("conv2d", torch.channels_last), ("conv3d", torch.channels_last_3d)):
        make, shape = LAYERS[layer]
        net, x = build(make, method), draw(*shape)
        expected = results(net, x, "composed")
        net.to(memory_format=memory_format)
        for name, value in results(net, x, None).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_whole_network_channels_last_under_autocast(way):
    torch.manual_seed(0)
    net = graft(UNet(widths=(8, 16, 16), norm="instance"), AdapterSpec("dora_c", rank=2))
    x = draw(2, 1, 16, 16)
    net(x).square().mean().backward()
    exact = {name: value.grad for name, value in net.named_parameters() if value.requires_grad}
    net.to(memory_format=torch.channels_last).zero_grad(set_to_none=True)
    with execution(way), torch.autocast("cpu", torch.bfloat16):
        loss = net(x.to(memory_format=torch.channels_last)).float().square().mean()
    loss.backward()
    cosine = nn.functional.cosine_similarity
    found = {name: value.grad for name, value in net.named_parameters() if value.requires_grad}
    flat = [torch.cat([each.flatten() for each in values.values()]) for values in (found, exact)]
    assert cosine(*flat, dim=0) > 0.99
    assert all(value.dtype == torch.float32 for value in found.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", ["conv2d", "conv3d", "transposed2d", "linear"])
def test_a_meta_tensor(layer, way):
    """As MONAI's loaders give: the type of the output is what the plain layer makes of it."""
    make, shape = LAYERS[layer]
    net, x = build(make, "dora_c"), draw(*shape)
    expected = results(net, x, "composed")
    plain = make()(MetaTensor(x))
    found = results(net, MetaTensor(x, meta={"name": "x"}), way)
    assert type(found["output"]) is type(plain)
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(found[name]).as_subclass(torch.Tensor), value, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert type(net(MetaTensor(x))) is type(plain)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of torch's own jvp
@pytest.mark.parametrize("way", WAYS)
def test_function_transforms(way):
    net, x = build(LAYERS["conv2d"][0], "dora_c"), draw(*LAYERS["conv2d"][1])
    trained = {name: value.detach() for name, value in net.named_parameters() if value.requires_grad}
    expected = results(net, x, "composed")
    g = draw(*expected["output"].shape, seed=11)

    def loss(factors, image):
        return (functional_call(net, factors, image) * g).sum()

    with execution(way):
        found = grad(loss)(trained, x)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
        each = vmap(lambda image: functional_call(net, trained, image.unsqueeze(0)))(x)
        torch.testing.assert_close(each[:, 0], expected["output"].detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            torch.func.jvp(lambda image: functional_call(net, trained, image), (x,), (x,))[1],
            (expected["output"] - net[0].bias.view(-1, 1, 1)).detach(),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("way", WAYS)
def test_anomaly_mode_tracing_and_gradient_hooks(way):
    net, x = build(LAYERS["conv2d"][0], "dora_c"), draw(*LAYERS["conv2d"][1])
    expected = results(net, x, "composed")
    with torch.autograd.set_detect_anomaly(True, check_nan=True) if way is None else execution(way):
        found = results(net, x, way)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    seen = []
    net[0].register_full_backward_hook(lambda _, of_x, of_y: seen.append((of_x[0], of_y[0])))
    found = results(net, x, way)
    torch.testing.assert_close(seen[0][0], found["input"])
