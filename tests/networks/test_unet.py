"""The classic U-Net: the counts of the paper's Table 3, shapes, parts."""

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, graft, parameter_table
from segraft.adapters.graft import grafted_layers
from segraft.adapters.selection import base_parameters
from segraft.errors import SegraftError
from segraft.jobs.papers import paper_table
from segraft.networks import UNet

NORMS = [None, "instance", "batch"]

# Sums over the 23 layers of Table 3's network, per unit of rank; each is worked out in `test_sums_by_hand`.
LORA_C, CP, CONV = 40_964, 14_784, 64_138
OUTPUTS, FIRST_DIMENSIONS = 6_849, 7_808
METHODS = ["cp_lora", "cp_dora", "conv_lora", "conv_dora", "dora_c", "lora_c"]


def test_sums_by_hand():
    pairs = [(1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
    pairs += [(512, 1024), (1024, 1024)]
    pairs += [(1024, 512), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128), (128, 64), (64, 64)]
    up = [(1024, 512), (512, 256), (256, 128), (128, 64)]
    assert sum(3 * (i + o) for i, o in pairs) + sum(2 * (i + o) for i, o in up) + 65 == LORA_C
    assert sum(i + o + 6 for i, o in pairs) + sum(i + o + 4 for i, o in up) + 1 + 64 + 2 == CP
    # the transposed layers keep the kernel with their output side
    assert sum(9 * i + o for i, o in pairs) + sum(i + 4 * o for i, o in up) + 65 == CONV
    assert sum(o for _, o in [*pairs, *up]) + 1 == OUTPUTS
    assert sum(o for _, o in pairs) + sum(i for i, _ in up) == FIRST_DIMENSIONS


def test_table_3_at_rank_one():
    rows = {row["method"]: row for row in paper_table("sah", 1).rows}
    assert list(rows) == METHODS
    assert [row["at_one"] for row in rows.values()] == [21_633, 29_441, 64_138, 71_946, 55_621, 47_813]
    assert all(row["at_one"] == row["multiplied"] == row["counted"] for row in rows.values())


def test_table_3_at_rank_five():
    rows = paper_table("sah", 5).rows
    assert [row["multiplied"] for row in rows] == [5 * n for n in (21_633, 29_441, 64_138, 71_946, 55_621, 47_813)]
    cp, conv, lora_c = 5 * (CP + OUTPUTS), 5 * CONV, 5 * (LORA_C + OUTPUTS)
    magnitudes = FIRST_DIMENSIONS  # one set, whatever the rank
    assert [row["counted"] for row in rows] == [
        cp,
        cp + magnitudes,
        conv,
        conv + magnitudes,
        lora_c + magnitudes,
        lora_c,
    ]
    assert [row["defaults"] for row in rows] == [
        5 * CP,
        5 * CP + OUTPUTS,
        5 * CONV,
        5 * CONV + OUTPUTS,
        5 * LORA_C + OUTPUTS,
        5 * LORA_C,
    ]


def test_no_table_of_another_paper():
    with pytest.raises(SegraftError, match="choose one of sah, arena, channelwise"):
        paper_table("samed", 1)


def test_the_few_shot_papers_counts():
    """LoRA there has 69,120 parameters of 62.19 M: "900 times fewer"."""
    table = paper_table("arena", 8)
    rows = {row["method"]: row for row in table.rows}
    assert "62.19 M" in table.title
    lora = rows["LoRA, rank 4 for each of q, k, v"]
    assert (lora["frozen"], lora["times"]) == (69_120, 899.7)
    widths = [48, 48, 96, 96, 192, 192, 384, 384]
    assert lora["frozen"] == sum(12 * width + 12 * 3 * width for width in widths)
    assert rows["ARENA, R = 8 at the start"]["frozen"] == sum(2 * (8 * width + 8 * width + 8) for width in widths)
    assert rows["full"]["frozen"] == rows["full"]["decoder"] == 62_186_659
    assert rows["linear probe"]["frozen"] == 49


def test_the_channel_wise_papers_table_2():
    """To within a hundredth of a million, as the paper rounds in more than one way; exactly, by hand."""
    rows = {row["configuration"]: row for row in paper_table("channelwise", 8).rows}
    printed = {row: float(values["printed"].removesuffix(" M")) for row, values in rows.items()}
    assert printed == dict(
        zip(
            ("Baseline", "Finetune", "Frozen", "LoRA-16", "LoRA-32", "LoRA-64"),
            (142.89, 142.9, 54.58, 58.71, 62.84, 71.09),
            strict=True,
        )
    )
    assert all(abs(rows[row]["trainable"] / 1e6 - millions) < 0.01 for row, millions in printed.items())
    encoder, rest = 88_322_304, 54_577_347
    assert rows["Baseline"]["trainable"] == rows["Finetune"]["trainable"] == rows["Frozen"]["total"] == encoder + rest
    assert rows["Frozen"]["trainable"] == rest
    for rank in (16, 32, 64):
        factors = 4 * 12 * rank * (768 + 768 + 768 + 3072)  # channels, blocks, out_proj and the first MLP layer
        assert rows[f"LoRA-{rank}"]["factors"] == factors
        assert rows[f"LoRA-{rank}"]["trainable"] == rest + factors
        assert rows[f"LoRA-{rank}"]["total"] == encoder + rest + factors


def test_table_3_network_has_23_adaptable_layers():
    net = graft(UNet(), AdapterSpec("lora", rank=1))
    assert len(list(grafted_layers(net))) == 23
    assert sum(isinstance(layer, nn.ConvTranspose2d) for _, layer in grafted_layers(net)) == 4


def test_table_3_network_has_the_published_size():
    """31.03 million: the size of the U-Net of 2015 with one channel in and one out."""
    assert parameter_table(UNet()).total == 31_030_593


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (2, 3)])
def test_logits_lie_on_the_grid_of_the_image(dims, norm, inputs, outputs):
    net = UNet(inputs, outputs, spatial_dims=dims, widths=(2, 3, 4), norm=norm)
    assert net.size_multiple == 4
    sizes = (8, 12, 16)[:dims]
    assert net(torch.rand(2, inputs, *sizes)).shape == (2, outputs, *sizes)


