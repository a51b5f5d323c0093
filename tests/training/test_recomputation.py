"""Recomputing activations saves memory and changes nothing else, not by one bit."""

import copy

import pytest
import torch
from torch import Tensor, nn

from segraft.adapters import AdapterSpec, graft
from segraft.errors import SegraftError
from segraft.networks import UNet
from segraft.training.fit import fit
from segraft.training.recomputation import recomputing, regions, require_recomputation

DORA = AdapterSpec("dora_c", rank=2, train=("head", "bias:.*"))
SPECS = pytest.mark.parametrize("spec", [None, DORA], ids=["full", "dora_c"])


def step(net: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Loss, gradients, buffers and the state of the random numbers after one training step on a copy of `net`."""
    torch.manual_seed(5)
    net.zero_grad()
    loss = net.train()(image).square().mean()
    loss.backward()
    gradients = {name: value.grad for name, value in net.named_parameters() if value.grad is not None}
    return loss.detach(), gradients, dict(net.named_buffers()), torch.get_rng_state()


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_recomputing_changes_nothing(net: nn.Module, image: Tensor, *places: str, steps: int = 2) -> None:
    """In the result; that anything is recomputed at all is seen from the number of forward passes."""
    with torch.no_grad():
        for value in net.parameters():
            if value.requires_grad:  # factors that start at zero hide the others' gradients
                value.add_(torch.randn_like(value), alpha=0.1)
    other, calls = copy.deepcopy(net), 0
    (first, *_) = regions(net, places)

    def counted(*_args: object) -> None:
        nonlocal calls
        calls += 1

    leaf = next(module for module in first.modules() if not module._modules or hasattr(module, "segraft"))
    for _ in range(steps):
        loss, gradients, buffers, random = step(other, image)
        with recomputing(net, places):
            hook = leaf.register_forward_pre_hook(counted)
            loss_again, gradients_again, buffers_again, random_again = step(net, image)
            hook.remove()
        assert torch.equal(loss, loss_again)
        assert gradients
        assert_same(gradients, gradients_again)
        assert_same(buffers, buffers_again)
        assert torch.equal(random, random_again)
    assert calls == (steps if leaf is first else 2 * steps)


def saved_bytes(net: nn.Module, image: Tensor) -> int:
    """Bytes of all activations that a training step keeps for its backward pass, each storage once."""
    weights = {value.untyped_storage().data_ptr() for value in net.parameters()}
    kept: dict[int, Tensor] = {}  # held, so that no address is given out twice

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        net(image).sum()
    return sum(value.untyped_storage().nbytes() for value in kept.values())


def forwards(net: nn.Module) -> set[nn.Module]:
    return {module for module in net.modules() if "forward" in vars(module)}


# --- the same results


@SPECS
@pytest.mark.parametrize("norm", [None, "instance", "batch"])
@pytest.mark.parametrize("places", [("decoder",), ("encoder", "decoder", "head"), (r"(en|de)coder\.\d",), (".*",)])
def test_a_unet(make_net, spec, norm, places):
    net = make_net(norm=norm)
    if spec is not None:
        graft(net, spec)
    assert_recomputing_changes_nothing(net, torch.randn(2, 1, 8, 8, 8), *places)


@SPECS
def test_in_double_precision(make_net, spec):
    net = make_net(norm="batch").double()
    if spec is not None:
        graft(net, spec)
    assert_recomputing_changes_nothing(net, torch.randn(2, 1, 8, 8, 8, dtype=torch.float64), "encoder", "decoder")


def test_running_statistics_count_every_step_once(make_net):
    net = make_net(norm="batch")
    with recomputing(net, ["encoder"]):
        for _ in range(3):
            step(net, torch.randn(2, 1, 8, 8, 8))
    assert int(net.encoder[0][1].num_batches_tracked) == 3


class Frozen(nn.BatchNorm2d):
    """Stays in evaluation mode, whatever the network does."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


class Growing(nn.Module):
    """Computes with a buffer that it writes to: multiplies with the number of its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        self.passes += 1
        return image * self.passes.clone()


def blocks(*layers: nn.Module) -> nn.Sequential:
    """Two blocks of a convolution, other layers and a non-linearity."""
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(2, 2, 3), *layers, nn.ReLU(inplace=True)) for _ in range(2)))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Dropout(0.4)],
        [nn.BatchNorm2d(2, momentum=None)],
        [nn.BatchNorm2d(2), nn.Dropout2d(0.4), nn.Conv2d(2, 2, 1)],
        [Frozen(2)],
        [Growing()],
        [nn.InstanceNorm2d(2, track_running_stats=True), nn.RReLU()],
        [nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 1))],
    ],
    ids=["dropout", "cumulative", "both", "frozen", "growing", "instance", "spectral"],
)
def test_what_has_a_memory_or_draws_random_numbers(layers):
    assert_recomputing_changes_nothing(blocks(*layers), torch.randn(3, 2, 9, 9), r"\d")


def test_under_autocast(make_net):
    net = graft(make_net(norm="batch"), DORA)
    with torch.autocast("cpu", torch.bfloat16):
        assert_recomputing_changes_nothing(net, torch.randn(2, 1, 8, 8, 8), "encoder", "decoder")


def test_a_graph_that_is_run_through_twice():
    net, image = blocks(Growing()), torch.randn(3, 2, 9, 9)
    other = copy.deepcopy(net)
    with recomputing(net, [r"\d"]):
        for each in (net, other):
            loss = each(image).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
    assert_same({n: p.grad for n, p in net.named_parameters()}, {n: p.grad for n, p in other.named_parameters()})


def test_foreign_networks():
    from segraft.networks import build

    net = build(
        "monai.networks.nets:SegResNet",
        in_channels=1,
        out_channels=1,
        arguments={"spatial_dims": 2, "init_filters": 8, "dropout_prob": 0.2},
    )
    assert_recomputing_changes_nothing(graft(net, DORA), torch.randn(1, 1, 16, 16), "encoder", "decoder", "head")


@SPECS
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_training(make_net, source, settings, checkpoint, spec, precision):
    results = []
    for places in ((), ("net", "drop")):
        net = make_net(dropout=True, norm="batch")
        if spec is not None:
            graft(net, AdapterSpec("dora_c", rank=2))
        result = fit(net, source, settings(recompute=places, precision=precision), checkpoint=checkpoint)
        results.append((result.losses, dict(net.state_dict())))
        assert not forwards(net)
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])


# --- less memory


@pytest.mark.parametrize("norm", [None, "batch", "instance"])
def test_what_is_kept_are_the_inputs_of_the_recomputed_modules(norm):
    widths, size, batch = (4, 6, 10), 16, 3
    net, image = UNet(widths=widths, norm=norm), torch.randn(batch, 1, size, size)
    with recomputing(net, [".*"]):
        kept = saved_bytes(net, image)
    pixels = [(size // 2**level) ** 2 for level in range(len(widths))]
    # Of the pools, of the decoder (a skip and what was upsampled), of the upsampling or the head.
    values = sum(width * n * (1 + 2 + 1) for width, n in zip(widths[:-1], pixels, strict=False))
    values += pixels[0] + sum(width * n for width, n in zip(widths[:-1], pixels[1:], strict=True))  # of the encoder
    values += widths[-1] * pixels[-1]  # of the first upsampling
    assert kept == 4 * batch * values


@SPECS
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_each_part_saves_memory(norm, spec):
    net, image = UNet(widths=(8, 16, 32), norm=norm), torch.randn(2, 1, 32, 32)
    if spec is not None:
        graft(net, spec)
    everything = saved_bytes(net, image)
    kept = {}
    for part in ("encoder", "decoder"):
        with recomputing(net, [part]):
            kept[part] = saved_bytes(net, image)
        assert kept[part] < 0.8 * everything
    with recomputing(net, ["encoder", "decoder"]):
        assert saved_bytes(net, image) < 0.7 * min(kept.values())
    assert saved_bytes(net, image) == everything


def test_evaluation_recomputes_nothing(make_net, monkeypatch):
    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError

    monkeypatch.setattr("segraft.training.recomputation.checkpoint", never)
    net, image = make_net(norm="batch").eval(), torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        expected = net(image)
        with recomputing(net, ["encoder"]):
            assert torch.equal(net(image), expected)


# --- which modules


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["bottleneck"], ["bottleneck"]),
        (["decoder"], ["upsampling.0", "decoder.0"]),
        (["encoder"], ["encoder.0", "bottleneck"]),
        (["decoder", r"decoder\.0\.\d", "head"], ["upsampling.0", "decoder.0", "head"]),
        ([r"decoder\.0\.[03]", r"decoder\.0\.0"], ["decoder.0.0", "decoder.0.3"]),
        ([".*"], ["encoder.0", "pool", "bottleneck", "upsampling.0", "decoder.0", "head"]),
        ([], []),
    ],
)
@pytest.mark.parametrize("grafted", [False, True])
def test_the_outermost_modules_that_compute(make_net, places, names, grafted):
    net = graft(make_net(), DORA) if grafted else make_net()
    chosen = regions(net, places)
    assert sorted(chosen.values()) == sorted(names)
    assert all(net.get_submodule(name) is module for module, name in chosen.items())
    with recomputing(net, places):
        assert forwards(net) == set(chosen)


class Aliased(nn.Module):
    """As in nnU-Net: one convolution under two names, of which the second is the one that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.layers = nn.ModuleDict({"all": nn.Sequential(self.conv, nn.ReLU())})

    def forward(self, image: Tensor) -> Tensor:
        return self.layers["all"](image)


def test_a_module_under_two_names_is_not_recomputed_within_itself():
    net = Aliased()
    assert set(regions(net, ["conv", "layers"])) == {net.layers["all"]}
    assert_recomputing_changes_nothing(net, torch.randn(1, 1, 3, 3), "conv", "layers")


@pytest.mark.parametrize(
    ("place", "says"), [("attic", "its parts are encoder, bottleneck"), ("", "its parts"), ("[", "regular expression")]
)
def test_a_place_that_matches_nothing(make_net, place, says):
    net = make_net()
    with pytest.raises(SegraftError, match=says) as caught, recomputing(net, ["decoder", place]):
        pass
    assert repr(place) in str(caught.value)
    assert not forwards(net)


def test_a_list_without_members_matches_nothing():
    net = nn.Module()
    net.levels = nn.ModuleList()
    with pytest.raises(SegraftError, match="'levels' matches no module"):
        regions(net, ["levels"])


class Iterating(nn.Module):
    """Runs through the members of a sequence itself, as nnU-Net's encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Conv3d(2, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        for stage in self.stages:
            image = stage(image)
        return image


def test_a_module_that_is_never_called_is_named(source, settings, checkpoint):
    with pytest.raises(SegraftError, match=r"'stages' cannot be recomputed.*such as 'stages\\.\[\^.\]\*'"):
        fit(Iterating(), source, settings(recompute=("stages",)), checkpoint=checkpoint)
    fit(Iterating(), source, settings(recompute=(r"stages\.[^.]*",), epochs=1), checkpoint=checkpoint)


def test_what_was_not_chosen_need_not_be_called(make_net):
    require_recomputation(make_net())


# --- afterwards


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_everything_is_as_before_also_after_an_error(make_net, error):
    def replaced(image: Tensor) -> Tensor:
        return -image

    net = make_net()
    net.head.forward = replaced
    image = torch.randn(1, 1, 8, 8, 8)
    before = net(image)
    try:
        with recomputing(net, ["encoder", "head"]):
            assert torch.equal(net(image), before)
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error is not None
    assert forwards(net) == {net.head}
    assert net.head.forward is replaced
    assert torch.equal(net(image), before)


def test_an_error_within_a_module_reaches_the_caller(make_net):
    net = make_net()
    with pytest.raises(SegraftError, match="multiples of 2"), recomputing(net, [".*"]):
        net(torch.randn(1, 1, 7, 7, 7))
    with pytest.raises(RuntimeError, match="expected input"), recomputing(net, ["encoder"]):
        net(torch.randn(1, 2, 8, 8, 8))
    assert not forwards(net)


def test_a_copy_computes_with_its_own_weights(make_net):
    net, image = make_net(), torch.randn(1, 1, 8, 8, 8)
    with recomputing(net, ["encoder"]):
        other = copy.deepcopy(net)
        with torch.no_grad():
            for value in other.encoder.parameters():
                value.zero_()
        assert torch.equal(other.encoder[0](image), torch.zeros(1, 4, 8, 8, 8))
        assert not torch.equal(net.encoder[0](image), torch.zeros(1, 4, 8, 8, 8))
