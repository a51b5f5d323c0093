"""`segraft prepare`: how scans are prepared, in a picture."""

from pathlib import Path
from typing import Annotated, Any

import typer

from segraft.cli import options
from segraft.cli.app import show_json, show_line, show_table, split
from segraft.cli.options import Common, Data, Labels, PatientPattern, takes


@takes(preparation=options.preparation, common=options.common)
def prepare(
    *,
    data: Data,
    show: Annotated[Path, typer.Option(help="Picture (.png) of every step of one case.")],
    case: Annotated[str | None, typer.Option(help="Its id; the first case, if left out.")] = None,
    labels: Labels = None,
    patient_pattern: PatientPattern = None,
    preparation: dict[str, Any],
    common: Common,
) -> None:
    """Draw what preparation does to a case, step by step, before any training.

    Example: `segraft prepare --data D/dataset.json --head --window 0 90 --show steps.png`
    """
    from segraft.jobs.prepare_view import show_preparation

    view = show_preparation(
        data, show, case=case, labels=split(labels), preparation=preparation, patient_pattern=patient_pattern
    )
    if common.as_json:
        steps = [
            {"name": step.name, "shape": step.image.shape, "voxel_mm": step.voxel_mm, "unit": step.unit}
            for step in view.steps
        ]
        turned = {"yaw": view.yaw, "roll": view.roll, "neck_slices": view.neck_slices}
        show_json({"picture": view.path, "case": view.case, "steps": steps, **turned})
        return
    show_table(f"Preparation of {view.case}", ["step", "grid"], ([step.name, step.size] for step in view.steps))
    if view.yaw is not None:
        show_line(f"The head had turned by {view.yaw:.1f}° and leaned by {view.roll:.1f}°.")
    show_line(str(view.path))
