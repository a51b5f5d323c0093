"""An output that is kept for a magnitude's gradient, when the ReLU in place is not all that happens to it."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from segraft.adapters import AdapterSpec, graft
from segraft.adapters import kept as kept_outputs
from segraft.adapters.edits import LowRank
from segraft.adapters.execution import execution
from segraft.adapters.grafted import grafts_of


class Net(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.first, self.second, self.use = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), use

    def forward(self, x):
        y = self.first(x)
        beside = self.use(y)
        return (self.second(y.relu_()) * torch.linspace(-1, 1, 8, dtype=x.dtype)).sum() + beside


USES = {
    "none": lambda y: 0.0,
    "a sum beside": lambda y: y.sum(),
    "twice": lambda y: (2 * y).sum(),
    "copied": lambda y: (y.clone() * torch.linspace(0, 1, 8, dtype=y.dtype)).sum(),
    "a hook": lambda y: y.register_hook(lambda g: g + 0.1) and 0.0,
    "a hook in place": lambda y: y.register_hook(lambda g: g.add_(0.1)) and 0.0,
}


def gradients(net, x, way):
    net.zero_grad()
    with execution(way):
        net(x).backward()
    return {name: value.grad for name, value in net.named_parameters() if value.requires_grad}


class Beside(nn.Module):
    """A transposed convolution whose output is put beside other features, as in U-Nets."""

    def __init__(self, join, channels=12):
        super().__init__()
        self.first, self.join = nn.ConvTranspose2d(4, 6, 2, stride=2), join
        self.second = nn.Conv2d(channels, 3, 3)

    def forward(self, x):
        y = self.second(self.join(self.first(x), x.repeat(1, 2, 2, 2)[:, :6]))
        return (y * torch.linspace(-1, 1, 6, dtype=x.dtype)).sum()


def cat(*tensors, dim=1):
    return torch.cat(tensors, dim)


def in_secret(y):
    """Autograd's graph does not tell."""
    with torch.no_grad():
        return y.mul_(2)


JOINS = {
    "first": (12, True, cat),
    "last": (12, True, lambda y, skip: cat(skip, y, dim=-3)),
    "in the middle": (18, False, lambda y, skip: cat(skip, y, skip)),
    "twice": (12, False, lambda y, skip: cat(y, y)),
    "in the batch": (6, False, lambda y, skip: cat(y, skip, dim=0)),
    "in space": (6, False, lambda y, skip: cat(y, skip, dim=2)),
    "alone": (6, True, lambda y, skip: cat(y)),
    "added": (6, False, lambda y, skip: y + skip),
    "after a ReLU": (12, False, lambda y, skip: cat(y.relu(), skip)),
    "after a ReLU in place": (12, False, lambda y, skip: cat(y.relu_(), skip)),
    "changed after it": (12, False, lambda y, skip: (cat(y, skip), y.mul_(2))[0]),
    "used beside it": (12, True, lambda y, skip: cat(y, skip + y)),
    "changed in secret": (12, False, lambda y, skip: in_secret(cat(y, skip))),
    "changed in secret before": (12, False, lambda y, skip: cat(in_secret(y), skip)),
    "in other precision": (12, False, lambda y, skip: cat(y.float(), skip).double()),
    "overwritten": (12, False, lambda y, skip: cat(y, skip).relu_()),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", ["dora_c", "conv_dora", "cp_dora"])
@pytest.mark.parametrize("join", JOINS)
def test_output_put_beside_others(join, method, batch, monkeypatch):
    """The copy within the next layer's input serves instead of the output, where it is one."""
    channels, copied, joins = JOINS[join]
    net = graft(Beside(joins, channels).double(), AdapterSpec(method, rank=2))
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.3 * torch.randn_like(value))
    x = torch.randn(batch, 4, 4, 4, dtype=torch.float64)
    found_valid = []
    is_valid = kept_outputs.Kept.is_valid

    def spy(kept, g):
        found = is_valid(kept, g)
        if kept.copied:
            found_valid.append(found)
        return found

    expected = gradients(net, x, "composed")
    monkeypatch.setattr(kept_outputs.Kept, "is_valid", spy)
    for way in ("weight", "chain", "parallel", None):
        found = gradients(net, x, way)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda text, at=(way, name): f"{at}: {text}")
    assert set(found_valid) == {copied}


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("adapted", [True, False])
def test_what_the_output_is_put_beside_is_not_kept_for_it(adapted, padding_mode):
    """Where the next layer does not keep its input, being frozen or padding it, nor is that kept."""
    net, inputs = Beside(cat), []
    net.second = nn.Conv2d(12, 3, 3, padding=1, padding_mode=padding_mode)
    net.forward = lambda x: net.second(net.join(net.first(x), x.repeat(1, 2, 2, 2)[:, :6])).sum()
    net = graft(net, AdapterSpec("dora_c", rank=2, exclude=None if adapted else ["second"]))
    net.second.register_forward_pre_hook(lambda _, x: inputs.append(x[0].untyped_storage()._weak_ref()))
    with execution("chain"):
        loss = net(torch.randn(2, 4, 4, 4))
        kept = adapted and padding_mode == "zeros"
        assert torch.UntypedStorage._expired(inputs[0]) != kept
        loss.backward()
    torch.UntypedStorage._free_weak_ref(inputs[0])


