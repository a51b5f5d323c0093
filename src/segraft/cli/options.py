"""Groups of options that several commands take, each written once.

A group is a function: its parameters are the options, its result is what the command is given under the group's name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segraft.errors import SegraftError

if TYPE_CHECKING:
    from segraft.adapters import AdapterSpec

COMMON, TRAINING, SCANS, ADAPTER = "Common options", "Training", "Preparation of scans", "Adapter"


def takes(**groups: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take the options of these groups in place of the parameters of their names."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [each for each in signature(command).parameters.values() if each.name not in groups]
        options = {name: list(signature(group).parameters.values()) for name, group in groups.items()}

        def run(**values: Any) -> None:
            made = {
                name: group(**{each.name: values.pop(each.name) for each in options[name]})
                for name, group in groups.items()
            }
            command(**values, **made)

        together = [*own, *(each for group in options.values() for each in group)]
        together = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in together]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {each.name: each.annotation for each in together} | {"return": None}
        run.__dict__["__signature__"] = Signature(together)
        return run

    return decorate


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Precision(StrEnum):
    """Of the computation; adapters are composed in float32 always."""

    full = "32"
    bf16 = "bf16"
    half = "16"


class ChannelGrids(StrEnum):
    """What to do with channels on other grids than their scan's first."""

    refuse = "refuse"
    resample = "resample"


class MaskFormat(StrEnum):
    """Of masks that are written."""

    nifti = "nifti"
    dicom_seg = "dicom-seg"


class Schedule(StrEnum):
    """Of the learning rate."""

    cosine = "cosine"
    onecycle = "onecycle"
    constant = "constant"


Trust = Annotated[
    list[str] | None,
    typer.Option(
        help="Package whose networks are built where files name them, as its code then runs; repeat for several "
        "[SEGRAFT_TRUST].",
        metavar="PACKAGE",
        rich_help_panel=COMMON,
    ),
]


def vouch(packages: list[str] | None) -> None:
    """Trust these packages in this process and those that it starts.

    Raises:
        SegraftError: one is no package's name.
    """
    if packages:
        from segraft.networks import trust

        trust(*packages)


@dataclass(frozen=True)
class Common:
    """Options that every command takes, so that a script can pass one set of options to all.

    A command that has nothing random (or computes nothing) does not depend on them.
    """

    seed: int
    device: str
    precision: str
    as_json: bool

    def computing(self) -> dict[str, Any]:
        """Those that say where and how to compute."""
        return {"device": self.device, "precision": self.precision}


def common(
    seed: Annotated[int, typer.Option(min=0, help="Of every random choice.", rich_help_panel=COMMON)] = 0,
    device: Annotated[Device, typer.Option(help="Where to compute.", rich_help_panel=COMMON)] = Device.auto,
    precision: Annotated[
        Precision, typer.Option(help="32, or mixed precision bf16 or 16.", rich_help_panel=COMMON)
    ] = Precision.full,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.", rich_help_panel=COMMON)
    ] = False,
    trust: Trust = None,
) -> Common:
    """Seed, device, precision, JSON; and packages to trust, which hold for the whole process."""
    vouch(trust)
    return Common(seed, device.value, precision.value, as_json)


