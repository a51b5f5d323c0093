"""Every trainable tensor takes part in training, and what does not is named."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from segraft.adapters import AdapterSpec, DeadFactorsError, activate, graft, require_gradients


def test_gradient_reaches_every_factor(kind, method, adapted):
    fresh = graft(kind.net(), kind.spec(method, bias="low_rank"))
    fresh(kind.input()).square().sum().backward()
    require_gradients(fresh)

    net = adapted(kind, method, bias="low_rank")
    net(kind.input(torch.float64)).square().sum().backward()
    for name, value in net.named_parameters():
        if ".segraft." in name:
            assert value.grad is not None, name
            assert value.grad.isfinite().all(), name
            assert (value.grad != 0).any(), name
        else:
            assert value.grad is None, name
            assert not value.requires_grad, name


@pytest.mark.parametrize(
    "kind", ["linear", "conv1d", "transposed2d-groups", "fused-key-value", "attention"], indirect=True
)
@pytest.mark.parametrize("method", ["lora", "dora_c", "cp_dora", "tucker"], indirect=True)
def test_gradients_are_those_of_finite_differences(kind, method, adapted):
    net, x = adapted(kind, method, bias="low_rank"), kind.input(torch.float64)[:, :3]
    factors = {name: value for name, value in net.named_parameters() if value.requires_grad}

    def output(*values):
        return functional_call(net, dict(zip(factors, values, strict=True)), x[:, : kind.shape[1]])

    if kind.shape[1] == 4:
        x = kind.input(torch.float64)
    assert torch.autograd.gradcheck(output, tuple(factors.values()), fast_mode=True)


@pytest.mark.parametrize("method", ["dora", "dora_c", "cp_dora"], indirect=True)
def test_a_channel_of_zeros_gets_finite_gradients(kind, method):
    net = kind.net()
    with torch.no_grad():
        for value in net.parameters():
            if value.ndim > 1:
                value[:, 0] = value[0] = 0
    graft(net, kind.spec(method))
    net(kind.input()).sum().backward()
    assert all(value.grad.isfinite().all() for value in net.parameters() if value.grad is not None)


def test_one_step_of_training_leaves_the_base_alone(kind, method):
    net, x = graft(kind.net(), kind.spec(method)), kind.input()
    base = {name: value.clone() for name, value in kind.net().named_parameters()}
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    before = net(x).detach()
    net(x).square().sum().backward()
    optimiser.step()
    assert not torch.equal(net(x), before)
    now = dict(net.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in base.items())


class _HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_dead_factors_are_named():
    net = graft(_HalfUsed(), AdapterSpec("dora"))
    net(torch.ones(1, 3)).sum().backward()
    with pytest.raises(DeadFactorsError, match=r"^3 trainable tensors .*unused\.segraft\.default\.weight\.B") as error:
        require_gradients(net)
    assert ".used." not in str(error.value)


def test_many_dead_factors_are_summed_up():
    net = nn.Sequential(*(_HalfUsed() for _ in range(5)))
    graft(net, AdapterSpec("lora"))
    net(torch.ones(1, 3)).sum().backward()
    with pytest.raises(DeadFactorsError, match=r"^10 trainable .* and 2 more; exclude"):
        require_gradients(net)


def test_inactive_adapters_are_not_dead():
    net = graft(_HalfUsed(), AdapterSpec("lora"), "everywhere")
    graft(net, AdapterSpec("lora", targets="used"), "used")
    net(torch.ones(1, 3)).sum().backward()
    require_gradients(net)
    activate(net, ("everywhere", "used"), train="used")
    require_gradients(net)