class Copies(TorchDispatchMode):
    """What is copied into another order of memory."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default and args[0].ndim == 4 and args[0].numel() > 1000:
            self.made.append(found)
        return found


@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("way", ["weight", "chain"])
def test_gradients_of_features_beside_others_keep_channels_last(way, make):
    layer = graft(make(8, 16, 2, stride=2), AdapterSpec("conv_lora", rank=2))
    x = torch.randn(2, 8, 16, 16, requires_grad=True).to(memory_format=torch.channels_last)
    with execution(way), Copies() as copies:
        y = layer(x)
        torch.cat((y, y.detach()), 1).square().sum().backward()
    assert not [copy for copy in copies.made if not copy.is_contiguous(memory_format=torch.channels_last)]


def test_output_put_beside_others_is_not_kept_itself():
    net, outputs = graft(Beside(cat), AdapterSpec("dora_c", rank=2)), []
    net.first.register_forward_hook(lambda _, __, y: outputs.append(y.untyped_storage()._weak_ref()))
    with execution("chain"):
        loss = net(torch.randn(2, 4, 4, 4))
        assert torch.UntypedStorage._expired(outputs[0])
        loss.backward()
    torch.UntypedStorage._free_weak_ref(outputs[0])


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("method", ["dora_c", "conv_dora"])
def test_gradients_with_other_uses_of_the_output(use, method):
    net = graft(Net(USES[use]).double(), AdapterSpec(method, rank=2))
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.3 * torch.randn_like(value))
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    expected = gradients(net, x, "composed")
    for way in ("weight", "chain", "parallel", None):
        found = gradients(net, x, way)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda text, at=(way, name): f"{at}: {text}")


@pytest.mark.parametrize("way", ["weight", "chain", "parallel", None])
def test_a_linear_layer_on_something_that_lies_like_channels_last(way):
    net = graft(nn.Sequential(nn.Linear(5, 6)).double(), AdapterSpec("dora", rank=2))
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.3 * torch.randn_like(value))
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64).permute(0, 3, 1, 2)
    assert x.movedim(1, -1).is_contiguous()

    def found(how):
        net.zero_grad()
        with execution(how):
            net(x).square().sum().backward()
        return {name: value.grad for name, value in net.named_parameters() if value.requires_grad}

    expected, mine = found("composed"), found(way)
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value)


def test_the_weight_is_composed_once_a_step(monkeypatch):
    calls = []
    monkeypatch.setattr(LowRank, "forward", lambda *_: calls.append(1))  # what reading `weight` would run
    net = graft(nn.Conv2d(4, 6, 3, padding="valid"), AdapterSpec("conv_lora", rank=2))
    net(torch.randn(2, 4, 8, 8)).sum().backward()
    assert not calls


def test_only_the_magnitude_trained():
    net = graft(Net(USES["none"]).double(), AdapterSpec("dora_c", rank=2))
    for name, value in net.named_parameters():
        value.requires_grad_(name.endswith(".m"))
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    expected, found = gradients(net, x, "composed"), gradients(net, x, "chain")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_outputs_are_freed_by_the_backward_pass_though_the_loss_is_held():
    net, outputs = graft(Net(USES["none"]), AdapterSpec("dora_c", rank=2)), []
    net.first.register_forward_hook(lambda _, __, y: outputs.append(y.untyped_storage()._weak_ref()))
    with execution("chain"):
        loss = net(torch.randn(2, 4, 8, 8))
        assert not torch.UntypedStorage._expired(outputs[0])
        loss.backward()
    assert torch.UntypedStorage._expired(outputs[0])
    torch.UntypedStorage._free_weak_ref(outputs[0])
    assert loss.grad_fn is not None


def test_nothing_holds_the_last_output():
    net = graft(nn.Conv2d(4, 6, 3), AdapterSpec("dora_c", rank=2))
    with execution("chain"):
        y = net(torch.randn(2, 4, 8, 8))
    watched = weakref.ref(kept_outputs._LAST.kept())
    del y
    gc.collect()
    assert watched() is None


def test_a_fused_optimiser_makes_evaluation_compose_anew(monkeypatch):
    net = graft(nn.Conv2d(4, 6, 3), AdapterSpec("conv_lora", rank=2))
    factors = [value for value in net.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(factors, lr=0.1, fused=True)
    net(torch.randn(2, 4, 8, 8)).square().sum().backward()
    with torch.no_grad():
        before = net.weight
        for source in grafts_of(net).composed["weight"].sources:
            object.__setattr__(source[-1], "sample", None)  # as on other devices than the CPU
        optimiser.step()
        assert not torch.equal(net.weight, before)


@pytest.mark.parametrize("way", [None, "weight", "chain", "parallel", "composed"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_tokens_are_written_to_in_place(method, way):
    """A linear layer's output is a view of a matrix inside, which nobody outside may notice."""
    torch.manual_seed(0)
    net = graft(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double(), AdapterSpec(method, rank=2)
    )
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    with execution(way):
        net(x).square().sum().backward()
    found = [value.grad.clone() for value in net.parameters() if value.requires_grad]
    net.zero_grad()
    net[1].inplace = False
    with execution("composed"):
        net(x).square().sum().backward()
    expected = [value.grad for value in net.parameters() if value.requires_grad]
    torch.testing.assert_close(found, expected)
