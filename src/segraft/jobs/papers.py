"""The papers' parameter tables, counted on their networks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from segraft.adapters import AdapterSpec, graft, parameter_table, ungraft
from segraft.errors import SegraftError
from segraft.networks.registry import outline


@dataclass(frozen=True)
class PaperTable:
    """A paper's table of parameters.

    Attributes:
        title: of the table.
        columns: key of a row -> heading; the first names the row.
        rows: counts, by key.
        remarks: how to read it.
    """

    title: str
    columns: dict[str, str]
    rows: list[dict[str, Any]]
    remarks: str


def paper_table(paper: str, rank: int) -> PaperTable:
    """A paper's parameter table, counted on its network.

    Args:
        paper: a key of `PAPERS`.
        rank: of the columns that are not the paper's own.

    Raises:
        SegraftError: another paper, or a rank below 1.
    """
    if paper not in PAPERS:
        raise SegraftError(f"no table of paper {paper!r}: choose one of {', '.join(PAPERS)}.")
    return PAPERS[paper](rank)


SAH_BIAS = {
    "cp_lora": "low_rank",
    "cp_dora": "low_rank",
    "conv_lora": "frozen",
    "conv_dora": "frozen",
    "dora_c": "low_rank",
    "lora_c": "low_rank",
}
"""Rows of Table 3 of the haemorrhage paper, in its order, and how each treats biases there."""


def _sah(rank: int) -> PaperTable:
    """Table 3 of Minoccheri et al. 2025.

    `at_one`: counted at R = 1 with the paper's layout, the paper's row; `multiplied`: R times that, as the paper states
    the count at R; `counted`: with its layout at R; `defaults`: with this package's defaults at R.
    """
    net = outline("unet", in_channels=1, out_channels=1)  # the real network, without 31 million numbers in it
    rows = []
    for method in SAH_BIAS:
        at_one = _count_sah(net, method, 1)
        rows.append(
            {
                "method": method,
                "at_one": at_one,
                "multiplied": rank * at_one,
                "counted": _count_sah(net, method, rank),
                "defaults": _trainable(net, AdapterSpec(method, rank=rank)),
            }
        )
    return PaperTable(
        "Table 3 of Minoccheri et al. 2025, counted on the network",
        {
            "method": "method",
            "at_one": "the table: R = 1",
            "multiplied": f"R · row, R = {rank}",
            "counted": f"counted, R = {rank}",
            "defaults": f"our defaults, R = {rank}",
        },
        rows,
        "The table's layout: LoRA-C and CP also adapt biases with an R×o factor, magnitudes run over the first stored\n"
        "dimension, the head has none. Magnitudes do not grow with R, so R times a DoRA row is more than there is.\n"
        "Our defaults: biases frozen, one magnitude per true output channel of every layer.",
    )


def _count_sah(net: nn.Module, method: str, rank: int) -> int:
    """The paper's layout: magnitudes over the first stored dimension, on every layer but the head."""
    bias: Any = SAH_BIAS[method]
    body = AdapterSpec(method, rank=rank, bias=bias, magnitude_dim=0, exclude="head")
    head = AdapterSpec(method, rank=rank, bias=bias, magnitude=False, targets="head")
    return _trainable(net, body) + _trainable(net, head)


