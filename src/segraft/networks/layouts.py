"""Checkpoints as others publish them, recognised by their keys. To read another kind, add one entry to `LAYOUTS`.

Where the key names come from: Project-MONAI/research-contributions (SwinUNETR/Pretrain and SwinUNETR/BTCV) and MONAI's
own `SwinUNETR.load_from`; Project-MONAI/model-zoo (swin_unetr_btcv_segmentation, metadata.json);
ljwztc/CLIP-Driven-Universal-Model (model/Universal_model.py, train.py); MrGiovanni/SuPreM
(supervised_pretraining/train.py, target_applications/totalsegmentator/train.py); jusiro/fewshot-finetuning
(pretrain/models/model_pretrain.py, pretrain/datasets/templates.py, utils/models.py).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

CONTAINERS = ("state_dict", "model", "network_weights", "net")
"""Under which a checkpoint may hold its state dict. The last is what CLIP-driven and SuPreM checkpoints use."""

PREFIXES = ("module.", "net.", "model.", "_orig_mod.")
"""What wrappers put before every key."""

BTCV = (
    "background",
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)
"""Outputs of MONAI's SwinUNETR for BTCV (metadata.json of the model-zoo bundle): a softmax, background first."""

FSEFT = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
    "duodenum",
    "bladder",
    "prostate or uterus",
    "liver tumor",
    "kidney tumor",
    "kidney cyst",
    "celiac trunk",
    "right lung",
    "left lung",
    "bone",
    "brain",
    "lung tumor",
    "pancreas tumor",
    "hepatic vessel",
    "hepatic vessel tumor",
    "colon tumor",
)
"""The 29 structures of the few-shot paper's foundation model (UNIVERSAL_TEMPLATE, whose numbers begin at 1)."""

KNOWN_LABELS: dict[str, tuple[str, ...]] = {"btcv": BTCV, "fseft": FSEFT}
"""Names of outputs that may be given by one word.

A SwinUNETR with BTCV's 14 outputs has the keys and shapes of any other with 14, such as one for FLARE's 13 organs: its
classes cannot be told from the file, and a guess would put one organ's weights under another's name.
"""


@dataclass(frozen=True)
class Encoder:
    """What networks have in common that take weights of one kind.

    Attributes:
        key: of a tensor that they have.
        cure: what to name where a network has none.
    """

    key: str
    cure: str


ENCODERS: dict[str, Encoder] = {
    "SwinUNETR": Encoder("swinViT.patch_embed.proj.weight", "name the network swin_unetr"),
    "ViT": Encoder(
        "vit.patch_embedding.position_embeddings", "name the network unetr_channelwise or monai.networks.nets:UNETR"
    ),
    "U-Net of nnU-Net": Encoder("decoder.transpconvs.0.weight", "name the folder of the model, as nnunet:FOLDER"),
}
"""Kinds of encoders by name."""


@dataclass(frozen=True)
class Layout:
    """One kind of checkpoint, by keys without the prefixes of wrappers.

    Attributes:
        name: for people.
        holds: what it must hold, whole; what is beyond stays at its start.
        has: regular expressions; each must match some key whole.
        lacks: none of these may match one.
        unused: group -> expression on keys (matched at their start) of tensors that the network has no place for.
        renames: (expression, replacement) that lead from its keys to MONAI's, in this order.
        outputs: names of the head's outputs, where they are known.
        of: the kind of encoder that it is or has, a key of `ENCODERS`.
    """

    name: str
    holds: Literal["encoder", "all but the head", "all"]
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    unused: Mapping[str, str] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    outputs: tuple[str, ...] = ()
    of: Literal["SwinUNETR", "ViT", "U-Net of nnU-Net"] = "SwinUNETR"

    @property
    def encoder(self) -> Encoder:
        """The kind of encoder."""
        return ENCODERS[self.of]

    def fits(self, keys: Collection[str]) -> bool:
        """Whether a file with these keys is of this kind."""
        found = [any(re.fullmatch(text, key) for key in keys) for text in (*self.has, *self.lacks)]
        return all(found[: len(self.has)]) and not any(found[len(self.has) :])

    def group(self, key: str) -> str | None:
        """The group of unused tensors that a key is in."""
        return next((name for name, text in self.unused.items() if re.match(text, key)), None)

    def renamed(self, key: str) -> str:
        """MONAI's name for a key."""
        for text, replacement in self.renames:
            key = re.sub(text, replacement, key)
        return key


_OLD_RESIDUALS = {
    "residual convolutions of MONAI 0.8, never run": r"(backbone\.)?encoder(2|3|4|10)\.layer\.(conv|norm)3\."
}
"""MONAI 0.8 made them in blocks that do not use them (research-contributions, issue 367)."""

NEVER_RUN = "norms of a cross attention that is not there"
"""What newer MONAI has in each block of a ViT, also where nothing runs it; files of older ones have none."""

_UNUSED_NORMS = {NEVER_RUN: r"(vit\.)?blocks\.\d+\.norm_cross_attn\."}

