"""Measuring a model on labelled cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from segraft.data.checks import check_cases, load_case
from segraft.data.cohort import Case
from segraft.errors import SegraftError
from segraft.evaluation.results import CaseResult, evaluate_case, save_results
from segraft.jobs.cases import choose, read_cohort
from segraft.jobs.model import Model, load_model
from segraft.jobs.run_folder import versions
from segraft.jobs.watching import watched


@dataclass(frozen=True)
class Evaluated:
    """Result of `evaluate`."""

    results: list[CaseResult]
    csv: Path
    json: Path
    notes: tuple[str, ...]


def evaluate(
    model: Model | str | Path,
    data: str | Path,
    *,
    out: str | Path | None = None,
    labels: Sequence[str] = (),
    cases: int | Sequence[str] | None = None,
    seed: int = 0,
    base: str | Path | None = None,
    patient_pattern: str | None = None,
    device: str = "auto",
    precision: str = "32",
    console: Console | None = None,
) -> Evaluated:
    """Dice and 95 % Hausdorff distance of every case and label, on the scans' own grids.

    Cases that trained the adapter never serve; cases that trained the base only where there are no others.

    Args:
        model: an adapter file, a base, or a loaded model.
        data: `dataset.json`, or its folder.
        out: folder for `evaluation.csv` and `evaluation.json`; None means beside the model's file.
        labels: the cohort's labels that the model's outputs stand for, in order; none means those of the same value.
        cases: patients to draw, or ids of cases; None means all that may serve.
        seed: of that draw.
        base: where the base is, if it is no longer where it was.
        patient_pattern: regular expression whose first group, searched in a case's id, is the patient.
        device: `auto`, `cpu`, `cuda`, `mps`.
        precision: `32`, `bf16`, `16`.
        console: for progress; None is silent.

    Raises:
        SegraftError: bad input of any kind; nothing is written then.
    """
    if not isinstance(model, Model):
        model = load_model(model, base=base)
    cohort = read_cohort(data, patient_pattern, model.adapted_on, model.pretrained_on)
    asked = cohort.select_labels(labels or [str(value) for value in model.labels])
    if len(asked) != len(model.labels):
        raise SegraftError(f"{model.source} has {len(model.labels)} labels, but {len(asked)} were asked for.")
    model = replace(model, labels=asked)
    chosen = choose(
        cohort,
        cases,
        seed=seed,
        never=model.adapted_on,
        avoid=model.pretrained_on,
        purpose="to evaluate on",
        console=console,
    )
    check_cases(chosen.cases, cohort, asked, each_present=False, watch=watched("checking scans", console))
    results: list[CaseResult] = []
    for case in watched("evaluating", console)(chosen.cases):
        prediction, _ = model.segment(case.image, device=device, precision=precision)
        results += measure(case, prediction, asked)
    record = {
        "model": str(model.source.name),
        "dataset": cohort.name,
        "cases": [case.id for case in chosen.cases],
        "notes": list(chosen.notes),
        "versions": versions(),
    }
    csv, json = save_results(results, Path(out) if out is not None else model.source.parent, record=record)
    return Evaluated(results, csv, json, chosen.notes)


def measure(case: Case, prediction: NDArray[np.int64], labels: Mapping[int, str]) -> list[CaseResult]:
    """Hold a label map on the scan's own grid against the case's label, of which only `labels` count."""
    image, label = load_case(case)
    truth = np.asanyarray(label.dataobj)
    kept = np.where(np.isin(truth, list(labels)), truth, 0).astype(np.int64)
    return evaluate_case(case.id, prediction, kept, labels, image.affine)
