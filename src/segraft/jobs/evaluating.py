"""Measuring a model on labelled cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from segraft.data.checks import check_cases, load_case
from segraft.data.cohort import Case, Cohort
from segraft.data.labels import Labels
from segraft.data.nifti import same_grid
from segraft.data.scan_preparation import ScanPreparation
from segraft.errors import SegraftError
from segraft.evaluation.metrics import spacing_of, volume_ml
from segraft.evaluation.results import CaseResult, CaseVolumes, evaluate_planes, save_results
from segraft.exchange.opening import scheme_of
from segraft.jobs.cases import choose, read_cohort
from segraft.jobs.model import Model, Segmentation, load_model
from segraft.jobs.preparing import takes_missing_channels
from segraft.jobs.run_folder import versions
from segraft.jobs.watching import watched
from segraft.structures import same_name


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
    fold: str | None = None,
    preparation: ScanPreparation | None = None,
    patient_pattern: str | None = None,
    device: str = "auto",
    precision: str = "32",
    console: Console | None = None,
) -> Evaluated:
    """Dice and 95 % Hausdorff distance of every case and label, on the scans' own grids.

    Cases that trained the adapter never serve; cases that trained the base only where there are no others.

    Args:
        model: an adapter file, a base, a network of another tool (`nnunet:path`), or a loaded model.
        data: `dataset.json`, or its folder.
        out: folder for `evaluation.csv` and `evaluation.json`; None means beside the model's file.
        labels: the cohort's labels that the model's outputs stand for, in order; or fewer, of the same names as some
            of its outputs. None means those of the same value, or where these have other names, or are not all there,
            those of the same name. Where they are regions, those of the same names, or else the model's own.
        cases: patients to draw, or ids of cases; None means all that may serve.
        seed: of that draw.
        base: where the base is, if it is no longer where it was.
        fold: of a network of another tool that has several.
        preparation: of the scans, for a base that does not say how they are prepared.
        patient_pattern: regular expression whose first group, searched in a case's id, is the patient.
        device: `auto`, `cpu`, `cuda`, `mps`.
        precision: `32`, `bf16`, `16`.
        console: for progress; None is silent.

    Raises:
        SegraftError: bad input of any kind; nothing is written then.
    """
    if not isinstance(model, Model):
        if out is None and scheme_of(model):
            raise SegraftError(f"{model} is a folder of another tool: say where the results shall be, with --out.")
        model = load_model(model, base=base, fold=fold, preparation=preparation)
    cohort = read_cohort(data, patient_pattern, model.adapted_on, model.pretrained_on)
    model, notes = on_cohort(model, cohort, labels)
    asked = model.labels
    chosen = choose(
        cohort,
        cases,
        seed=seed,
        never=model.adapted_on,
        avoid=model.pretrained_on,
        purpose="to evaluate on",
        console=console,
    )
    checking = watched("checking scans", console)
    complete = not takes_missing_channels(model.net)
    check_cases(chosen.cases, cohort, asked, each_present=False, complete=complete, watch=checking)
    results: list[CaseResult] = []
    together: list[CaseVolumes] = []
    for case in watched("evaluating", console)(chosen.cases):
        measured = measure(case, model.segment(case, device=device, precision=precision), asked)
        results += measured.labels
        together += measured.together
    record = {
        "model": str(model.source.name),
        "dataset": cohort.name,
        "cases": [case.id for case in chosen.cases],
        "notes": [*notes, *chosen.notes],
        "versions": versions(),
    }
    folder = Path(out) if out is not None else model.source.parent
    csv, json = save_results(results, folder, together=together, record=record)
    return Evaluated(results, csv, json, (*notes, *chosen.notes))


def on_cohort(model: Model, cohort: Cohort, labels: Sequence[str]) -> tuple[Model, tuple[str, ...]]:
    """The model with the labels of a cohort for its outputs, of which some may be left out, and a note on those.

    Raises:
        SegraftError: labels that the cohort or the model does not have.
    """
    if labels:
        asked = cohort.select_labels(labels)
        return (replace(model, labels=asked) if len(asked) == len(model.labels) else _by_name(model, asked)), ()
    known = Labels.of(cohort.labels)
    theirs = {same_name(name): value for value, name in known.items()}
    if model.labels.regions or known.regions:
        return _regions_on(model, cohort, theirs), ()
    shared = {value: theirs[same_name(name)] for value, name in model.labels.items() if same_name(name) in theirs}
    by_value = len(shared) == len(model.labels) and all(value == other for value, other in shared.items())
    if not shared and cohort.cases[0].organs:  # where numbers are but places in the alphabet
        raise SegraftError(
            f"{cohort.path} has none of the labels of {model.source} ({', '.join(model.labels.values())}): say with "
            "--labels which of its masks the outputs stand for."
        )
    if by_value or not shared:
        asked = cohort.select_labels([str(value) for value in model.labels])
        return replace(model, labels=asked), ()
    absent = [name for value, name in model.labels.items() if value not in shared]
    note = f"labels of {model.source.name} that {cohort.name} does not have are left out: {', '.join(absent)}."
    return _by_name(model, Labels({value: known[value] for value in shared.values()})), (note,) if absent else ()


def _regions_on(model: Model, cohort: Cohort, theirs: Mapping[str, int]) -> Model:
    """The model with the cohort's regions of the same names, or with its own, which are of values in masks."""
    named = [theirs.get(same_name(name)) for name in model.labels.values()]
    if None not in named and Labels.of(cohort.labels).regions:
        return replace(model, labels=cohort.select_labels([str(value) for value in named]))
    if model.labels.regions and set(model.labels.values_covered) <= set(cohort.values):
        return model
    raise SegraftError(
        f"{model.source} segments {', '.join(model.labels.values())}, which the masks of {cohort.path} do not tell "
        f"apart ({', '.join(cohort.labels.values())}): say which labels or regions there they stand for, with --labels."
    )


def _by_name(model: Model, asked: Labels) -> Model:
    """The model with only the outputs of the names asked for."""
    places = {same_name(name): place for place, name in enumerate(model.labels.values())}
    unknown = [name for name in asked.values() if same_name(name) not in places]
    if unknown:
        raise SegraftError(
            f"{model.source} has {len(model.labels)} labels, but {len(asked)} were asked for, of which {unknown[0]!r} "
            f"is none of them: choose among {', '.join(model.labels.values())}, or name as many as it has."
        )
    return model.pick(asked, [places[same_name(name)] for name in asked.values()])


@dataclass(frozen=True)
class Measured:
    """How a case was segmented.

    Attributes:
        labels: each by itself, in their order.
        together: the volumes of all of them, where they may overlap; none where those of the labels add up to that.
    """

    labels: list[CaseResult]
    together: tuple[CaseVolumes, ...] = ()


def measure(case: Case, found: Segmentation, labels: Labels) -> Measured:
    """Hold what was found in a case against its label, of which only `labels` count.

    Raises:
        SegraftError: what was found is on another grid than the label.
    """
    scan, label = load_case(case, labels)
    if not same_grid(found.scan.grid, label):
        raise SegraftError(f"the case {case.id} was segmented on another grid than its label's: segment its own scan.")
    truth, affine = np.asanyarray(label.dataobj), scan.first.affine
    results = evaluate_planes(case.id, found.plane, lambda value: labels.plane(truth, value), labels, affine)
    if not labels.regions:
        return Measured(results)
    ours, theirs = found.mask != 0, np.isin(truth, labels.values_covered)
    spacing = spacing_of(affine)
    return Measured(results, (CaseVolumes(case.id, volume_ml(ours, spacing), volume_ml(theirs, spacing)),))
