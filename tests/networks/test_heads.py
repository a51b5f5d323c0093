"""Heads for other labels: which rows they take, how new ones start, and when they cannot be."""

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, graft
from segraft.errors import SegraftError
from segraft.networks import build
from segraft.networks.heads import (
    Outputs,
    PickedOutputs,
    find_head,
    head_rows,
    match_outputs,
    require_head,
    take_outputs,
    untrained_outputs,
)
from segraft.structures import SYNONYMS, same_name

SEGRESNET = {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}


def net_of(outputs: int, network: str = "unet", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    arguments = {"unet": {"widths": [4, 8]}, "multi_view_unet": {"width": 4}}.get(network, SEGRESNET)
    return build(network, in_channels=1, out_channels=outputs, arguments=arguments)


# --- names


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("Left_Atrium", "left-atrium"),
        (" heart  atrium left ", "heart_atrium_left"),
        ("kidney_left", "lkidney"),
        ("Gallbladder", "gall"),
        ("oesophagus", "esophagus"),
        ("IVC", "inferior_vena_cava"),
        ("portal_vein_and_splenic_vein", "psv"),
        ("RAG", "adrenal_gland_right"),
    ],
)
def test_names_of_one_structure(name, other):
    assert same_name(name) == same_name(other)


@pytest.mark.parametrize(
    ("name", "other"), [("kidney_left", "kidney_right"), ("liver", "liver tumor"), ("left lung", "left lag")]
)
def test_names_of_two_structures(name, other):
    assert same_name(name) != same_name(other)


def test_no_name_has_two_meanings():
    names = [name for names in SYNONYMS for name in names]
    assert len(names) == len(set(names))
    assert [same_name(name) for name in names] == [names[0] for names in SYNONYMS for _ in names]


BASE = ("spleen", "left kidney", "liver")


@pytest.mark.parametrize(
    ("labels", "names", "count", "expected"),
    [
        (["liver"], BASE, 3, Outputs((2,))),
        (["liver", "spleen", "kidney_left"], BASE, 3, Outputs((2, 0, 1))),
        (["Spleen", "lkidney", "LIVER"], BASE, 3, None),  # all, in order
        (["a", "b", "c"], BASE, 3, None),  # none the same, as many
        (["a", "b", "liver"], BASE, 3, Outputs((None, None, 2))),
        (["a", "b"], BASE, 3, Outputs((None, None))),
        (["a", "b"], (), 2, None),
        (["a", "b"], (), 3, Outputs((None, None))),
        (["liver"], ("background", *BASE), 4, Outputs((3,), 0)),
        (["a", "b", "c", "d"], ("background", *BASE), 4, Outputs((None,) * 4, 0)),  # a background is nobody's
        (["rim"], ("core",), 1, None),
    ],
)
def test_which_outputs_labels_take(labels, names, count, expected):
    assert match_outputs(labels, names, count) == expected


@pytest.mark.parametrize(
    ("names", "says"), [(("liver", "Liver", "spleen"), "two outputs"), (("liver",), "1 labels of the base are named")]
)
def test_names_that_do_not_tell(names, says):
    with pytest.raises(SegraftError, match=says):
        match_outputs(["liver"], names, 3)


@pytest.mark.parametrize("outputs", [Outputs((2, None)), Outputs((1,), 0)])
def test_the_record_gives_them_back(outputs):
    assert Outputs.of({"path": "base", **outputs.record()}) == outputs
    assert Outputs.of({"path": "base"}) is None


# --- heads of networks


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        ("unet", "head"),
        ("unet3d", "head"),
        ("multi_view_unet", "M3.6"),
        ("monai.networks.nets:SegResNet", "conv_final.2.conv"),
    ],
)
@pytest.mark.parametrize("outputs", [1, 8])  # 8: as many as the norm before SegResNet's last convolution has
def test_the_last_layer(network, layer, outputs):
    net = net_of(outputs, network) if network != "unet3d" else build("unet3d", in_channels=1, out_channels=outputs)
    head = require_head(net, outputs)
    assert head.outputs == outputs
    assert net.get_submodule(head.layer) is net.get_submodule(head.keys[0].rpartition(".")[0])
    assert head.layer.startswith(layer.partition(".")[0])
    assert all(net.state_dict()[key].shape[0] == outputs for key in head.keys)


def test_a_grafted_head_is_the_same_layer():
    net = net_of(3)
    before = find_head(net)
    assert find_head(graft(net, AdapterSpec("dora_c"))) == before


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = {"head": ("last",)}
        self.last = nn.ConvTranspose2d(3, 2, 1)


@pytest.mark.parametrize("net", [nn.Conv2d(1, 1, 1), Transposed()], ids=["no part", "transposed"])
def test_heads_that_cannot_be_told(net):
    assert find_head(net) is None
    with pytest.raises(SegraftError, match="names no part 'head' that ends in a convolution"):
        require_head(net)