LAYOUTS: tuple[Layout, ...] = (
    # supervised_clip_driven_universal_swin_unetr_2100.pth, supervised_suprem_swinunetr_2100.pth: `module.backbone.*`,
    # and heads that are computed from an embedding of each organ's name
    Layout(
        "universal model (CLIP-driven, SuPreM)",
        "all but the head",
        has=(r"backbone\.swinViT\.patch_embed\.proj\.weight", r"controller\.weight"),
        unused={
            **{
                name: rf"{name}\b" for name in ("precls_conv", "GAP", "controller", "organ_embedding", "text_to_vision")
            },
            "backbone.out": r"backbone\.out\.",
            **_OLD_RESIDUALS,
        },
        renames=((r"^backbone\.", ""),),
    ),
    # the same networks' backbone saved alone
    Layout(
        "backbone of a universal model (SuPreM)",
        "all but the head",
        has=(r"swinViT\.patch_embed\.proj\.weight", r"decoder1\..*"),
        lacks=(r"out\..*", r"classifier\..*"),
        unused=_OLD_RESIDUALS,
    ),
    # fseft.pth
    Layout(
        "foundation model of the few-shot paper (FSEFT)",
        "all",
        has=(r"swinViT\.patch_embed\.proj\.weight", r"classifier\.weight"),
        lacks=(r"out\..*",),
        unused=_OLD_RESIDUALS,
        renames=((r"^classifier\.", "out.conv.conv."),),
        outputs=FSEFT,
    ),
    # model_swinvit.pt: `module.layers1.0.blocks.0.mlp.fc1.weight`; what SwinUNETR/Pretrain writes:
    # `swin_vit.layers1.0.blocks.0.mlp.linear1.weight`
    Layout(
        "self-supervised SwinUNETR encoder (MONAI)",
        "encoder",
        has=(r"((swin_vit|swinViT)\.)?patch_embed\.proj\.weight", r"((swin_vit|swinViT)\.)?layers4\..*"),
        lacks=(r"decoder1\..*",),
        unused={
            "rotation_head": r"rotation_head\.",
            "contrastive_head": r"contrastive_head\.",
            "reconstruction": r"(convTrans3d|conv)\.",
            "norm": r"norm\.",
        },
        renames=(
            (r"^swin_vit\.", "swinViT."),
            (r"^(?=(patch_embed|layers\d)\b)", "swinViT."),
            (r"\.mlp\.fc([12])\.", r".mlp.linear\1."),
        ),
    ),
    # what `segraft pretrain --mae` writes
    Layout(
        "encoder of a masked auto-encoder",
        "encoder",
        of="ViT",
        has=(r"vit\.patch_embedding\.position_embeddings", r"mae_decoder\.mask_token"),
        unused={"mae_decoder": r"mae_decoder\.", **_UNUSED_NORMS},
    ),
    # `vit.*` of MONAI's UNETR
    Layout(
        "encoder of a UNETR",
        "encoder",
        of="ViT",
        has=(r"vit\.patch_embedding\.position_embeddings",),
        lacks=(r"(?!vit\.).*",),
        unused=_UNUSED_NORMS,
    ),
    # MONAI's ViT, and its ViTAutoEnc as the tutorial on self-supervised pre-training has it
    Layout(
        "vision transformer (MONAI)",
        "encoder",
        of="ViT",
        has=(r"patch_embedding\.position_embeddings", r"blocks\.0\..*"),
        lacks=(r"mask_tokens", r"(decoder|encoder|out)\w*\..*"),
        unused={
            "class token and head": r"cls_token$|classification_head\.",
            "reconstruction": r"conv3d_transpose(_1)?\.",
            **_UNUSED_NORMS,
        },
        renames=((r"^", "vit."),),
    ),
    # checkpoint_final.pth
    Layout(
        "nnU-Net v2",
        "all",
        of="U-Net of nnU-Net",
        has=(
            r"encoder\..*",
            r"decoder\.encoder\..*",
            r"decoder\.seg_layers\.0\.weight",
            r"decoder\.transpconvs\.0\.weight",
        ),
        unused={"heads of deep supervision": r"decoder\.seg_layers\."},
    ),
)
"""Kinds of checkpoints, of which the first that fits counts. Those of SwinUNETR were trained with MONAI before 1.5."""

OWN = Layout("", "all", has=(), unused=_OLD_RESIDUALS)
"""The network's own state dict, under its own keys: MONAI's SwinUNETR for BTCV too. It must fit to the last tensor."""


def recognise(keys: Collection[str]) -> Layout:
    """The kind of a file with these keys, without prefixes; `OWN` where none fits."""
    return next((layout for layout in LAYOUTS if layout.fits(keys)), OWN)


def known_labels(names: Sequence[str]) -> tuple[str, ...]:
    """Names of outputs, where one word of `KNOWN_LABELS` may stand for all."""
    return KNOWN_LABELS.get(names[0].casefold(), tuple(names)) if len(names) == 1 else tuple(names)
