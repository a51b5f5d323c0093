"""`segraft pretrain` and `segraft adapt`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segraft.allocation import keep_freed_memory
from segraft.cli import options
from segraft.cli.app import err, json_object, one_line, progress_console, show_json, show_line, show_notes, split
from segraft.cli.options import TRAINING, Common, Data, Fold, Labels, NetworkArguments, OutFolder, PatientPattern, takes
from segraft.errors import SegraftError

if TYPE_CHECKING:
    from segraft.adapters import AdapterSpec

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result that is there.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on after the last finished epoch, exactly.")]


def _settle_memory(training: Mapping[str, Any]) -> None:
    """Trade memory for time, unless the user trades the other way: who recomputes activations is short of memory."""
    if not training.get("recompute"):
        keep_freed_memory()


@contextmanager
def _first_process_reports() -> Iterator[None]:
    """Of the processes that train together all but the first end here: they show no result, and an error as text."""
    from segraft.training.distributed import is_first_process

    try:
        yield
    except SegraftError as error:
        if is_first_process():
            raise
        err.print(f"segraft: {one_line(str(error))}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    if not is_first_process():
        raise typer.Exit


@takes(training=options.training, preparation=options.preparation, common=options.common)
def pretrain(
    *,
    data: Data,
    out: OutFolder,
    network: Annotated[
        str | None,
        typer.Option(
            help="unet, unet3d, multi_view_unet, swin_unetr, or package.module:Class [unet3d]; with --mae vit_small, "
            "vit_base or vit_large [vit_base]."
        ),
    ] = None,
    network_args: NetworkArguments = None,
    weights: Annotated[Path | None, typer.Option(help="Weights to start from (.safetensors, .pt).")] = None,
    mae: Annotated[
        bool,
        typer.Option(
            "--mae",
            help="Without labels: an encoder alone, as a masked auto-encoder of scans of one channel; labels are not "
            "looked at.",
        ),
    ] = False,
    mask: Annotated[
        float | None,
        typer.Option(help="With --mae: share of the patches that are masked [0.75].", rich_help_panel=TRAINING),
    ] = None,
    warm_up: Annotated[
        float | None,
        typer.Option(
            help="With --mae: share of the steps in which the learning rate rises [0.05].", rich_help_panel=TRAINING
        ),
    ] = None,
    labels: Labels = None,
    cases: Annotated[int | None, typer.Option(help="Patients to draw; all, if left out.")] = None,
    patient_pattern: PatientPattern = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    training: dict[str, Any],
    preparation: dict[str, Any],
    common: Common,
) -> None:
    """Train a base network on a cohort, all its weights; or, with --mae, an encoder on scans without labels.

    Example: `segraft pretrain --data D/dataset.json --labels 1 --network unet3d --out base`

    Example: `segraft pretrain --mae --network vit_base --data unlabelled.json --patch 128 128 48 --out encoder`
    """
    _settle_memory(training)
    chosen: dict[str, Any] = {
        "network_arguments": json_object(network_args, "--network-args"),
        "weights": weights,
        "cases": cases,
        "preparation": preparation,
        "patient_pattern": patient_pattern,
        "resume": resume,
        "overwrite": overwrite,
        "console": progress_console(as_json=common.as_json),
    }
    of_masking = {"mask": mask, "warm_up": warm_up}
    given = training | common.computing() | {"seed": common.seed}
    if mae:
        if labels:
            raise SegraftError("--mae does not look at labels: leave --labels out.")
        _pretrain_masked(data, out, network or "vit_base", given | _said(of_masking), chosen, as_json=common.as_json)
        return
    for name in _said(of_masking):
        raise SegraftError(f"--{name.replace('_', '-')} goes with --mae: leave it out, or add --mae.")
    _pretrain(data, out, network or "unet3d", split(labels), given, chosen, as_json=common.as_json)


def _pretrain(
    data: Path,
    out: Path,
    network: str,
    labels: tuple[str, ...],
    training: Mapping[str, Any],
    chosen: Mapping[str, Any],
    *,
    as_json: bool,
) -> None:
    from segraft.jobs import pretrain as job
    from segraft.training.settings import check_settings

    with _first_process_reports():
        result = job(data, out, network=network, labels=labels, settings=check_settings(**training), **chosen)
    if as_json:
        show_json(asdict(result))
        return
    show_notes(result.notes)
    show_line(
        f"{result.path}: {', '.join(result.labels.values())}, {result.parameters:,} parameters, "
        f"{len(result.cases)} cases, {result.training.summary()}, fingerprint {result.fingerprint[:16]}"
    )


def _pretrain_masked(
    data: Path, out: Path, network: str, training: Mapping[str, Any], chosen: Mapping[str, Any], *, as_json: bool
) -> None:
    from segraft.jobs.masked_pretraining import pretrain_masked as job
    from segraft.training.mae import check_masked_settings

    with _first_process_reports():
        result = job(data, out, network=network, settings=check_masked_settings(**training), **chosen)
    if as_json:
        show_json(asdict(result))
        return
    show_notes(result.notes)
    sizes, made = "×".join(map(str, result.img_size)), result.reconstruction
    show_line(
        f"{result.path}: encoder of {sizes} voxels, {result.parameters:,} parameters, {len(result.cases)} scans, "
        f"{result.training.summary()}, fingerprint {result.fingerprint[:16]}"
    )
    show_line(
        f"{result.figure}: squared error over masked patches in the middle of {made.scans} scans {made.after:.3f} "
        f"(untrained {made.before:.3f}, of predicting each patch's mean {made.zero:.3f}, of what is at its place in "
        f"other scans {made.place:.3f})"
    )


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the user gave."""
    return {name: value for name, value in values.items() if value is not None}


