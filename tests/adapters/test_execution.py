"""However an adapted layer is executed, the numbers are those of the composed weight in autograd's own graph."""

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import segraft
from segraft.adapters import AdapterSpec, activate, graft
from segraft.adapters.execution import execution
from segraft.adapters.grafted import grafts_of

WAYS = ["weight", "chain", "parallel", None]
DTYPE = torch.float64


def results(net, x, way):
    """The output, and the gradients of the input and of every trained tensor."""
    x = x.detach().requires_grad_()
    net.zero_grad(set_to_none=True)
    with execution(way):
        y = net(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(11)).to(y))
    gradients = {name: value.grad for name, value in net.named_parameters() if value.requires_grad}
    return {"output": y.detach(), "input": x.grad, **gradients}


def assert_same_in_every_way(net, x, ways=WAYS):
    expected = results(net, x, "composed")
    for way in ways:
        found = results(net, x, way)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert value is not None, name
            assert value.dtype == found[name].dtype, name
            torch.testing.assert_close(
                found[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name, w=way: f"{w} {n}: {m}"
            )


def is_one_function(net, x, way):
    with execution(way):
        return isinstance(net(x.detach().requires_grad_()).grad_fn, torch.autograd.function.BackwardCFunction)


def single(layer, method="dora_c", *, scale=0.3, name="default", **options):
    """A network of one adapted layer whose factors are away from their start."""
    net = nn.Sequential(layer.to(DTYPE))
    spec = {"factorisation": "tucker"} if method == "tucker" else {"method": method}
    return move(graft(net, AdapterSpec(**spec, **{"rank": 2, **options}), name), scale)


def move(net, scale=0.3):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if ".segraft." in name:
                value.add_(scale * torch.randn(value.shape, generator=generator).to(value))
    return net


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=DTYPE)


@pytest.mark.parametrize("bias", ["frozen", "low_rank"])
def test_every_way_gives_the_same_numbers(kind, method, bias, adapted):
    assert_same_in_every_way(adapted(kind, method, DTYPE, bias=bias), kind.input(DTYPE))


SERVED = ["linear", "linear-no-bias", "conv1d", "conv2d", "conv3d", "transposed2d", "strided3d", "same", "reflect2d"]


@pytest.mark.parametrize("kind", SERVED, indirect=True)
@pytest.mark.parametrize(
    "options",
    [
        {"magnitude_dim": 0},
        {"bias": "train"},
        {"rank": 9},
        {"rank": 1},
        {"alpha": 0.5},
        {"train": ".*weight", "targets": ".*"},
    ],
    ids=str,
)
def test_the_options_of_a_spec_give_the_same_numbers(kind, method, options, adapted):
    assert_same_in_every_way(adapted(kind, method, DTYPE, **options), kind.input(DTYPE))


@pytest.mark.parametrize("kind", SERVED, indirect=True)
def test_what_can_be_executed_as_one_function_is(kind, method, adapted):
    net, x = adapted(kind, method), kind.input(DTYPE)
    assert all(is_one_function(net, x, way) for way in WAYS)
    assert not is_one_function(net, x, "composed")


@pytest.mark.parametrize("kind", ["conv2d-groups", "depthwise3d-multiplied", "transposed2d-all"], indirect=True)
def test_grouped_convolutions_stay_composed(kind, method, adapted):
    assert not any(is_one_function(adapted(kind, method), kind.input(DTYPE), way) for way in WAYS)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # torch's own, once a process
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(5, 7, (2, 4), padding=(1, 2), stride=(3, 2)), (5, 8, 9)),
        (lambda: nn.Conv2d(3, 8, 2, padding="same"), (3, 6, 5)),
        (lambda: nn.Conv2d(3, 8, 3, padding=4, dilation=3, padding_mode="circular"), (3, 6, 5)),
        (lambda: nn.Conv2d(3, 8, 3, padding=(0, 3)), (3, 6, 5)),
        (lambda: nn.Conv1d(1, 40, 5, padding=2), (1, 11)),
        (lambda: nn.Conv2d(40, 1, 3, padding=1), (40, 6, 5)),
        (lambda: nn.Conv2d(33, 34, 1, padding=1), (33, 3, 4)),
        (lambda: nn.Conv2d(6, 5, 1, stride=2), (6, 5, 7)),
        (lambda: nn.Conv3d(2, 6, 3, padding=1, bias=False), (2, 4, 3, 5)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=3, padding=1, output_padding=(2, 0), dilation=2), (4, 4, 5)),
        (lambda: nn.ConvTranspose3d(3, 2, (1, 2, 3), stride=(1, 2, 2), output_padding=(0, 1, 0)), (3, 2, 3, 2)),
        (lambda: nn.ConvTranspose1d(6, 4, 1), (6, 7)),
        (lambda: nn.ConvTranspose2d(6, 4, (1, 3), dilation=2, output_padding=1), (6, 4, 3)),
        (lambda: nn.Linear(6, 33), (4, 5, 6)),
        (lambda: nn.Linear(40, 2), (40,)),
    ],
)
def test_unusual_geometries_and_batches(make, shape, batch, method):
    assert_same_in_every_way(single(make(), method, bias="low_rank"), images(batch, *shape))


