"""Adapters per channel in one pass, held against switching: an ordinary adapter per channel, one channel at a time."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segraft.adapters import (
    AdapterSpec,
    activate,
    activated,
    adapter_tensors,
    graft,
    load,
    merge,
    parameter_table,
    prune,
    ranks_in_use,
    read_header,
    require_gradients,
    routed,
    save,
    ungraft,
)
from segraft.adapters.graft import grafted_layers
from segraft.adapters.grafted import grafts_of
from segraft.errors import SegraftError
from segraft.training.recomputation import recomputing

CHANNELS, ROUTE = 3, [2, 0, 1]


class Attention(nn.Module):
    """A fused qkv layer, and tokens whose batch is split further, as windows are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.reshape(2 * len(x), -1, 4)).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)).view(x.shape)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 6, bias=False))


def attention() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), Attention(), nn.Linear(4, 2))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.InstanceNorm2d(6, affine=True),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, (1, 3), padding="same", dilation=2, bias=False),
    )


def volume() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 4, 2, stride=2), nn.GELU(), nn.Conv3d(4, 3, 1), nn.Conv3d(3, 2, 3, padding=1))


def other() -> nn.Module:
    """What has no chain: groups, and transposition."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 2, stride=2))


NETS = {
    "linear": (linear, (2, 7, 5)),
    "attention": (attention, (2, 6, 5)),
    "convolution": (convolution, (2, 1, 8, 8)),
    "volume": (volume, (2, 1, 6, 6, 6)),
    "other": (other, (2, 1, 7, 7)),
}
SPECS = {
    "rs_lora": {"method": "rs_lora"},
    "lora_c": {"method": "lora_c"},
    "cp": {"method": "cp_lora"},
    "dora": {"method": "conv_dora"},
    "dora_c": {"method": "dora_c"},
    "gated": {"method": "arena"},
    "tucker": {"method": "none", "factorisation": "tucker"},
}
EVERY = pytest.mark.parametrize("kind", NETS)
METHODS = pytest.mark.parametrize("method", SPECS)


def spec_of(method: str, **options) -> AdapterSpec:
    return AdapterSpec(**{"rank": 2, "channels": CHANNELS, **SPECS[method], **options})


def build(kind: str, spec: AdapterSpec, name: str = "default", dtype=torch.float64) -> nn.Module:
    """Grafted, with every tensor of the adapter away from its start."""
    torch.manual_seed(3)
    net = graft(NETS[kind][0]().to(dtype), spec, name)
    with torch.no_grad():
        for value in adapter_tensors(net, name).values():
            value.add_(0.3 * torch.randn_like(value))
    return net


def images(kind: str, dtype=torch.float64) -> list[Tensor]:
    """Of every channel in the order of ROUTE."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(NETS[kind][1], generator=generator).to(dtype) for _ in ROUTE]


def switched(net: nn.Module, spec: AdapterSpec) -> nn.Module:
    """The same base with an ordinary adapter per channel, c0, c1, …, of the same factors."""
    other = ungraft(copy.deepcopy(net))
    options = {name: getattr(spec, name) for name in ("method", "rank", "factorisation", "slices", "train")}
    for channel in range(CHANNELS):
        graft(other, AdapterSpec(**options), f"c{channel}")
        with torch.no_grad():
            theirs = adapter_tensors(net, "default")
            for key, value in adapter_tensors(other, f"c{channel}").items():
                edit, dot, name = key.rpartition(".")
                value.copy_(theirs[f"{edit}_channel{channel}{dot}{name}"])
    return other