def _arena(rank: int) -> PaperTable:
    """Methods of Baklouti et al. 2025 on SwinUNETR, feature size 48.

    `frozen`: trained parameters with the decoder frozen (base organs); `decoder`: with the decoder trained (novel
    organs); `times`: parameters of the network per trained parameter, in the first case.
    """
    net = outline("swin_unetr", in_channels=1, out_channels=1)
    attention = r".*\.attn\.qkv"
    methods = {
        "linear probe": AdapterSpec("none", train="head"),
        "BitFit": AdapterSpec("none", train="bias:encoder"),
        "Affine-LN": AdapterSpec("none", train="norm:encoder"),
        "full": AdapterSpec("none", train=".*"),
        "LoRA, rank 4 for each of q, k, v": AdapterSpec("lora", rank=12, targets=attention),
        f"LoRA, R = {rank}": AdapterSpec("lora", rank=rank, targets=attention),
        f"AdaLoRA, R = {rank} at the start": AdapterSpec("ada_lora", rank=rank, targets=attention),
        f"ARENA, R = {rank} at the start": AdapterSpec("arena", rank=rank),
    }
    total = sum(value.numel() for value in net.parameters())
    rows = []
    for method, spec in methods.items():
        frozen = _trainable(net, spec)
        whole = AdapterSpec(spec.method, rank=spec.rank, targets=spec.targets, train=(*spec.train, "decoder", "head"))
        rows.append(
            {
                "method": method,
                "frozen": frozen,
                "decoder": _trainable(net, whole),
                "times": round(total / frozen, 1),
            }
        )
    return PaperTable(
        f"Methods of Baklouti et al. 2025 on SwinUNETR ({total / 1e6:.2f} M parameters), counted on the network",
        {
            "method": "method",
            "frozen": "decoder frozen",
            "decoder": "decoder trained",
            "times": "times fewer than the network",
        },
        rows,
        "The paper's LoRA maps each fused qkv to 4 · 3 = 12 directions and back to all of q, k and v: 69,120\n"
        'parameters, its "900 times fewer". ARENA has factors of its own for k and v, and drops those not in use.',
    )


CHANNELWISE_PRINTED = {
    "Baseline": "142.89 M",
    "Finetune": "142.9 M",
    "Frozen": "54.58 M",
    "LoRA-16": "58.71 M",
    "LoRA-32": "62.84 M",
    "LoRA-64": "71.09 M",
}
"""Rows of Table 2 of the channel-wise paper, and the trainable parameters that it prints."""


def _channelwise(rank: int) -> PaperTable:  # noqa: ARG001  its ranks are the paper's own
    """Table 2 of Dutta et al. 2025: UNETR on brain scans of four channels, three labels.

    `printed`: trainable parameters in the paper; `trainable`: counted, of which `factors` of adapters; `total`: all of
    the network with them.
    """
    channels, decoder = 4, ("decoder", "head")
    net = outline("unetr_channelwise", in_channels=channels, out_channels=3)
    targets = (r".*\.attn\.out_proj", r".*\.mlp\.linear1")
    specs = {
        "Baseline": AdapterSpec("none", train=".*"),
        "Finetune": AdapterSpec("none", train=".*"),
        "Frozen": AdapterSpec("none", train=decoder),
        **{
            f"LoRA-{r}": AdapterSpec("rs_lora", rank=r, channels=channels, targets=targets, train=decoder)
            for r in (16, 32, 64)
        },
    }
    whole, decoding = sum(value.numel() for value in net.parameters()), _trainable(net, specs["Frozen"])
    rows = []
    for configuration, printed in CHANNELWISE_PRINTED.items():
        spec = specs[configuration]
        trainable = _trainable(net, spec)
        factors = 0 if spec.factorisation is None else trainable - decoding
        rows.append(
            {
                "configuration": configuration,
                "printed": printed,
                "trainable": trainable,
                "factors": factors,
                "total": whole + factors,
            }
        )
    return PaperTable(
        "Table 2 of Dutta et al. 2025, counted on the network",
        {
            "configuration": "configuration",
            "printed": "the table: trainable",
            "trainable": "trainable",
            "factors": "of them factors",
            "total": "in all",
        },
        rows,
        "Baseline starts from scratch, Finetune from the pre-trained encoder; the others train the decoder and the\n"
        "maps that fuse the channels. LoRA: rank-stabilised, on out_proj and the first MLP layer of every block, a\n"
        "set of factors for each of the four channels. The paper rounds in more than one way, and its\n"
        "totals count three further copies of the factors.",
    )


PAPERS: dict[str, Callable[[int], PaperTable]] = {"sah": _sah, "arena": _arena, "channelwise": _channelwise}
"""Paper -> its table at a rank."""


def _trainable(net: nn.Module, spec: AdapterSpec) -> int:
    trainable = parameter_table(graft(net, spec)).trainable
    ungraft(net)
    return trainable