@settings(max_examples=60)
@given(st.data())
def test_drawn_geometries(data):
    dims = data.draw(st.integers(1, 3))
    transposed = data.draw(st.booleans())

    def draw(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = draw(1, 4), draw(1, 3), draw(1, 3 if dims < 3 else 2)
    padding = tuple(data.draw(st.integers(0, d * (k - 1) + 1)) for k, d in zip(kernel, dilation, strict=True))
    channels = data.draw(st.sampled_from([(1, 3), (3, 1), (2, 4), (9, 5)]))
    options = {"stride": stride, "dilation": dilation, "bias": data.draw(st.booleans())}
    sizes = draw(1, 4)
    if transposed:
        options["output_padding"] = tuple(
            data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        makes, spans = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), sizes
        padding = tuple(min(p, (d * (k - 1)) // 2) for p, k, d in zip(padding, kernel, dilation, strict=True))
    else:
        makes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        spans = tuple(max(1, s + d * (k - 1) - p) for s, k, d, p in zip(sizes, kernel, dilation, padding, strict=True))
    torch.manual_seed(0)
    layer = makes[dims - 1](*channels, kernel, padding=padding, **options)
    method = data.draw(st.sampled_from(["lora_c", "conv_dora", "cp_dora", "dora_c", "tucker"]))
    net = single(layer, method, bias="low_rank" if options["bias"] else "frozen")
    assert_same_in_every_way(net, images(data.draw(st.sampled_from([1, 2])), channels[0], *spans))


@pytest.mark.parametrize("way", ["composed", *WAYS])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(3, 2), (2, 3)),
        (lambda: nn.Conv2d(2, 3, 3, padding=1, stride=(1, 2)), (1, 2, 4, 5)),
        (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1), (1, 3, 2, 3)),
        (lambda: nn.Conv3d(2, 2, (1, 3, 2), padding="same"), (1, 2, 2, 3, 4)),
    ],
    ids=["linear", "conv2d", "transposed2d", "conv3d"],
)
def test_gradients_are_those_of_finite_differences(make, shape, way, method):
    net = single(make(), method, bias="low_rank")
    trained = {name: value for name, value in net.named_parameters() if value.requires_grad}

    def output(x, *values):
        with execution(way):
            return functional_call(net, dict(zip(trained, values, strict=True)), x)

    assert torch.autograd.gradcheck(output, (images(*shape).requires_grad_(), *trained.values()), fast_mode=True)


def test_second_derivatives_are_had_from_the_composed_weight_alone(method):
    net, x = single(nn.Conv2d(2, 3, 2), method), images(1, 2, 3, 3).requires_grad_()
    trained = {name: value for name, value in net.named_parameters() if value.requires_grad}

    def output(x, *values):
        with execution("composed"):
            return functional_call(net, dict(zip(trained, values, strict=True)), x)

    assert torch.autograd.gradgradcheck(output, (x, *trained.values()), fast_mode=True)
    for way in WAYS:
        with execution(way):
            (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")], ids=str)
@pytest.mark.parametrize("train", [None, "a", "b"])
@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 5, 3), lambda: nn.Linear(6, 5)], ids=["conv2d", "linear"])
def test_stacks_with_all_or_one_of_them_trained(make, names, train):
    net = nn.Sequential(make().to(DTYPE))
    for name, method in (("a", "dora_c"), ("b", "lora")):
        graft(net, AdapterSpec(method, rank=2, bias="low_rank"), name)
    activate(move(net), names, train=train)
    trained = [value for value in net.parameters() if value.requires_grad]
    x = images(2, 4, 5, 6)
    expected = results(net, x, "composed")
    for way in WAYS:
        for name, value in results(net, x, way).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)
    assert len(trained) == len(expected) - 2