def of_switching(net: nn.Module, x: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs and gradients of the loop, by the keys of the adapter per channel."""
    outputs, gradients = [], {}
    for channel, own in zip(ROUTE, x, strict=True):
        activate(net, f"c{channel}")
        outputs.append(net(own))
    y = torch.cat(outputs)
    if torch.is_grad_enabled():
        activate(net, None, train=[f"c{channel}" for channel in range(CHANNELS)])
        y.square().mean().backward()
    for channel in range(CHANNELS):
        for key, value in adapter_tensors(net, f"c{channel}").items():
            edit, dot, name = key.rpartition(".")
            gradients[f"{edit}_channel{channel}{dot}{name}"] = value.grad
    return y.detach(), gradients


def of_one_pass(net: nn.Module, x: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    with routed(ROUTE):
        y = net(torch.cat(x))
    y.square().mean().backward()
    return y.detach(), {key: value.grad for key, value in adapter_tensors(net, "default").items()}


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}", **tolerance)


@EVERY
@METHODS
def test_one_pass_is_dynamic_switching(kind, method):
    spec = spec_of(method)
    net, x = build(kind, spec), images(kind)
    other = switched(net, spec)
    for mode in (True, False):
        net.train(mode), other.train(mode)
        net.zero_grad(), other.zero_grad()
        y, gradients = of_one_pass(net, x)
        y_of_loop, gradients_of_loop = of_switching(other, x)
        torch.testing.assert_close(y, y_of_loop)
        assert_alike(gradients, gradients_of_loop)
    with torch.no_grad(), routed(ROUTE):
        torch.testing.assert_close(net(torch.cat(x)), y_of_loop)


@EVERY
@pytest.mark.parametrize("method", ["rs_lora", "dora"])
def test_in_single_precision(kind, method):
    spec = spec_of(method)
    net, x = build(kind, spec, dtype=torch.float32), images(kind, torch.float32)
    other = switched(net, spec)
    (y, gradients), (y_of_loop, gradients_of_loop) = of_one_pass(net, x), of_switching(other, x)
    torch.testing.assert_close(y, y_of_loop, rtol=1e-5, atol=1e-5)
    assert_alike(gradients, gradients_of_loop, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["rs_lora", "dora", "gated"])
def test_row_blocks_of_a_fused_weight(method):
    spec = spec_of(method, targets=r".*qkv", slices={r".*qkv": ("2/3", "3/3")})
    net, x = build("attention", spec), images("attention")
    assert "1.qkv.weight_4_8_channel0" in {key.rpartition(".")[0] for key in adapter_tensors(net, "default")}
    other = ungraft(copy.deepcopy(net))
    (y, gradients), base = of_one_pass(net, x), other(torch.cat(x))
    assert not torch.allclose(y, base)
    options = {"rank": 2, "targets": r".*qkv", "slices": {r".*qkv": ("2/3", "3/3")}, **SPECS[method]}
    for channel in range(CHANNELS):
        graft(other, AdapterSpec(**options), f"c{channel}")
        with torch.no_grad():
            for key, value in adapter_tensors(other, f"c{channel}").items():
                edit, _, name = key.rpartition(".")
                value.copy_(adapter_tensors(net, "default")[f"{edit}_channel{channel}.{name}"])
    y_of_loop, gradients_of_loop = of_switching(other, x)
    torch.testing.assert_close(y, y_of_loop)
    assert_alike(gradients, gradients_of_loop)


@EVERY
@pytest.mark.parametrize("method", ["rs_lora", "dora", "dora_c"])
def test_a_fresh_adapter_changes_nothing(kind, method):
    torch.manual_seed(3)
    net = NETS[kind][0]().eval()
    x = torch.cat(images(kind, torch.float32))
    before = net(x).detach()
    graft(net, spec_of(method))
    with routed(ROUTE):
        after = net(x)
    if kind == "other":
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)  # blocks are convolved one by one
    else:
        assert torch.equal(after, before)
    assert torch.equal(ungraft(net)(x), before)


@EVERY
def test_the_gradient_of_the_input(kind):
    spec = spec_of("dora_c")
    net, x = build(kind, spec), [value.requires_grad_() for value in images(kind)]
    of_one_pass(net, x)
    found = [value.grad for value in x]
    for value in x:
        value.grad = None
    of_switching(switched(net, spec), x)
    for each, value in zip(found, x, strict=True):
        torch.testing.assert_close(each, value.grad)


@pytest.mark.parametrize("kind", ["linear", "convolution", "other"])
def test_channels_that_are_not_there_get_gradients_of_zero(kind):
    net, x = build(kind, spec_of("rs_lora")), images(kind)
    with routed([1]):
        y = net(x[0])
    y.square().mean().backward()
    require_gradients(net)
    for key, value in adapter_tensors(net, "default").items():
        assert (value.grad.abs().sum() > 0) == ("_channel1." in key), key
    other = switched(net, spec_of("rs_lora"))
    activate(other, "c1")
    torch.testing.assert_close(y, other(x[0]))


def test_a_channel_may_come_twice():
    net, x = build("linear", spec_of("rs_lora")), images("linear")
    with routed([1, 1, 0]):
        y = net(torch.cat(x)).chunk(3)
    with routed([1]):
        torch.testing.assert_close(torch.cat(y[:2]), net(torch.cat(x[:2])))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_on_top_of_another_adapter_and_of_what_is_trained_whole(kind):
    """The first adapter is shared by all channels, and both train (but under a weight that is trained whole)."""
    net = build(kind, AdapterSpec("lora_c", rank=2), "shared")
    graft(net, spec_of("rs_lora", targets=r"\d", train=r"0\.(weight|bias)"))
    with torch.no_grad():
        for value in adapter_tensors(net, "default").values():
            value.add_(0.1 * torch.randn_like(value))
    activate(net, ["shared", "default"])
    x = images(kind)
    y, gradients = of_one_pass(net, x)
    shared = {key: value for key, value in adapter_tensors(net, "shared").items() if not key.startswith("0.weight.")}
    found = gradients | {f"shared.{key}": value.grad for key, value in shared.items()}
    net.zero_grad()
    outputs = []
    for channel, own in zip(ROUTE, x, strict=True):
        with routed([channel]):
            outputs.append(net(own))
    torch.cat(outputs).square().mean().backward()
    again = {key: value.grad for key, value in adapter_tensors(net, "default").items()}
    again |= {f"shared.{key}": value.grad for key, value in shared.items()}
    torch.testing.assert_close(y, torch.cat(outputs).detach())
    assert_alike(found, again)
    assert all(value.abs().sum() > 0 for value in found.values())
    with pytest.raises(SegraftError, match=r"'default' has a weight per channel .* last of the stack"):
        activate(net, ["default", "shared"])
    with activated(net, "shared"):
        net(x[0])  # needs no order of channels
    with routed(ROUTE), activated(net, None):
        assert torch.equal(net(x[0]), ungraft(copy.deepcopy(net))(x[0]))


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


@pytest.mark.parametrize("kind", ["linear", "convolution", "other"])
def test_pruned_channels_of_different_ranks(kind):
    net, x = build(kind, spec_of("gated", rank=3)), images(kind)
    with torch.no_grad():
        for _, layer in grafted_layers(net):
            for edit in grafts_of(layer).channel_edits():
                edit.v[: {0: 3, 1: 1, 2: 0}[edit.channel]] = 0
    with torch.no_grad(), routed(ROUTE):
        before = net(torch.cat(x))
        used = ranks_in_use(net)
        assert used.used == (0 + 2 + 3) * len(list(grafted_layers(net)))
        prune(net)
        torch.testing.assert_close(net(torch.cat(x)), before)
    y, gradients = of_one_pass(net, x)
    torch.testing.assert_close(y, before)
    assert all(value is not None for value in gradients.values())


def test_a_channel_of_zeros_with_a_magnitude():
    """A row of zeros in the base has a norm of zero: no gradient may become NaN."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        net[0].weight[1] = 0
    graft(net, spec_of("dora"))
    with routed(ROUTE):
        net(torch.randn(6, 4)).square().sum().backward()
    for value in adapter_tensors(net, "default").values():
        assert torch.isfinite(value.grad).all()


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


@pytest.mark.parametrize("kind", ["attention", "convolution"])
def test_copies(kind):
    net, x = build(kind, spec_of("dora_c")), torch.cat(images(kind))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with routed(ROUTE):
            assert torch.equal(other(x), net(x))
    held = io.BytesIO()
    torch.save(net, held)
    held.seek(0)
    with routed(ROUTE):
        assert torch.equal(torch.load(held, weights_only=False)(x), net(x))


@pytest.mark.parametrize("method", ["dora_c", "gated"])
def test_files(method, tmp_path):
    net, x = build("convolution", spec_of(method)), torch.cat(images("convolution"))
    if method == "gated":
        with torch.no_grad():
            for _, layer in grafted_layers(net):
                for edit in grafts_of(layer).channel_edits():
                    edit.v[: edit.channel] = 0
    path = save(net, tmp_path / "task.safetensors")
    header = read_header(path)
    assert header.spec == spec_of(method)
    assert {key.split(".")[1] for key in header.tensors if key.startswith("0.")} == {
        f"weight_channel{c}" for c in range(CHANNELS)
    }
    torch.manual_seed(3)
    other = load(NETS["convolution"][0]().double(), path)
    with routed(ROUTE):
        torch.testing.assert_close(other(x), net(x))


def test_one_set_of_factors_is_saved_as_before():
    assert "channels" not in AdapterSpec("rs_lora").to_dict()
    assert AdapterSpec.from_dict(spec_of("rs_lora").to_dict()) == spec_of("rs_lora")


def test_counts():
    net = graft(linear(), AdapterSpec("rs_lora", rank=2, channels=4))
    assert parameter_table(net).of("default") == 4 * 2 * (5 + 4 + 4 + 6)
    layer = grafts_of(net[0]).channel_edits()
    assert not any(torch.equal(layer[0].A, other.A) for other in layer[1:])  # each its own start


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


def test_errors_of_a_call():
    net, x = build("linear", spec_of("rs_lora")), torch.cat(images("linear"))
    with pytest.raises(SegraftError, match=r"Linear layer of \(4, 5\) .* called without their order"):
        net(x)
    with routed([0, 1, 3]), pytest.raises(SegraftError, match=r"names channel 3, .* channels 0 to 2"):
        net(x)
    with routed([0, 1, 2, 0]), pytest.raises(SegraftError, match=r"given \(6, 7, 5\), .* not 4 equal blocks"):
        net(x)
    with pytest.raises(SegraftError, match="there is not one weight to be read"):
        net[0].weight  # noqa: B018
    image = build("convolution", spec_of("rs_lora"))
    with routed([0]), pytest.raises(SegraftError, match="not 1 equal blocks"):
        image(torch.zeros(1, 8, 8).double())
    up = build("other", spec_of("rs_lora"))[2]
    with routed([0]), pytest.raises(SegraftError, match="more than its input"):
        up(torch.zeros(1, 4, 3, 3).double(), output_size=(7, 7))


@pytest.mark.parametrize("channels", [[], [-1], [True], [0.0]])
def test_no_channels(channels):
    with pytest.raises(SegraftError, match="name the channel of every block"), routed(channels):
        pass


def test_the_inner_block_counts():
    net, x = build("linear", spec_of("rs_lora")), images("linear")
    with routed([0]):
        first = net(x[0])
        with routed([1]):
            assert not torch.allclose(net(x[0]), first)
        assert torch.equal(net(x[0]), first)


def test_a_merge_is_refused():
    net = build("linear", spec_of("rs_lora"))
    with pytest.raises(SegraftError, match=r"a weight per channel .* keep it as an adapter"):
        merge(net)
    with routed(ROUTE):
        net(torch.cat(images("linear")))  # as it was
    activate(net, None)
    merge(net)


@pytest.mark.parametrize("bias", ["low_rank", "train"])
def test_biases_are_refused(bias):
    with pytest.raises(SegraftError, match=f"bias '{bias}' goes with one set of factors"):
        AdapterSpec("lora", channels=2, bias=bias)


@pytest.mark.parametrize("channels", [0, True, 2.0])
def test_impossible_numbers_of_channels(channels):
    with pytest.raises(SegraftError, match="channels is"):
        AdapterSpec("lora", channels=channels)
    with pytest.raises(SegraftError, match="no factors"):
        AdapterSpec("none", channels=2, train="0")


def test_layers_that_have_no_channels():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for layer, kind in ((nn.MultiheadAttention(4, 2), "MultiheadAttention"), (Scaled(4, 4), "Scaled")):
        net = nn.Sequential(layer, nn.Identity())
        with pytest.raises(SegraftError, match=rf"layer '0' \({kind}\) cannot have an adapter per channel"):
            graft(net, AdapterSpec("lora", channels=2, targets="0"))
        assert all(value.requires_grad for value in net.parameters())


def test_the_networks_channels():
    net = linear()
    net.image_channels = 4
    with pytest.raises(SegraftError, match="takes images of 4 channels, and the adapter is for 3"):
        graft(net, spec_of("rs_lora"))
    graft(net, AdapterSpec("rs_lora", rank=1))  # one set of factors for all


def test_targets_are_the_encoder_unless_named():
    net = nn.Sequential(linear(), nn.Linear(6, 2))
    net.parts = {"encoder": ("0",), "decoder": ("1",)}
    graft(net, spec_of("rs_lora"))
    assert {name for name, layer in grafted_layers(net) if grafts_of(layer).channel_edits()} == {"0.0", "0.3"}
    ungraft(net)
    graft(net, spec_of("rs_lora", train=("decoder", r"0\.0\.weight")))
    assert {name for name, layer in grafted_layers(net) if grafts_of(layer).channel_edits()} == {"0.3"}
