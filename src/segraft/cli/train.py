"""`segraft pretrain` and `segraft adapt`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segraft.allocation import keep_freed_memory
from segraft.cli import options
from segraft.cli.app import err, json_object, progress_console, show_json, show_line, show_notes, split
from segraft.cli.options import Common, Data, Labels, Network, NetworkArguments, OutFolder, PatientPattern, takes
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
        err.print(f"segraft: {' '.join(str(error).split())}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    if not is_first_process():
        raise typer.Exit


@takes(training=options.training, preparation=options.preparation, common=options.common)
def pretrain(
    *,
    data: Data,
    out: OutFolder,
    network: Network = "unet3d",
    network_args: NetworkArguments = None,
    weights: Annotated[Path | None, typer.Option(help="Weights to start from (.safetensors, .pt).")] = None,
    labels: Labels = None,
    cases: Annotated[int | None, typer.Option(help="Patients to draw; all, if left out.")] = None,
    patient_pattern: PatientPattern = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    training: dict[str, Any],
    preparation: dict[str, Any],
    common: Common,
) -> None:
    """Train a base network on a cohort, all its weights.

    Example: `segraft pretrain --data D/dataset.json --labels 1 --network unet3d --out base`
    """
    from segraft.jobs import pretrain as job
    from segraft.training.settings import check_settings

    _settle_memory(training)
    with _first_process_reports():
        result = job(
            data,
            out,
            network=network,
            network_arguments=json_object(network_args, "--network-args"),
            weights=weights,
            labels=split(labels),
            cases=cases,
            preparation=preparation,
            settings=check_settings(**training, **common.computing(), seed=common.seed),
            patient_pattern=patient_pattern,
            resume=resume,
            overwrite=overwrite,
            console=progress_console(as_json=common.as_json),
        )
    if common.as_json:
        show_json(asdict(result))
        return
    show_notes(result.notes)
    show_line(
        f"{result.path}: {', '.join(result.labels.values())}, {result.parameters:,} parameters, "
        f"{len(result.cases)} cases, {result.training.summary()}, fingerprint {result.fingerprint[:16]}"
    )


@takes(spec=options.adapter, training=options.training, preparation=options.preparation, common=options.common)
def adapt(
    *,
    base: Annotated[str, typer.Option(help="Folder of `segraft pretrain`; or, with --weights, a network.")],
    data: Data,
    out: OutFolder,
    weights: Annotated[Path | None, typer.Option(help="Weights of the network that --base names.")] = None,
    network_args: NetworkArguments = None,
    base_labels: Annotated[
        list[str] | None,
        typer.Option(help="What the outputs of --weights stand for, in order, or btcv; where they do not say."),
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
    from segraft.jobs.adapting import ADAPTING, BaseSource
    from segraft.training.settings import check_settings

    _settle_memory(training)
    with _first_process_reports():
        result = job(
            BaseSource(base, weights, json_object(network_args, "--network-args"), split(base_labels)),
            data,
            out,
            spec=spec,
            labels=split(labels),
            shots=shots,
            preparation=preparation,
            settings=check_settings(**ADAPTING | training, **common.computing(), seed=common.seed),
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
