"""What a spec trains whole is a copy: the base is never written to, and switching adapters switches the copy too."""

import copy

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, activate, fingerprint, graft, load, merge, require_gradients, save, ungraft
from segraft.adapters.graft import grafted_layers


class Net(nn.Module):
    parts = {"encoder": ("encoder",), "head": ("head",)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 1, bias=False))
        self.bridge = nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4))
        self.head = nn.Conv1d(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bridge(self.encoder(x)))


def make() -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(3, 2, 9)


NORMS = {"encoder.1.weight", "encoder.1.bias"}
BIASES = {"encoder.0.bias", "encoder.1.bias", "bridge.0.bias", "bridge.1.bias", "head.bias"}
EVERYTHING = (
    BIASES
    | NORMS
    | {
        "encoder.0.weight",
        "encoder.3.weight",
        "bridge.0.weight",
        "bridge.1.weight",
        "head.weight",
    }
)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("head", {"head.weight", "head.bias"}),
        ("bias:.*", BIASES),
        ("bias:encoder", {"encoder.0.bias", "encoder.1.bias"}),
        ("norm:encoder", NORMS),
        ("norm:.*", NORMS | {"bridge.1.weight", "bridge.1.bias"}),
        ((r"bridge\.0\.weight", "head"), {"bridge.0.weight", "head.weight", "head.bias"}),
        (("head", "bias:head"), {"head.weight", "head.bias"}),
        (".*", EVERYTHING),
    ],
)
def test_selectors(train, expected):
    net, x = make()
    graft(net, AdapterSpec("none", train=train))
    trainable = {name for name, value in net.named_parameters() if value.requires_grad}
    assert trainable == {f"{owner}.segraft.default.{tensor}.value" for owner, _, tensor in _split(expected)}
    net(x).sum().backward()
    require_gradients(net)


def _split(names):
    return [name.rpartition(".") for name in names]


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec("dora_c", rank=1, train=("head", "norm:.*"), bias="train"),
        AdapterSpec("none", train=".*"),
        AdapterSpec("lora", rank=1, bias="low_rank"),
        AdapterSpec("none", train="bias:.*"),
    ],
)
def test_training_writes_nothing_to_the_base(spec, snapshot):
    net, x = make()
    before, mark = snapshot(net), fingerprint(net)
    graft(net, spec)
    start = net.eval()(x).detach()
    optimiser = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        net.train()(x).square().sum().backward()
        optimiser.step()
    assert not torch.allclose(net.eval()(x), start)
    assert fingerprint(net) == mark
    activate(net, None)
    assert torch.equal(net.eval()(x), start)
    ungraft(net)
    before.assert_holds(net)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d, lambda n: nn.InstanceNorm1d(n, affine=True, track_running_stats=True)]
)
def test_running_statistics_of_the_base_stay(norm):
    torch.manual_seed(0)
    net, twin = (nn.Sequential(nn.Conv1d(2, 4, 3), norm(4)) for _ in range(2))
    twin.load_state_dict(net.state_dict())
    base = {name: value.clone() for name, value in net.named_buffers()}
    graft(net, AdapterSpec("lora"))
    for seed in range(3):
        x = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(seed)) + 2
        assert torch.equal(net.train()(x), twin.train()(x))
    for name, value in twin[1].named_buffers():
        assert torch.equal(getattr(net[1], name), value)
        assert torch.equal(net[1].segraft["default"][name].value, value)
    assert torch.equal(net.eval()(x), twin.eval()(x))
    for name, value in base.items():
        assert torch.equal(net.state_dict()[name], value)
        # torch.nn.InstanceNorm does not count its batches.
        assert name.endswith("num_batches_tracked") or not torch.equal(value, twin.state_dict()[name])
    merged = merge(net)
    assert torch.equal(merged(x), twin(x))
    for name, value in twin.named_buffers():
        assert torch.equal(merged.state_dict()[name], value)


def test_each_adapter_has_statistics_of_its_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    graft(net, AdapterSpec("lora"), "a")
    graft(net, AdapterSpec("lora"), "b")
    for name, shift in (("a", 5.0), ("b", -5.0)):
        activate(net, name)
        for _ in range(60):
            net.train()(torch.randn(64, 2) + shift)
    for name, shift in (("a", 5.0), ("b", -5.0)):
        activate(net, name)
        torch.testing.assert_close(net[0].running_mean, torch.full((2,), shift), atol=0.3, rtol=0)
    activate(net, None)
    assert torch.equal(net[0].running_mean, torch.zeros(2))


def test_statistics_can_be_reset_under_an_adapter_alone():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].running_mean.fill_(3)
    graft(net, AdapterSpec("lora"))
    net[0].reset_running_stats()
    assert torch.equal(net[0].running_mean, torch.zeros(2))
    assert torch.equal(net.state_dict()["0.running_mean"], torch.full((2,), 3.0))


def test_norms_without_statistics_need_no_copies():
    net = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.InstanceNorm1d(2), nn.Linear(2, 2))
    graft(net, AdapterSpec("lora"))
    assert [name for name, _ in grafted_layers(net)] == ["2"]


def test_switching_switches_heads():
    net, x = make()
    net.eval()
    for name in ("a", "b"):
        graft(net, AdapterSpec("none", train="head"), name)
        with torch.no_grad():
            net.head.segraft[name]["bias"].value.fill_(ord(name))
    outputs = {}
    for name in ("a", "b", None):
        activate(net, name)
        outputs[name] = net(x)
    torch.testing.assert_close(outputs["b"] - outputs["a"], torch.ones_like(outputs["a"]), atol=1e-4, rtol=0)
    assert outputs[None].abs().max() < 50
    activate(net, ("a", "b"))
    assert torch.equal(net(x), outputs["b"])


@pytest.mark.parametrize("method", ["lora_c", "dora_c", "cp_dora"])
def test_factors_on_top_of_a_weight_trained_whole(tmp_path, method):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2)).requires_grad_(requires_grad=False)
    plain, x = copy.deepcopy(net), torch.randn(2, 1, 4, 4)
    spec = AdapterSpec(method, rank=2, targets=".*", train=".*", bias="low_rank")
    graft(net, spec)
    assert torch.equal(net(x), plain(x))
    net(x).square().mean().backward()
    require_gradients(net)
    with torch.no_grad():
        for value in net.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape))
        expected = net(x)
    edits = net[0].segraft["default"]
    with torch.no_grad():  # by hand: the factors on the copy, not on the base
        changed = edits["weight"].value + edits["weight_factors"].delta()
        if edits["weight_factors"].m is not None:
            changed *= (edits["weight_factors"].m / changed.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(net[0].weight, changed)
    save(net, tmp_path / "a.safetensors")
    assert torch.equal(load(plain, tmp_path / "a.safetensors")(x), expected)
    torch.testing.assert_close(merge(net)(x), expected)
