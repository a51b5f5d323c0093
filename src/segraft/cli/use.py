"""`segraft predict`, `segraft evaluate` and `segraft demo`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from segraft.allocation import keep_freed_memory
from segraft.cli import options
from segraft.cli.app import err, progress_console, show_frame, show_json, show_line, show_notes, show_table, split
from segraft.cli.options import (
    BasePath,
    Common,
    Data,
    Fold,
    Labels,
    MaskFormat,
    ModelPath,
    OutFolder,
    PatientPattern,
    takes,
)
from segraft.errors import SegraftError


@takes(common=options.common)
def predict(
    *,
    model: ModelPath,
    scans: Annotated[
        list[Path] | None,
        typer.Argument(
            help="NIfTI files, DICOM series, or folders of them. Of several channels: 4D files, or numbered ones "
            "(case_0000.nii.gz, case_0001.nii.gz), of which the first is enough."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Mask file for one scan, else a folder.")],
    channel: Annotated[
        list[str] | None,
        typer.Option(
            help="A channel of one scan, in place of SCANS, as NAME=FILE (or a DICOM series); repeat for each. Names "
            "are those of the data that it was trained on."
        ),
    ] = None,
    mask_format: Annotated[
        MaskFormat | None,
        typer.Option(
            "--format",
            help="Of the masks: nifti, or dicom-seg for scans that are DICOM series [as --out ends, else nifti].",
        ),
    ] = None,
    base: BasePath = None,
    fold: Fold = None,
    common: Common,
) -> None:
    """Segment scans; each mask has its scan's own grid, affine and orientation (of several channels, the first's).

    Example: `segraft predict run/adapter.safetensors scan.nii.gz -o mask.nii.gz`

    DICOM in and out: `segraft predict run/adapter.safetensors ct_series/ -o result.dcm`

    Of several channels: `segraft predict run --channel FLAIR=flair.nii.gz --channel T1=t1.nii.gz -o mask.nii.gz`
    """
    from segraft.exchange.opening import scheme_of
    from segraft.jobs import load_model
    from segraft.jobs import predict as job

    keep_freed_memory()
    opened = load_model(str(model), fold=fold) if scheme_of(model) else None
    show_notes(opened.notes if opened else ())
    console = progress_console(as_json=common.as_json)
    results = job(
        opened or model,
        scans or (),
        out,
        mask_format=None if mask_format is None else mask_format.value,
        channels=_named(channel),
        base=base,
        fold=fold,
        **common.computing(),
        console=console,
    )
    if common.as_json:
        show_json({"masks": [asdict(result) for result in results]})
        return
    show_table(
        "Masks",
        ["scan", "mask", *(f"{name} (mL)" for name in results[0].volumes_ml)],
        ([each.scan.name, str(each.mask), *(f"{ml:.2f}" for ml in each.volumes_ml.values())] for each in results),
        right=len(results[0].volumes_ml),
    )


def _named(channels: list[str] | None) -> dict[str, str] | None:
    """NAME=FILE of each channel."""
    found: dict[str, str] = {}
    for each in channels or ():
        name, equals, file = each.partition("=")
        if not (name.strip() and equals and file):
            raise SegraftError(f'--channel "{each}" is not NAME=FILE: write it as --channel FLAIR=flair.nii.gz.')
        if name.strip() in found:
            raise SegraftError(f"--channel {name.strip()} is given twice: give one file for each channel.")
        found[name.strip()] = file
    return found or None


@takes(common=options.common)
def evaluate(
    *,
    model: ModelPath,
    data: Data,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for the CSV and JSON; beside the model, if left out.")
    ] = None,
    labels: Labels = None,
    cases: Annotated[int | None, typer.Option(help="Patients to draw; all that may serve, if left out.")] = None,
    base: BasePath = None,
    fold: Fold = None,
    patient_pattern: PatientPattern = None,
    common: Common,
) -> None:
    """Dice and 95 % Hausdorff distance on labelled cases that did not train the model.

    Example: `segraft evaluate run/adapter.safetensors --data D/dataset.json`
    """
    from segraft.evaluation.results import readable, summary, table
    from segraft.jobs import evaluate as job

    keep_freed_memory()
    result = job(
        model,
        data,
        out=out,
        labels=split(labels),
        cases=cases,
        seed=common.seed,
        base=base,
        fold=fold,
        patient_pattern=patient_pattern,
        **common.computing(),
        console=progress_console(as_json=common.as_json),
    )
    if common.as_json:
        print(result.json.read_text(encoding="utf-8"))  # noqa: T201
        return
    show_notes(result.notes)
    show_frame(readable(table(result.results).drop(columns="label")), "Cases")
    show_frame(readable(summary(result.results)), "Summary")
    show_line(f"{result.csv}\n{result.json}")


@takes(common=options.common)
def demo(*, out: OutFolder = Path("demo"), common: Common) -> None:
    """The whole job on synthetic head CTs: pre-train, adapt, evaluate, report.

    Example: `segraft demo --out demo`
    """
    from segraft.jobs.demo import demo as job

    keep_freed_memory()
    result = job(out, seed=common.seed, **common.computing(), console=None if common.as_json else err)
    if common.as_json:
        show_json(asdict(result) | {"table": result.table.to_dict("records")})
        return
    show_frame(result.table, result.title)
    show_line(f"Report: {result.report}")
