"""In evaluation the composed weight is kept, and never served once anything it was composed of has changed."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segraft.adapters import AdapterSpec, activate, activated, graft, load, merge, save, ungraft
from segraft.adapters.edits import LowRank
from segraft.adapters.execution import execution
from segraft.adapters.grafted import grafts_of

SHAPE = (2, 3, 6, 5)


def build(method="conv_dora", **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return move(graft(net, AdapterSpec(method, rank=2, **options)).eval())


def move(net, seed=5, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if ".segraft." in name:
                value.add_(scale * torch.randn(value.shape, generator=generator).to(value))
    return net


def image(dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(4)).to(dtype)


def edit_of(layer, name="default"):
    return grafts_of(layer).edits(name)["weight"]


def weight_by_hand(layer):
    """Of one conv_lora or conv_dora after another, in float64, from the tensors as they are."""
    value = layer._parameters["weight"].detach().double()
    for edit in grafts_of(layer).active_edits("weight"):
        value = value + edit.scaling * torch.einsum("or,rixy->oixy", edit.B.detach().double(), edit.A.detach().double())
        if edit.m is not None:
            norm = value.pow(2).sum((1, 2, 3), keepdim=True).sqrt()
            value = edit.m.detach().double().view(-1, 1, 1, 1) * value / norm
    return value


def output_by_hand(net, x):
    x = x.double()
    first = nn.functional.conv2d(x, weight_by_hand(net[0]), net[0]._parameters["bias"].detach().double(), padding=1)
    return nn.functional.conv2d(first.relu(), weight_by_hand(net[2]), net[2]._parameters["bias"].detach().double())


def assert_current(net, *, x=None):
    """What evaluation serves is what the tensors say, also with the bits of a fresh composition."""
    x = image(net[0]._parameters["weight"].dtype) if x is None else x
    with torch.no_grad():
        found = net(x)
    torch.testing.assert_close(found.double(), output_by_hand(net, x), rtol=1e-4, atol=1e-5)
    fresh = copy.deepcopy(net)
    for module in fresh.modules():
        if hasattr(module, "segraft"):
            grafts_of(module).composed.clear()
    with torch.no_grad():
        assert torch.equal(found, fresh(x))
    return found


NO_GRAD = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", NO_GRAD)
def test_unmerged_evaluation_gives_the_bits_of_the_merged_network(kind, method, mode, adapted):
    net, x = adapted(kind, method, torch.float32, bias="low_rank").eval(), kind.input()
    with NO_GRAD[mode]():
        first, second = net(x), net(x)
    # torch.matmul rounds differently for a weight that requires a gradient.
    merge(net, reversible=False).requires_grad_(False)
    with NO_GRAD[mode]():
        merged = net(x)
    assert torch.equal(first, second)
    assert torch.equal(first, merged)


@pytest.mark.parametrize("mode", NO_GRAD)
def test_a_weight_is_composed_once(mode):
    net = build(bias="low_rank")
    with NO_GRAD[mode]():
        net(image())
        for tensor in ("weight", "bias"):
            kept = getattr(net[0], tensor)
            net(image())
            assert getattr(net[0], tensor) is kept
            assert not kept.is_inference()
            assert not kept.requires_grad
        assert net[0].weight is not net[2].weight


def optimiser_step(make):
    def step(net):
        optimiser = make([value for value in net.parameters() if value.requires_grad])
        net.train()(image()).square().sum().backward()
        optimiser.step()
        net.eval()

    return step


def in_place(net):
    with torch.no_grad():
        edit_of(net[0]).B.add_(0.1)


def magnitude_in_place(net):
    with torch.no_grad():
        edit_of(net[2]).m.mul_(2)


def one_number(net):
    with torch.no_grad():
        edit_of(net[0]).A[1, 2, 0, 1] += 1


def through_data(net):
    edit_of(net[0]).A.data.add_(0.1)


def new_data(net):
    edit_of(net[0]).A.data = edit_of(net[0]).A.data + 0.1


def swapped_data(net):
    first, second = edit_of(net[0]).A, edit_of(net[0]).A.detach().flip(0)
    first.data, second.data = second.data, first.data


def through_numpy(net):
    edit_of(net[0]).A.detach().numpy()[...] += np.float32(0.1)


def through_a_storage(net):
    memory = edit_of(net[0]).m.untyped_storage()
    torch.tensor([], dtype=torch.float32).set_(memory)[:1] *= 3


def new_parameter(net):
    edit_of(net[0]).A = nn.Parameter(edit_of(net[0]).A.detach() + 0.1)


def state_dict(net, **options):
    state = {key: value + 0.1 if ".segraft." in key else value for key, value in net.state_dict().items()}
    net.load_state_dict(state, **options)


def base_state_dict(net):
    net.load_state_dict({key: value if ".segraft." in key else value * 1.5 for key, value in net.state_dict().items()})


def base_in_place(net):
    with torch.no_grad():
        net[0]._parameters["weight"].mul_(1.5)


def base_new_data(net):
    net[0]._parameters["weight"].data = net[0]._parameters["weight"].data * 1.5


def scaling(net):
    edit_of(net[0]).scaling *= 2


def off(net):
    activate(net, None)


def another(net):
    move(graft(net, AdapterSpec("conv_lora", rank=1, alpha=3), "other"), seed=8).eval()


def another_in_a_stack(net):
    another(net)
    activate(net, ("default", "other"))


def to_double(net):
    net.double()
    in_place(net)


def written_into(net):
    with torch.no_grad():
        net[0].weight.zero_()
        net[2].weight.add_(1)


def no_magnitude(net):
    edit_of(net[0]).m = None


def an_edit_put_in_by_hand(net):
    other = copy.deepcopy(edit_of(net[0]))
    with torch.no_grad():
        other.B.add_(0.2)
    grafts_of(net[0])["default"]._modules["weight"] = other


def an_edit_taken_out_by_hand(net):
    edits = grafts_of(net[2])["default"]._modules
    taken = edits.pop("weight")
    with torch.no_grad():
        assert torch.equal(net[2].weight, net[2]._parameters["weight"])
        taken.m.mul_(2)
    edits["weight"] = taken


def trained_and_evaluated(net):
    net.train()(image()).sum().backward()
    in_place(net)
    net.eval()


CHANGES = {
    "adamw": optimiser_step(lambda values: torch.optim.AdamW(values, lr=0.1)),
    "adamw foreach": optimiser_step(lambda values: torch.optim.AdamW(values, lr=0.1, foreach=True)),
    "adamw fused": optimiser_step(lambda values: torch.optim.AdamW(values, lr=0.1, fused=True)),
    "sgd": optimiser_step(lambda values: torch.optim.SGD(values, lr=0.1)),
    "sgd foreach": optimiser_step(lambda values: torch.optim.SGD(values, lr=0.1, foreach=True, momentum=0.9)),
    "sgd fused": optimiser_step(lambda values: torch.optim.SGD(values, lr=0.1, fused=True)),
    "load_state_dict": state_dict,
    "load_state_dict, assigned": lambda net: state_dict(net, assign=True),
    "double and back": lambda net: (to_double(net), net.float()),
    **{
        change.__name__: change
        for change in (
            in_place, magnitude_in_place, one_number, through_data, new_data, swapped_data, through_numpy,
            through_a_storage, new_parameter, base_state_dict, base_in_place, base_new_data, scaling, off, another,
            another_in_a_stack, to_double, no_magnitude, an_edit_put_in_by_hand, an_edit_taken_out_by_hand,
            trained_and_evaluated,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", NO_GRAD)
def test_a_change_is_never_missed(change, mode):
    net = build()
    with NO_GRAD[mode]():
        before = net(image())
    CHANGES[change](net)
    after = assert_current(net)
    assert not torch.allclose(after.double(), before.double(), rtol=1e-3, atol=1e-3)
    CHANGES["in_place"](net)
    assert_current(net)


@pytest.mark.parametrize(
    "change", ["off", "another_in_a_stack", "an_edit_put_in_by_hand", "scaling", "in_place", "base_in_place"]
)
def test_a_change_while_a_weight_is_composed_shows(change, monkeypatch):
    """By another thread, between what is looked at and what is kept."""
    net, compose, pending = build(), LowRank.forward, [CHANGES[change]]

    def forward(edit, value):
        found = compose(edit, value)
        if pending:
            pending.pop()(net)
        return found

    monkeypatch.setattr(LowRank, "forward", forward)
    with torch.no_grad():
        net(image())
    assert not pending
    assert_current(net)


def test_an_adapter_taken_off_is_let_go():
    net = build()
    another(net)
    assert_current(net)
    edit = weakref.ref(edit_of(net[0]))
    ungraft(net, "default")
    gc.collect()
    assert edit() is None


def test_what_changes_nothing_changes_nothing():
    net = build()
    before = assert_current(net)
    net.to(memory_format=torch.channels_last)
    assert_current(net, x=image().to(memory_format=torch.channels_last))
    net.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(assert_current(net), before)
    written_into(net)
    assert torch.equal(assert_current(net), before)
    net.train()
    with torch.no_grad():
        assert torch.equal(net(image()), before)
    merge(net, reversible=True)
    with torch.no_grad():
        assert torch.equal(net(image()), before)


def test_switching_and_stacking():
    net = build()
    another(net)
    seen = {}
    for _ in range(2):
        for names in ("default", "other", ("default", "other"), ("other", "default"), None):
            activate(net, names)
            found = assert_current(net)
            assert torch.equal(seen.setdefault(names, found), found)
    activate(net, "default")
    with activated(net, "other"):
        assert torch.equal(assert_current(net), seen["other"])
    assert torch.equal(assert_current(net), seen["default"])
    activate(net, ("default", "other"))
    assert_current(net)
    ungraft(net, "other")
    assert torch.equal(assert_current(net), seen["default"])
    ungraft(net)
    with torch.no_grad():
        assert torch.equal(net(image()), seen[None])


def test_an_adapter_file_read_over_an_adapter(tmp_path):
    net, other = build(), move(build(), seed=9)
    expected = assert_current(other)
    assert not torch.equal(assert_current(net), expected)
    save(other, tmp_path / "other.safetensors")
    load(net, tmp_path / "other.safetensors", "read")
    assert torch.equal(assert_current(net), expected)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_a_copy_lives_its_own_life(duplicate):
    net = build()
    before = assert_current(net)
    other = duplicate(net)
    assert torch.equal(assert_current(other), before)
    in_place(net)
    changed = assert_current(net)
    assert torch.equal(assert_current(other), before)
    magnitude_in_place(other)
    assert not torch.equal(assert_current(other), before)
    assert torch.equal(assert_current(net), changed)


def test_what_can_be_composed_again_is_not_pickled():
    torch.manual_seed(0)
    net = graft(nn.Sequential(nn.Conv2d(32, 32, 3)), AdapterSpec("conv_lora", rank=1)).eval()
    before = len(pickle.dumps(net))
    with torch.no_grad():
        net(torch.randn(1, 32, 4, 4))
    assert len(pickle.dumps(net)) == before
    assert list(net.state_dict()) == list(build_keys(net))


def build_keys(net):
    return [name for name, _ in net.named_parameters()]


@pytest.mark.parametrize("way", ["composed", None])
def test_what_inference_mode_made_serves_training(way):
    """With every tensor of the adapter frozen, training of what lies below goes through the kept weight."""
    net, x = build(), image().requires_grad_()
    activate(net, "default", train=())
    with torch.inference_mode():
        expected = net(x)
    kept = net[0].weight
    with execution(way):
        y = net(x)
    y.sum().backward()
    assert torch.equal(y.detach(), expected)
    weights = [weight_by_hand(layer) for layer in (net[0], net[2])]
    z = x.detach().double().requires_grad_()
    first = nn.functional.conv2d(z, weights[0], net[0]._parameters["bias"].double(), padding=1)
    nn.functional.conv2d(first.relu(), weights[1]).sum().backward()
    torch.testing.assert_close(x.grad.double(), z.grad, rtol=1e-4, atol=1e-5)
    assert net[0].weight is kept
    in_place(net)
    assert_current(net)


def test_training_holds_no_composed_weight():
    net = build()
    assert_current(net)
    net.train()(image()).sum().backward()
    assert not any(grafts_of(layer).composed for layer in (net[0], net[2]))


def test_a_network_made_in_inference_mode():
    """Its tensors have no versions."""
    with torch.inference_mode():
        net = build()
        for _ in range(2):
            edit_of(net[0]).B.add_(0.1)
            found = net(image())
            torch.testing.assert_close(found.double(), output_by_hand(net, image()), rtol=1e-4, atol=1e-5)


def test_evaluation_in_threads_while_factors_change():
    net = build()
    stop, errors = threading.Event(), []

    def evaluate():
        try:
            while not stop.is_set():
                with torch.no_grad():
                    assert net(image()).isfinite().all()
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=evaluate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(300):
        with torch.no_grad():
            edit_of(net[0]).B.add_(0.001)
            edit_of(net[2]).m.mul_(1.001)
        if step % 100 == 0:
            another(net)
            activate(net, "default")
            ungraft(net, "other")
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert_current(net)


STEPS = {
    **{name: CHANGES[name] for name in ("sgd", "in_place", "through_data", "through_numpy", "new_data", "scaling")},
    "base": lambda net: net[0]._parameters["weight"].data.copy_(net[0]._parameters["weight"]),
    "base, halved": lambda net: net.load_state_dict(
        {key: value if ".segraft." in key else value / 2 for key, value in net.state_dict().items()}
    ),
    "on": lambda net: activate(net, "default"),
    "off": off,
    "other": lambda net: activate(net, "other"),
    "both": lambda net: activate(net, ("other", "default")),
    "written into": written_into,
    "channels last": lambda net: net.to(memory_format=torch.channels_last),
    "contiguous": lambda net: net.to(memory_format=torch.contiguous_format),
}


@settings(max_examples=25)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=8))
def test_any_sequence_of_changes(steps):
    net = build()
    another(net)
    for step in steps:
        if step == "sgd":
            activate(net, "default")
        if step == "written into" and not grafts_of(net[0]).active:
            continue  # that would be the base itself
        STEPS[step](net)
        assert_current(net)