@pytest.mark.parametrize("shape", [(1, 1, 8, 10), (1, 1, 7, 8), (1, 1, 8), (1, 1, 8, 8, 8), (1, 8, 8)])
def test_sizes_that_the_depth_does_not_divide(shape):
    with pytest.raises(SegraftError, match="multiples of 4") as caught:
        UNet(widths=(2, 3, 4))(torch.rand(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [{"widths": (4,)}, {"widths": (4, 0)}, {"spatial_dims": 4}, {"spatial_dims": 0}, {"norm": "layer"}]
)
def test_impossible_networks(arguments):
    with pytest.raises(SegraftError, match="at least two positive widths"):
        UNet(**arguments)


def test_every_skip_and_level_reaches_the_output():
    """With all weights frozen but one, the output still depends on that one."""
    net = UNet(widths=(2, 3, 4), norm="instance")
    net(torch.rand(2, 1, 8, 8)).square().sum().backward()
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in net.parameters())
    assert all(value.grad.abs().sum() > 0 for name, value in net.named_parameters() if name.endswith("weight"))


def test_the_forward_pass_written_out():
    """Base files hold weights for this very order: the skip before what comes up."""
    torch.manual_seed(0)
    net, image, relu = UNet(1, 2, widths=(2, 3)), torch.rand(1, 1, 4, 4), nn.functional.relu
    fine, coarse, merged = net.encoder[0], net.bottleneck, net.decoder[0]
    skip = relu(fine[2](relu(fine[0](image))))
    low = relu(coarse[2](relu(coarse[0](nn.functional.max_pool2d(skip, 2)))))
    joined = torch.cat([skip, net.upsampling[0](low)], dim=1)
    assert torch.equal(net(image), net.head(relu(merged[2](relu(merged[0](joined))))))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dims", [2, 3])
def test_parts_cover_every_parameter_once(dims, norm):
    net = UNet(spatial_dims=dims, widths=(2, 3, 4), norm=norm)
    assert set(net.parts) == {"encoder", "bottleneck", "decoder", "head"}
    assert set(net.parts["bottleneck"]) < set(net.parts["encoder"])
    for name, *_ in base_parameters(net):
        owners = [part for part, prefixes in net.parts.items() if name.split(".")[0] in prefixes]
        assert owners in (["encoder"], ["encoder", "bottleneck"], ["decoder"], ["head"]), name


def test_norms_replace_the_biases_before_them():
    net = UNet(widths=(2, 3), norm="instance")
    norms = [module for module in net.modules() if isinstance(module, nn.InstanceNorm2d)]
    assert len(norms) == 6
    assert all(norm.affine for norm in norms)
    biased = {name for name, module in net.named_modules() if getattr(module, "bias", None) is not None}
    convolutions = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert biased & convolutions == {"head"}
