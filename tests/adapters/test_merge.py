"""Merging gives a plain network with the same outputs; unmerging gives the bits back."""

import copy

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, activate, graft, merge, ungraft, unmerge
from segraft.errors import SegraftError


def test_merged_equals_unmerged_and_is_plain(kind, method, adapted, snapshot):
    plain = snapshot(kind.net(torch.float64))
    net, x = adapted(kind, method, bias="low_rank"), kind.input(torch.float64)
    with torch.no_grad():
        expected = net(x)
        assert merge(net, reversible=False) is net
        torch.testing.assert_close(net(x), expected, rtol=1e-6, atol=1e-6)
    plain.assert_holds(net, bits=False)


def test_unmerging_restores_every_bit(kind, method, adapted, snapshot):
    net, x = adapted(kind, method, torch.float32, bias="low_rank"), kind.input()
    before = snapshot(net)
    with torch.no_grad():
        expected = net(x)
        base = {id(value) for value in net.parameters()}
        merge(net)
        for value in net.parameters():
            if id(value) not in base:
                value.add_(1)  # whatever happens to the merged weights, those of the base are others
        assert unmerge(net) is net
        assert torch.equal(net(x), expected)
    before.assert_holds(net)
    net(x).sum().backward()
    ungraft(net)
    snapshot(kind.net()).assert_holds(net)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["conv2d", "transposed2d-groups"], indirect=True)
def test_unmerging_keeps_the_precision_of_the_factors(kind, method, adapted, snapshot, dtype):
    net = adapted(kind, method, dtype, bias="low_rank")
    before = snapshot(net)
    unmerge(merge(net))
    before.assert_holds(net)


@pytest.mark.parametrize("kind", ["conv2d", "transposed3d-groups", "attention"], indirect=True)
@pytest.mark.parametrize("names", [("a", "b"), ("b",), ()], ids=["both", "one", "none"])
def test_merging_what_is_active(kind, names, randomise):
    net, x = kind.net(torch.float64), kind.input(torch.float64)
    for name in ("a", "b"):
        randomise(graft(net, kind.spec("dora_c" if name == "a" else "lora"), name, seed=ord(name)), name)
    activate(net, names)
    with torch.no_grad():
        expected = net(x)
        merge(net)
        torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
        unmerge(net)
        assert torch.equal(net(x), expected)


def test_merging_tensors_trained_whole(snapshot, randomise):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    plain, x = snapshot(net), torch.randn(5, 1, 4, 4)
    graft(net, AdapterSpec("lora", rank=1, train=("norm:.*", r"3\..*")))
    randomise(net)
    net.train()(x)
    net.eval()
    expected = net(x)
    assert torch.equal(merge(net)(x), expected)
    plain.assert_holds(net, bits=False)
    assert net[1].num_batches_tracked == 1
    net.train()(x)  # neither this nor that reaches what is kept aside
    with torch.no_grad():
        net[1].weight.add_(1)
        net[3].weight.add_(1)
    net.eval()
    assert torch.equal(unmerge(net)(x), expected)
    ungraft(net)
    plain.assert_holds(net)


def test_merging_remembers_what_was_trainable(snapshot):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].weight.requires_grad_(False)
    plain = snapshot(net)
    merge(graft(net, AdapterSpec("lora")))
    plain.assert_holds(net)
    ungraft(unmerge(net))
    plain.assert_holds(net)


def test_a_copy_of_a_merged_network_unmerges_by_itself(adapted, randomise):
    net = randomise(graft(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), AdapterSpec("dora", rank=1)))
    x = torch.randn(2, 3)
    expected = net(x)
    merge(net)
    merged = net(x)
    twin = copy.deepcopy(net)
    assert torch.equal(unmerge(twin)(x), expected)
    ungraft(twin)
    assert torch.equal(net(x), merged)
    assert torch.equal(unmerge(net)(x), expected)


def test_unmerging_follows_the_network_to_another_precision(randomise):
    """The weights kept aside are part of the network: `.to` must not part them from its biases."""
    net = randomise(graft(nn.Sequential(nn.Linear(3, 3)), AdapterSpec("dora", rank=1)))
    x = torch.randn(2, 3)
    expected = net(x)
    merge(net)
    net.double()
    unmerge(net)
    torch.testing.assert_close(net(x.double()).float(), expected)


def test_merge_and_unmerge_refuse_what_they_cannot_do():
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(SegraftError, match="has no adapter"):
        merge(net)
    with pytest.raises(SegraftError, match="no merged adapter"):
        unmerge(net)
    merge(graft(net, AdapterSpec()), reversible=False)
    with pytest.raises(SegraftError, match="no merged adapter"):
        unmerge(net)
    merge(graft(net, AdapterSpec()))
    graft(net, AdapterSpec())
    with pytest.raises(SegraftError, match="ungraft it first"):
        unmerge(net)
    unmerge(ungraft(net))


def test_merging_twice_takes_nothing_silently_away(randomise):
    """The second merge would drop what the first kept aside: either it refuses, or both can be undone."""
    net = nn.Sequential(nn.Linear(2, 2))
    base = net[0].weight.detach().clone()
    merge(randomise(graft(net, AdapterSpec())))
    randomise(graft(net, AdapterSpec()))
    try:
        merge(net)
    except SegraftError:
        return
    ungraft(unmerge(net))
    ungraft(unmerge(net))
    assert torch.equal(net[0].weight, base)


def test_exported_equals_merged(kind, adapted):
    net, x = merge(adapted(kind, "dora_c", torch.float32)).eval(), kind.input()
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own import
def test_compiled_equals_merged(randomise, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, stride=2), nn.BatchNorm2d(2)
    )
    merge(randomise(graft(net, AdapterSpec("dora_c", rank=2)))).eval()
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(torch.compile(net)(x), net(x))