def training(
    epochs: Annotated[int | None, typer.Option(help="Passes over the cases [100].", rich_help_panel=TRAINING)] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="The highest one [adapt: 0.003, pretrain: 0.001].", rich_help_panel=TRAINING),
    ] = None,
    schedule: Annotated[
        Schedule | None, typer.Option(help="Of the learning rate [cosine].", rich_help_panel=TRAINING)
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW [0].", rich_help_panel=TRAINING)] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="dice_ce, or overlap (the haemorrhage paper's) [dice_ce].", rich_help_panel=TRAINING),
    ] = None,
    volumes: Annotated[int | None, typer.Option(help="Scans per step [2].", rich_help_panel=TRAINING)] = None,
    patches: Annotated[
        int | None, typer.Option(help="Patches per scan and step [2].", rich_help_panel=TRAINING)
    ] = None,
    patches_at_once: Annotated[
        int | None,
        typer.Option(
            help="Patches that go through the network together, where a step's do not fit the memory; their gradients "
            "add up [all].",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    foreground: Annotated[
        float | None, typer.Option(help="Share of patches centred on a label [0.5].", rich_help_panel=TRAINING)
    ] = None,
    contrast_copies: Annotated[
        int | None,
        typer.Option(
            help="Copies of each patch at other contrasts that count in the loss too (the haemorrhage paper's mixed "
            "loss); each makes a step as much longer [0].",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    augmentation: Annotated[
        str | None,
        typer.Option(
            help="none, standard (flips, turns, zooms, contrast) or elastic (flips, elastic deformation, contrast: the "
            "haemorrhage paper's) [standard].",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(help="Mirror left and right [yes]; not for labels with a side.", rich_help_panel=TRAINING),
    ] = None,
    stop_when_converged: Annotated[
        bool | None,
        typer.Option(
            "--stop-when-converged/--all-epochs",
            help="Stop when the training loss gained no more than 1 % in 20 epochs [adapt: yes, but not "
            "with onecycle; pretrain: no].",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    recompute: Annotated[
        list[str] | None,
        typer.Option(
            help="Parts, or regular expressions on module names, whose activations are recomputed in the backward "
            "pass: less memory, more time, the same result; repeat for several [none].",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            help="Processes that share every step on each machine, one per GPU: less time, the same result to "
            "rounding; they divide --volumes [1].",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(help="Machines that share every step, started by torchrun or srun [1].", rich_help_panel=TRAINING),
    ] = None,
) -> dict[str, Any]:
    """Fields of `TrainingSettings`, only those the user said; the defaults are its own."""
    said: dict[str, Any] = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "schedule": None if schedule is None else schedule.value,
        "weight_decay": weight_decay,
        "loss": loss,
        "volumes": volumes,
        "patches": patches,
        "patches_at_once": patches_at_once,
        "foreground": foreground,
        "contrast_copies": contrast_copies,
        "augmentation": augmentation,
        "flip": flip,
        "stop_when_converged": stop_when_converged,
        "recompute": tuple(recompute) if recompute else None,
        "devices": devices,
        "nodes": nodes,
    }
    return {name: value for name, value in said.items() if value is not None}


def preparation(
    head: Annotated[
        bool | None,
        typer.Option(
            "--head/--no-head",
            help="Head CT in HU: level it, remove the neck, crop or pad to 512×512 [no].",
            rich_help_panel=SCANS,
        ),
    ] = None,
    patch: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Voxels seen at once; Z = 1 for slices. From the data, if left out.", rich_help_panel=SCANS),
    ] = None,
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Voxel size in mm to resample to. Each scan's own, if left out.", rich_help_panel=SCANS),
    ] = None,
    channel_grids: Annotated[
        ChannelGrids | None,
        typer.Option(
            help="Channels of a scan on another grid than its first: refuse or resample them [refuse].",
            rich_help_panel=SCANS,
        ),
    ] = None,
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Intensities that become 0 and 1, such as -175 250 (HU).", rich_help_panel=SCANS),
    ] = None,
    percentiles: Annotated[
        tuple[float, float] | None,
        typer.Option(help="The same by the percentiles of each volume and channel [0.5 99.5].", rich_help_panel=SCANS),
    ] = None,
    intensity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHANNEL=KIND:LOW:HIGH",
            help="The same for one channel, by its name or its place from 0: ADC=window:0:3000 or "
            "T1=percentiles:0.5:99.5, or T1=z_score; repeat for others, * is all. The rest are as --window or "
            "--percentiles say.",
            rich_help_panel=SCANS,
        ),
    ] = None,
    orientation: Annotated[str | None, typer.Option(help="Axis directions [RAS].", rich_help_panel=SCANS)] = None,
    crop_foreground: Annotated[
        bool | None, typer.Option(help="Crop to what is above 0 [no].", rich_help_panel=SCANS)
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(
            help="Of neighbouring patches when a scan is segmented, from 0 to below 1 [0.5].", rich_help_panel=SCANS
        ),
    ] = None,
) -> dict[str, Any]:
    """Fields of `Preparation`, only those the user said."""
    if window and percentiles:
        raise SegraftError("--window and --percentiles exclude each other: give one.")
    everywhere: dict[str, Any] | None = None
    if window:
        everywhere = {"kind": "window", "low": window[0], "high": window[1]}
    if percentiles:
        everywhere = {"kind": "percentiles", "lower": percentiles[0], "upper": percentiles[1]}
    if intensity:
        everywhere = _intensities(intensity, everywhere)
    said: Mapping[str, Any] = {
        "head": head,
        "patch": patch,
        "spacing": spacing,
        "channel_grids": None if channel_grids is None else channel_grids.value,
        "intensity": everywhere,
        "orientation": orientation,
        "crop_foreground": crop_foreground,
        "overlap": overlap,
    }
    return {name: value for name, value in said.items() if value is not None}


_INTENSITIES = {"window": ("low", "high"), "percentiles": ("lower", "upper"), "z_score": ()}


def _intensities(texts: list[str], others: dict[str, Any] | None) -> dict[str, Any]:
    """Channel -> setting, of CHANNEL=KIND:LOW:HIGH; "*" are the others."""
    found: dict[str, Any] = {} if others is None else {"*": others}
    for text in texts:
        channel, equals, setting = text.rpartition("=")
        channel, (kind, *ends) = channel.strip(), setting.split(":")
        names = _INTENSITIES.get(kind.strip())
        try:
            values = [float(end) for end in ends]
        except ValueError:
            values = []
        if not (equals and channel and names is not None and len(values) == len(ends) == len(names)):
            raise SegraftError(
                f'--intensity "{text}" is not CHANNEL=KIND:LOW:HIGH: write it as --intensity ADC=window:0:3000 or '
                "--intensity T1=percentiles:0.5:99.5."
            )
        if channel in found:
            raise SegraftError(f"--intensity {channel} is given twice: give one for each channel.")
        found[channel] = {"kind": kind.strip(), **dict(zip(names, values, strict=True))}
    return found


def adapter(
    method: Annotated[str, typer.Option(help="Adapter method, or none.", rich_help_panel=ADAPTER)] = "dora_c",
    rank: Annotated[int, typer.Option(help="R; of arena and ada_lora at the start.", rich_help_panel=ADAPTER)] = 8,
    alpha: Annotated[float | None, typer.Option(help="α [2·R; arena, ada_lora: 1].", rich_help_panel=ADAPTER)] = None,
    rank_control: Annotated[
        str | None,
        typer.Option(
            help="How arena or ada_lora control the rank, where it differs from their papers, as a JSON object: of "
            "arena penalty (λ) and step (ρ); of ada_lora target, warm_up, settled, every, smoothing, uncertainty, "
            "orthogonality.",
            rich_help_panel=ADAPTER,
        ),
    ] = None,
    bias: Annotated[str, typer.Option(help="frozen, low_rank or train.", rich_help_panel=ADAPTER)] = "frozen",
    targets: Annotated[
        list[str] | None,
        typer.Option(
            help="Parts, attention projections (query, key, value) where the network names them, or regular "
            "expressions on layer names; all layers, if left out (arena: key and value).",
            rich_help_panel=ADAPTER,
        ),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="The same, left out.", rich_help_panel=ADAPTER)] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(
            help="Trained whole: none, head, bitfit, affine, bitfit_encoder, affine_encoder, decoder, encoder, full (or"
            " all); of a multi_view_unet also shallow, deep, encoding, decoding; or a part, or an expression.",
            rich_help_panel=ADAPTER,
        ),
    ] = None,
) -> "AdapterSpec":
    """The spec of an adapter."""
    from segraft.adapters import AdapterSpec
    from segraft.cli.app import json_object
    from segraft.training.strategies import selectors

    return AdapterSpec(
        method,
        rank=rank,
        alpha=alpha,
        control=json_object(rank_control, "--rank-control") or None,
        bias=bias,  # type: ignore[arg-type]  # AdapterSpec checks it
        targets=targets or None,
        exclude=exclude or (),
        train=selectors(train or ()),
    )


Data = Annotated[Path, typer.Option(help="dataset.json, a folder of TotalSegmentator or FLARE'22, or a .txt list.")]
OutFolder = Annotated[Path, typer.Option("-o", "--out", help="Folder to write to.")]
Network = Annotated[str, typer.Option(help="unet, unet3d, multi_view_unet, swin_unetr, or package.module:Class.")]
NetworkArguments = Annotated[str | None, typer.Option(help="Keyword arguments of the network, as a JSON object.")]
BasePath = Annotated[Path | None, typer.Option(help="Where the base is, if it was moved.")]
ModelPath = Annotated[
    Path, typer.Argument(help="Adapter file (or base file), or the folder it is in; or a network of another tool.")
]
Fold = Annotated[str | None, typer.Option(help="Of a network of another tool that has several, such as nnunet:… [0].")]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        help="Labels, by number or name; repeat or separate by commas. Regions that may overlap as NAME=1+2+3, those "
        "that lie above later: WT=1+2+3,TC=2+3,ET=3. All, if left out."
    ),
]
PatientPattern = Annotated[
    str | None,
    typer.Option(help="Regular expression; its first group, searched in a case's id, is the patient."),
]