@takes(spec=options.adapter, training=options.training, preparation=options.preparation, common=options.common)
def adapt(
    *,
    base: Annotated[
        str,
        typer.Option(
            help="Folder of `segraft pretrain`; nnunet:FOLDER or monai:BUNDLE; or, with --weights, a network."
        ),
    ],
    data: Data,
    out: OutFolder,
    weights: Annotated[Path | None, typer.Option(help="Weights of the network that --base names.")] = None,
    fold: Fold = None,
    network_args: NetworkArguments = None,
    base_labels: Annotated[
        list[str] | None,
        typer.Option(
            help="What the outputs of the base stand for, in order (of --weights also btcv), where it does not say, or "
            "names them otherwise than your data."
        ),
    ] = None,
    new_labels: Annotated[
        list[str] | None,
        typer.Option(help="Labels whose outputs start new although the base has outputs for them; or all."),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="Let the first layers take other channels than the base's: those of the same name keep their weights; "
            "how others start: share (what the base's other channels had), zero, or mean."
        ),
    ] = None,
    base_channels: Annotated[
        list[str] | None, typer.Option(help="What the channels of the base are, in order, where it does not say.")
    ] = None,
    labels: Labels = None,
    shots: Annotated[int | None, typer.Option(help="Patients to draw; all, if left out.")] = None,
    patient_pattern: PatientPattern = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    spec: "AdapterSpec",
    training: dict[str, Any],
    preparation: dict[str, Any],
    common: Common,
) -> None:
    """Adapt a base to a new task from a few labelled scans; the result is one small file.

    Example: `segraft adapt --base base --data D/dataset.json --labels 2 --shots 10 --method dora_c --rank 8 --out run`
    """
    from segraft.jobs import adapt as job
    from segraft.jobs.adapting import adapting_settings
    from segraft.jobs.base_source import BaseSource

    _settle_memory(training)
    with _first_process_reports():
        result = job(
            BaseSource(
                base,
                weights,
                json_object(network_args, "--network-args"),
                split(base_labels),
                fold,
                split(new_labels),
                inputs,
                split(base_channels),
            ),
            data,
            out,
            spec=spec,
            labels=split(labels),
            shots=shots,
            preparation=preparation,
            settings=adapting_settings(**training, **common.computing(), seed=common.seed),
            patient_pattern=patient_pattern,
            resume=resume,
            overwrite=overwrite,
            console=progress_console(as_json=common.as_json),
        )
    if common.as_json:
        show_json(asdict(result) | {"parameters": result.parameters.to_dict()})
        return
    show_notes(result.notes)
    show_line(
        f"{result.path}: {', '.join(result.labels.values())}, {result.parameters.trainable:,} trained parameters "
        f"({result.bytes / 1000:,.0f} kB), {len(result.cases)} cases, {result.training.summary()}"
    )
