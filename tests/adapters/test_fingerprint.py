"""The fingerprint is that of the base's tensors, whatever is grafted on it."""

import pytest
import torch
from torch import nn

from segraft.adapters import activate, fingerprint, graft, merge, unmerge


def test_it_is_64_hex_digits_and_repeatable(kind):
    mark = fingerprint(kind.net())
    assert len(mark) == 64
    assert set(mark) <= set("0123456789abcdef")
    assert mark == fingerprint(kind.net())


def test_grafting_and_training_leave_it_alone(kind, method, adapted):
    mark = fingerprint(kind.net(torch.float64))
    net = adapted(kind, method, bias="train")
    assert fingerprint(net) == mark
    activate(net, None)
    assert fingerprint(net) == mark
    activate(net, "default")
    assert fingerprint(unmerge(merge(net))) == mark
    assert fingerprint(merge(net)) != mark


@pytest.mark.parametrize(
    "tensor", ["0.weight", "0.bias", "1.weight", "1.running_var", "1.num_batches_tracked", "2.weight"]
)
def test_one_bit_of_any_tensor_changes_it(tensor):
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)).bfloat16()
        return net, net.state_dict()[tensor].reshape(-1)[-1:].view(torch.uint8)

    plain, _ = make()
    net, raw = make()
    assert fingerprint(net) == fingerprint(plain)
    raw[0] ^= 1
    assert fingerprint(net) != fingerprint(plain)


def test_name_type_and_shape_count():
    def of(**tensors):
        net = nn.Module()
        for name, value in tensors.items():
            net.register_buffer(name, value)
        return fingerprint(net)

    zeros = torch.zeros(4)
    marks = [
        of(a=zeros),
        of(b=zeros),
        of(a=zeros.reshape(2, 2)),
        of(a=zeros.int()),
        of(a=zeros.to(torch.bfloat16)),
        of(a=zeros.to(torch.float16)),
        of(a=-zeros),
        of(a=zeros, b=torch.zeros(0)),
        of(a=zeros, b=torch.zeros(0, 3)),
        of(a=zeros, b=torch.tensor(0.0)),
        of(a=zeros, b=torch.tensor(False)),
        of(a=zeros, b=zeros),
    ]
    assert len(set(marks)) == len(marks)


def test_memory_layout_trainability_and_mode_do_not_count():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 2, 3))
    mark = fingerprint(net)
    assert fingerprint(net.to(memory_format=torch.channels_last)) == mark
    assert fingerprint(net.requires_grad_(False).eval()) == mark
    assert fingerprint(nn.Sequential(*net)) == mark


def test_buffers_that_are_not_saved_do_not_count():
    net = nn.Linear(1, 1)
    mark = fingerprint(net)
    net.register_buffer("grid", torch.ones(3), persistent=False)
    assert fingerprint(net) == mark


@pytest.mark.parametrize("kind", ["conv2d"], indirect=True)
def test_a_second_adapter_sees_the_same_base(kind, adapted):
    net = adapted(kind, "dora_c", torch.float32)
    graft(net, kind.spec("lora"), "second")
    assert fingerprint(net) == fingerprint(kind.net())
