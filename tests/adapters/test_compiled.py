"""`torch.compile` of an adapted network: what it computes eagerly, also after its factors have changed."""

import shutil

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, activate, graft
from segraft.adapters.grafted import grafts_of
from segraft.networks import UNet

BACKENDS = ["aot_eager", *(["inductor"] if shutil.which("g++") else [])]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(method="dora_c", *, unet=False, **options):
    torch.manual_seed(0)
    if unet:
        net = UNet(widths=(4, 6))
    else:
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 2, 2, stride=2))
    graft(net, AdapterSpec(method, rank=2, **options))
    with torch.no_grad():
        for name, value in net.named_parameters():
            if ".segraft." in name:
                value.add_(0.1 * torch.randn_like(value))
    return net


def image():
    return torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(4))


def step(run, net):
    net.zero_grad(set_to_none=True)
    y = run(image())
    y.square().mean().backward()
    return [y.detach(), *(value.grad for value in net.parameters() if value.requires_grad)]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for each, value in zip(found, expected, strict=True):
        torch.testing.assert_close(each, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "unet"), [("dora_c", True), ("cp_dora", False), ("conv_lora", False)])
def test_training_steps(method, unet):
    net = build(method, unet=unet, bias="low_rank")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    optimiser = torch.optim.AdamW([value for value in net.parameters() if value.requires_grad], lr=0.1)
    seen = []
    for _ in range(3):
        seen.append(step(net, net))
        assert_equal(step(compiled, net), seen[-1])
        optimiser.step()
    assert not torch.allclose(seen[0][0], seen[-1][0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_follows_what_changes(mode):
    net = build().eval()
    graft(net, AdapterSpec("conv_lora", rank=1), "other")
    grafts_of(net[-1]).edits("other")["weight"].B.data.fill_(0.1)
    activate(net, "default")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    edit = grafts_of(net[-1]).edits("default")["weight"]

    def check():
        with mode():
            eager = net(image())  # which keeps composed weights
            torch.testing.assert_close(compiled(image()), eager)
            torch.testing.assert_close(compiled(image()), eager)
        return eager

    seen = [check()]
    with torch.no_grad():
        edit.B.add_(0.5)
    seen.append(check())
    edit.m.data = edit.m.data * 2
    seen.append(check())
    for names in ("other", None, "default"):
        activate(net, names)
        seen.append(check())
    different = [torch.equal(one, other) for place, one in enumerate(seen[:-1]) for other in seen[:place]]
    assert not any(different)
    assert torch.equal(seen[-1], seen[2])


def test_eager_and_compiled_by_turns():
    """Evaluation keeps weights that a compiled training step must neither use nor leave in place."""
    net = build()
    compiled = torch.compile(net, backend="aot_eager")
    optimiser = torch.optim.SGD([value for value in net.parameters() if value.requires_grad], lr=0.5)
    for _ in range(2):
        with torch.no_grad():
            before = net(image())
        assert_equal(step(compiled, net)[:1], [before])
        optimiser.step()
        with torch.no_grad():
            after = net(image())
            torch.testing.assert_close(compiled(image()), after)
        assert not torch.equal(before, after)
        torch.testing.assert_close(net(image()).detach(), after, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inductor's, of torch itself
@pytest.mark.parametrize("backend", BACKENDS[1:] or BACKENDS)
def test_one_layer_as_it_is_compiled_by_default(backend):
    torch.manual_seed(0)
    net = graft(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), AdapterSpec("dora_c", rank=2))
    compiled = torch.compile(net, backend=backend)
    x = torch.randn(1, 3, 6, 6)
    found = []
    for run in (compiled, net):
        net.zero_grad()
        run(x).square().mean().backward()
        found.append([value.grad.clone() for value in net.parameters() if value.requires_grad])
    assert_equal(*found)
