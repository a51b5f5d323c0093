"""What is formed and kept by a training step: no gradient of the weight's size, no activation that nobody needs."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from segraft.adapters import AdapterSpec, graft
from segraft.adapters.execution import execution
from segraft.networks import UNet


class Formed(TorchDispatchMode):
    """Takes down the shapes of all tensors that are computed, views aside."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        seen = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in seen:
                self.shapes.add(tuple(each.shape))
        return result


def formed_in_backward(net, x, way=None):
    with execution(way):
        y = net(x.requires_grad_())
    g = torch.ones_like(y)
    with Formed() as formed:
        y.backward(g)
    return formed.shapes


def sizes(shapes):
    return {torch.Size(shape).numel() for shape in shapes}


@pytest.mark.parametrize("method", ["conv_lora", "lora_c", "cp_lora", "dora_c", "conv_dora", "cp_dora"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(40, 44, 3, padding=1), (1, 40, 5, 5)),
        (lambda: nn.Conv3d(40, 44, 3, padding=1), (1, 40, 2, 3, 2)),
        (lambda: nn.Conv2d(40, 44, 3, stride=2), (2, 40, 5, 5)),
        (lambda: nn.Linear(40, 44), (5, 40)),
    ],
    ids=["conv2d", "conv3d", "strided2d", "linear"],
)
def test_a_chain_forms_nothing_of_the_size_of_the_weight(make, shape, method):
    net = graft(nn.Sequential(make()), AdapterSpec(method, rank=2))
    weight, x = net.state_dict()["0.weight"], torch.randn(shape)
    assert max(sizes(formed_in_backward(net, x, "chain"))) < weight.numel()
    assert weight.numel() in sizes(formed_in_backward(net, x, "weight"))
    assert weight.numel() in sizes(formed_in_backward(net, x, "composed"))


@pytest.mark.parametrize("method", ["conv_lora", "dora_c"])
def test_the_chain_is_chosen_for_a_wide_layer(method):
    net = graft(nn.Sequential(nn.Conv2d(512, 512, 3, padding=1)), AdapterSpec(method, rank=8))
    assert max(sizes(formed_in_backward(net, torch.randn(1, 512, 8, 8)))) < 512 * 512 * 9


@pytest.mark.parametrize("method", ["conv_lora", "dora_c"])
def test_the_weight_is_chosen_for_a_first_layer_of_one_channel(method):
    net = graft(nn.Sequential(nn.Conv2d(1, 64, 3, padding=1)), AdapterSpec(method, rank=8))
    x = torch.randn(2, 1, 32, 32)
    assert 64 * 9 in sizes(formed_in_backward(net, x))
    in_between = (2, 8, 32, 32)
    assert in_between in formed_in_backward(net, x, "chain")
    assert in_between not in formed_in_backward(net, x)


def kept_bytes(net, x, way=None, *, least=1000):
    """Bytes kept for the backward pass in distinct memory, of tensors with `least` numbers or more."""
    own = {value.untyped_storage().data_ptr() for value in (*net.parameters(), *net.buffers())}
    found, held = {}, []

    def take_down(value):
        held.append(value)  # else its memory could be given to another
        memory = value.untyped_storage()
        if memory.data_ptr() not in own and value.numel() >= least:
            found[memory.data_ptr()] = memory.nbytes()
        return value

    with saved_tensors_hooks(take_down, lambda value: value), execution(way):
        y = net(x)
    todo, seen = [y.grad_fn], set()
    while todo:  # what functions of ours keep beside
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for value in (vars(node) if hasattr(node, "__dict__") else {}).values():
            for each in [value, *vars(value).values()] if hasattr(value, "__dict__") else [value]:
                if isinstance(each, torch.Tensor):
                    take_down(each)
        todo += [each for each, _ in node.next_functions]
    return sum(found.values())


def unet(spatial_dims=2):
    torch.manual_seed(0)
    return UNet(spatial_dims=spatial_dims, widths=(4, 8, 12))


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("method", ["dora_c", "conv_dora", "cp_dora", "conv_lora", "lora_c", "cp_lora"])
@pytest.mark.parametrize("way", ["weight", "chain", None])
def test_a_step_keeps_no_more_activations_than_full_fine_tuning(spatial_dims, method, way):
    x = torch.randn(2, 1, *[128 if spatial_dims == 2 else 32] * spatial_dims)
    least = x.numel() * 12 // 4**spatial_dims  # of the bottleneck; weights and matrices made of factors are smaller
    full = kept_bytes(unet(spatial_dims), x, least=least)
    assert full > 30 * x.numel() * x.itemsize
    assert kept_bytes(graft(unet(spatial_dims), AdapterSpec(method, rank=2)), x, way, least=least) <= full


def test_frozen_layers_above_an_adapted_one_keep_no_activations():
    x = torch.randn(2, 4, 24, 24)

    def layers():
        return nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6)))

    frozen = graft(layers(), AdapterSpec("none", train=r"0\.bias"))
    activation = x.numel() * 4
    assert kept_bytes(layers(), x) >= 6 * activation
    assert kept_bytes(layers().requires_grad_(False), x) == 0
    assert kept_bytes(frozen, x) <= activation  # the image itself, which torch keeps
    adapted = graft(layers(), AdapterSpec("conv_lora", rank=2, targets="0"))
    assert kept_bytes(adapted, x) == activation
    assert kept_bytes(adapted, x, "composed") >= 5 * activation  # as torch's own convolutions do


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "spec",
    [
        {"targets": "decoder"},
        {"targets": "encoder"},
        {"targets": "bottleneck", "train": "head"},
        {"method": "none", "train": "bias:.*"},
        {"method": "none", "train": r"encoder\.0\.0\.bias"},
        {"method": "none", "train": r"upsampling\..*"},
    ],
    ids=str,
)
def test_parts_alone_are_trained_with_the_right_gradients(spec, memory_format):
    net = unet().double().to(memory_format=memory_format)
    graft(net, AdapterSpec(**{"method": "dora_c", "rank": 2, **spec}))
    with torch.no_grad():
        for name, value in net.named_parameters():
            if ".segraft." in name:
                value.add_(0.1 * torch.randn_like(value))
    x = torch.randn(2, 1, 8, 12, dtype=torch.float64).to(memory_format=memory_format)

    def gradients(way):
        net.zero_grad()
        with execution(way):
            net(x).square().mean().backward()
        return {name: value.grad.clone() for name, value in net.named_parameters() if value.grad is not None}

    expected = gradients("composed")
    assert set(expected) == {name for name, value in net.named_parameters() if value.requires_grad}
    for way in ("weight", "chain", "parallel", None):
        for name, value in gradients(way).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("train", ["decoder", "head"])
def test_nothing_is_differentiated_below_the_lowest_adapted_layer(train):
    net = graft(unet(), AdapterSpec("dora_c", rank=2, targets=train))
    reached = []
    for name, layer in net.named_modules():
        layer.register_forward_hook(lambda _, __, y, name=name: reached.append((name, y.requires_grad)))
    net(torch.randn(1, 1, 8, 8)).sum().backward()
    below = [graph for name, graph in reached if name.startswith(("encoder", "bottleneck", "pool"))]
    assert below
    assert not any(below)
    assert dict(reached)["head"]