# --- rows


@pytest.mark.parametrize("network", ["unet", "multi_view_unet", "monai.networks.nets:SegResNet"])
def test_rows_are_taken_and_all_else_too(network):
    base, rebuilt = net_of(3, network, 1).eval(), net_of(2, network, 2).eval()
    take_outputs(base, 3, rebuilt, Outputs((2, 0)))
    image = torch.rand(1, 1, *(16,) * (3 if "monai" in network else 2))
    with torch.inference_mode():
        torch.testing.assert_close(rebuilt(image), base(image)[:, [2, 0]])


def test_the_background_is_taken_off():
    base, rebuilt = net_of(3, seed=1), net_of(1, seed=2)
    take_outputs(base, 3, rebuilt, Outputs((2,), 0))
    image = torch.rand(1, 1, 8, 8)
    with torch.inference_mode():
        logits = base(image)
        torch.testing.assert_close(rebuilt(image)[:, 0], logits[:, 2] - logits[:, 0])


def test_new_rows_are_the_same_each_time_and_leave_the_generator_alone():
    like = net_of(4).state_dict()
    head = require_head(net_of(4))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    made = head_rows(head, {}, like, Outputs((None,) * 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = head_rows(head, {}, like, Outputs((None,) * 4))
    bound = 4**-0.5  # 1×1 on 4 channels
    for key, value in made.items():
        assert torch.equal(value, again[key])
        assert value.abs().max() <= bound
        assert len(value.unique(dim=0)) == 4
    assert max(value.abs().max() for value in made.values()) > bound / 2


def test_new_rows_of_a_wide_head_are_uniform():
    net = nn.Module()
    net.parts, net.head = {"head": ("head",)}, nn.Conv3d(25, 400, 2)
    rows = head_rows(require_head(net), {}, net.state_dict(), Outputs((None,) * 400))["head.weight"]
    bound = 200**-0.5
    assert rows.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert rows.mean().item() == pytest.approx(0, abs=bound / 50)


def test_a_new_row_does_not_touch_those_taken():
    base, rebuilt = net_of(3, seed=1), net_of(3, seed=2)
    take_outputs(base, 3, rebuilt, Outputs((1, None, 0)))
    assert torch.equal(rebuilt.head.weight[[0, 2]], base.head.weight[[1, 0]])
    assert torch.equal(rebuilt.head.bias[[0, 2]], base.head.bias[[1, 0]])
    assert not torch.equal(rebuilt.head.weight[1], base.head.weight[2])


class Fixed(nn.Module):
    def __init__(self, out_channels: int = 3, *, also: bool = False) -> None:
        super().__init__()
        self.parts = {"head": ("head",)}
        self.head = nn.Conv2d(2, out_channels if also else 3, 1)
        if also:
            self.deep = nn.Conv2d(2, out_channels, 1)


def test_networks_whose_outputs_are_not_their_own_to_change():
    with pytest.raises(SegraftError, match=r"3 outputs in its layer 'head', not 2: it does not follow"):
        take_outputs(Fixed(3), 3, Fixed(2), Outputs((0, 1)))
    with pytest.raises(SegraftError, match=r"more that depends on its outputs than its last layer \(deep\.bias\)"):
        take_outputs(Fixed(3, also=True), 3, Fixed(2, also=True), Outputs((0, 1)))


# --- what trains a row


@pytest.mark.parametrize(
    ("spec", "still"),
    [
        (AdapterSpec("lora", rank=2), []),
        (AdapterSpec("dora_c", rank=2), []),
        (AdapterSpec("none", train="head"), []),
        (AdapterSpec("none", train=(".*",)), []),
        (AdapterSpec("lora", rank=2, targets="encoder", train="head"), []),
        (AdapterSpec("lora", rank=2, exclude="head"), [0, 2]),
        (AdapterSpec("lora", rank=2, targets="encoder"), [0, 2]),
        (AdapterSpec("none", train="bias:.*"), [0, 2]),  # only its bias would move
        (AdapterSpec("none", train="decoder"), [0, 2]),
        (AdapterSpec("lora", rank=2, targets="head", slices={"head": "1/3"}), [2]),
    ],
    ids=str,
)
def test_rows_that_nothing_trains(spec, still):
    net = net_of(3)
    head = require_head(net)
    graft(net, spec)
    assert untrained_outputs(net, head, {0, 2}) == still
    with torch.no_grad():  # as it may be called
        assert untrained_outputs(net, head, {0, 2}) == still


def test_picked_outputs():
    net, image = net_of(3), torch.rand(1, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(PickedOutputs(net, [2, 0])(image), net(image)[:, [2, 0]])
