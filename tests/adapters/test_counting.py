"""The parameter table agrees with sums over the network's own parameters."""

import json

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, activate, graft, merge, parameter_table


class Net(nn.Module):
    parts = {"encoder": ("encoder",), "head": ("head",)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.encoder2 = nn.Conv2d(4, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)


def assert_adds_up(net: nn.Module) -> None:
    table = parameter_table(net)
    assert table.state.frozen == sum(value.nbytes for value in net.parameters() if not value.requires_grad)
    assert table.state.parameters == sum(value.nbytes for value in net.parameters() if value.requires_grad)
    assert table.trainable == sum(value.numel() for value in net.parameters() if value.requires_grad)
    assert table.frozen == sum(value.numel() for value in net.parameters() if not value.requires_grad)
    assert table.total == table.trainable + table.frozen == sum(value.numel() for value in net.parameters())


def test_sums_hold_at_every_stage(kind, method, adapted):
    net = kind.net()
    assert_adds_up(net)
    net = adapted(kind, method, bias="low_rank")
    assert_adds_up(net)
    graft(net, kind.spec("lora", bias="train"), "second")
    assert_adds_up(net)
    activate(net, ("default", "second"))
    assert_adds_up(net)
    activate(net, None)
    assert_adds_up(net)
    assert parameter_table(net).trainable == 0
    assert_adds_up(merge(net))


def test_rows():
    net = Net()
    graft(net, AdapterSpec("dora_c", rank=3, exclude="head", bias="low_rank"), "a")
    graft(net, AdapterSpec("none", train=("head", "norm:.*")), "b")
    rows = {(r.owner, r.part, r.kind): (r.trainable, r.frozen) for r in parameter_table(net).rows}
    assert rows == {
        ("base", "encoder", "weights"): (0, 4 * 9 + 4 + 8),
        ("base", "-", "weights"): (0, 16 + 4),
        ("base", "head", "weights"): (0, 8 + 2),
        ("a", "encoder", "factors"): (0, 3 * 3 * (1 + 4)),
        ("a", "encoder", "magnitude"): (0, 4),
        ("a", "encoder", "bias"): (0, 12),
        ("a", "-", "factors"): (0, 3 * (4 + 4)),
        ("a", "-", "magnitude"): (0, 4),
        ("a", "-", "bias"): (0, 12),
        ("b", "encoder", "whole"): (8, 0),
        ("b", "head", "whole"): (10, 0),
    }
    table = parameter_table(net)
    assert table.of("b") == 18
    assert table.of("a", "magnitude") == 8
    assert table.of("none such") == 0
    assert json.loads(json.dumps(table.to_dict()))["trainable"] == 18
    assert len(str(table).splitlines()) == len(rows) + 2
    assert str(table).splitlines()[-1].split() == ["sum", "18", str(table.frozen)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "spec",
    [None, AdapterSpec("dora_c", rank=2, bias="low_rank"), AdapterSpec("none", train=".*")],
    ids=["full", "dora_c", "whole"],
)
def test_the_state_of_a_training_is_what_adamw_holds(spec, dtype):
    net = Net().to(dtype)
    net.head.float()  # dtypes may be mixed
    base = sum(value.nbytes for value in net.parameters())
    if spec is not None:
        graft(net, spec)
    trained = [value for value in net.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    for value in trained:
        value.grad = torch.ones_like(value)
    optimiser.step()
    moments = sum(v.nbytes for held in optimiser.state.values() for name, v in held.items() if name != "step")
    state = parameter_table(net).state
    assert state.parameters == sum(value.nbytes for value in trained)
    assert state.gradients == sum(value.grad.nbytes for value in trained)
    assert state.optimiser == moments
    assert state.trainable == state.parameters + state.gradients + moments
    assert state.frozen == (0 if spec is None else base)
    assert parameter_table(net).to_dict()["state_bytes"] == state.to_dict()


@pytest.mark.parametrize("trainable", [True, False])
def test_a_plain_network(trainable):
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).requires_grad_(trainable)
    net[1].weight = nn.Parameter(torch.ones(1, 3))
    table = parameter_table(net)
    assert (table.trainable, table.frozen) == ((13, 0) if trainable else (3, 10))
    assert [row.owner for row in table.rows] == ["base"]


def test_shared_parameters_count_once():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    assert_adds_up(net)