@pytest.mark.parametrize("way", WAYS)
def test_a_magnitude_with_zeros(way):
    """t / m cannot be had; also where it became zero after a step that was fine, in place."""
    net, x = single(nn.Conv2d(3, 8, 3, padding=1), "dora_c", rank=1), images(2, 3, 6, 6)
    edit = grafts_of(net[0]).edits("default")["weight"]
    assert is_one_function(net, x, way)
    for value in (0.0, -0.0, 1e-30, -1e-300):
        with torch.no_grad():
            edit.m[1] = value
        assert_same_in_every_way(net, x, [way])
        assert all(each.isfinite().all() for each in results(net, x, way).values())
    with torch.no_grad():
        edit.m[1] = -0.5
    assert is_one_function(net, x, way)
    assert_same_in_every_way(net, x, [way])


@pytest.mark.parametrize("way", WAYS)
def test_a_magnitude_that_becomes_zero_where_no_version_is_counted(way):
    net, x = single(nn.Conv2d(3, 8, 3, padding=1), "dora_c", rank=1), images(2, 3, 6, 6)
    results(net, x, way)
    grafts_of(net[0]).edits("default")["weight"].m.data[1] = 0
    assert_same_in_every_way(net, x, [way])


@pytest.mark.parametrize("way", WAYS)
def test_no_gradient_is_computed_that_nobody_wants(way):
    """The input's, in a first layer; the bias's, where it is frozen."""
    net = single(nn.Conv2d(3, 4, 3), "dora_c")
    with execution(way):
        y = net(images(1, 3, 5, 5))
    y.sum().backward()
    assert all(value.grad is not None for value in net.parameters() if value.requires_grad)
    assert net[0]._parameters["bias"].grad is None


def test_an_empty_batch_and_an_image_without_batch():
    net = single(nn.Conv2d(3, 4, 3), "dora_c")
    for x in (images(0, 3, 5, 5), images(3, 5, 5)):
        assert_same_in_every_way(net, x)


def test_what_torch_refuses_is_refused_in_torchs_words():
    net, plain = single(nn.Conv2d(3, 4, 3), "dora_c"), nn.Conv2d(3, 4, 3).to(DTYPE)
    for x in (images(1, 2, 5, 5), images(1, 3, 2, 2), images(1, 3, 5, 5).float()):
        with pytest.raises(RuntimeError) as expected:
            plain(x)
        for way in ["composed", *WAYS]:
            with execution(way), pytest.raises(RuntimeError) as found:
                net(x)
            assert str(found.value) == str(expected.value)


def test_the_override_ends_with_its_block():
    net, x = single(nn.Conv2d(3, 4, 3), "dora_c"), images(1, 3, 5, 5)
    with pytest.raises(KeyError), execution("composed"):
        raise KeyError
    assert is_one_function(net, x, "chain")
    with execution("composed"):
        with execution("weight"):
            assert isinstance(net(x).grad_fn, torch.autograd.function.BackwardCFunction)
        assert not isinstance(net(x).grad_fn, torch.autograd.function.BackwardCFunction)


def test_nothing_else_knows_how_layers_are_executed():
    room = {"execution", "functions", "parallel", "passing", "choosing", "composing", "operators", "narrow", "stages"}
    room |= {"kept", "phases", "caching", "linear", "convolution", "stock", "winograd", "products", "sums", "disjoint"}
    source = Path(segraft.__file__).parent
    for path in source.rglob("*.py"):
        if path.parent.name == "adapters":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("segraft.adapters"):
                inside = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                assert not room & inside, path
