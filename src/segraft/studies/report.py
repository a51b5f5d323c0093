"""The report of a study: one page for people, CSV and JSON for programs, all from the runs' folders."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from segraft.atomic import replacing
from segraft.data.checks import load_case
from segraft.data.cohort import Case, Cohort
from segraft.data.nifti import load_nifti
from segraft.errors import SegraftError
from segraft.evaluation.figures import comparison_figure, dice_figure
from segraft.evaluation.metrics import spacing_of
from segraft.evaluation.report import write_report
from segraft.evaluation.volume_figure import volume_figure
from segraft.studies import tables
from segraft.studies.executing import MASKS
from segraft.studies.judging import Entrant, Judgement, judge
from segraft.studies.planning import PLAN, Plan
from segraft.studies.run import Runs, write_json
from segraft.studies.scores import Scores, collect

RUNS = "runs"
REPORT, RESULTS, SCORES, FIGURES = "report.html", "results.json", "scores.csv", "figures"
TESTED = "(one-sided tests: is the Dice higher? Benjamini-Hochberg corrected over the rows)"
OPTIMISTIC = (
    "The best rank of a method is chosen on the very patients its Dice is then reported for, as the paper does: that "
    "is optimistic. Where a row names one rank per fold, each was chosen inside the training folds, without the fold "
    "that it is tested on. The best strategy, where it is the reference, is chosen on the same patients too."
)


def results_of(out: Path) -> tuple[Scores, Judgement]:
    """What the runs in a study's folder found so far.

    Raises:
        SegraftError: the folder holds no study.
    """
    scores = collect(Plan.read(out / PLAN), Runs(out / RUNS))
    return scores, judge(scores)


def tables_of(scores: Scores, judgement: Judgement) -> list[tuple[str, pd.DataFrame]]:
    """(caption, frame) of every table that has rows."""
    against, against_inside = (
        "" if reference is None else f" against {reference.name} {TESTED}"
        for reference in (judgement.reference, judgement.nested_reference)
    )
    found = [
        ("Modules that each strategy trains whole", tables.modules(scores.plan.study)),
        ("Arms", tables.arms(scores)),
        (
            "Strategies: Dice by annotated volume, mean (SD) over patients",
            tables.by_volume(judgement, judgement.strategies),
        ),
        ("Methods at their best rank: Dice by annotated volume", tables.by_volume(judgement, judgement.methods)),
        (
            "Methods, rank chosen inside the training folds (one per fold)",
            tables.by_volume(judgement, judgement.nested),
        ),
        (f"Methods at their best rank{against}", _tests(judgement.tests)),
        (f"Methods, rank chosen inside the training folds{against_inside}", _tests(judgement.nested_tests)),
        ("Predicted and annotated volumes", tables.volumes(judgement)),
    ]
    return [(caption, frame) for caption, frame in found if len(frame)]


def write_study_report(out: Path) -> Path:
    """Write `report.html`, `results.json`, `scores.csv` and `figures/` into a study's folder.

    Returns:
        The path of the report.

    Raises:
        SegraftError: the folder holds no study, or cannot be written to.
    """
    scores, judgement = results_of(out)
    study = scores.plan.study
    figures, drawn = _figures(scores, judgement, out)
    for left in (out / FIGURES).glob("*.png"):
        left.unlink()
    for number, (_, png) in enumerate(figures, start=1):
        with replacing(out / FIGURES / f"{number}.png") as aside:
            aside.write_bytes(png)
    with replacing(out / SCORES) as aside:
        scores.table.to_csv(aside, index=False, lineterminator="\n")
    write_json(out / RESULTS, as_json(scores, judgement))
    failed = [f"{key} failed: {reason}" for key, reason in scores.failures.items()]
    waiting = [f"{len(scores.waiting)} runs are not done yet."] if scores.waiting else []
    return write_report(
        out / REPORT,
        title=study.title,
        lead=" ".join([study.about, _lead(judgement)]).strip(),
        notes=[*study.notes, OPTIMISTIC, *judgement.notes, *failed, *waiting, *drawn],
        tables=tables_of(scores, judgement),
        figures=figures,
        appendix=[("Runs: where each number comes from", tables.runs(scores))],
        details={"study": study.model_dump(mode="json"), **made_with(scores)},
    )


def made_with(scores: Scores) -> dict[str, str]:
    """Versions that the finished runs were done with; several where they differ."""
    found: dict[str, dict[str, None]] = {}
    for run in scores.finished.values():
        for library, version in run.get("versions", {}).items():
            found.setdefault(library, {})[version] = None
    return {library: ", ".join(known) for library, known in found.items()}


def as_json(scores: Scores, judgement: Judgement) -> dict[str, Any]:
    """Everything that the report says, for programs. Patients' Dice stand under every entrant."""
    runs: dict[str, list[str]] = {}
    for run in scores.plan.runs:
        runs.setdefault(run.arm, []).append(run.key)
    found: dict[str, Any] = _finite(
        {
            "study": scores.plan.study.name,
            "arms": {
                name: {
                    "dice": scores.dice(name),
                    "trained": scores.trained(name),
                    "bytes": scores.bytes(name),
                    "runs": runs.get(name, []),
                }
                for name in scores.plan.arms
            },
            "strata": judgement.strata,
            "annotated_ml": scores.annotated_ml(),
            "strategies": [asdict(entrant) for entrant in judgement.strategies],
            "methods": [asdict(entrant) for entrant in judgement.methods],
            "nested": [asdict(entrant) for entrant in judgement.nested],
            "reference": None if judgement.reference is None else judgement.reference.name,
            "tests": None if judgement.tests is None else judgement.tests.to_dict(orient="index"),
            "nested_tests": None if judgement.nested_tests is None else judgement.nested_tests.to_dict(orient="index"),
            "best": None if judgement.best is None else judgement.best.name,
            "agreement": None if judgement.agreement is None else asdict(judgement.agreement),
            "failures": dict(scores.failures),
            "waiting": list(scores.waiting),
            "notes": list(judgement.notes),
        }
    )
    return found


def _finite(value: Any) -> Any:
    """What does not exist, such as r of constant volumes, is null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _tests(found: pd.DataFrame | None) -> pd.DataFrame:
    return pd.DataFrame() if found is None else tables.tests(found)


def _lead(judgement: Judgement) -> str:
    if judgement.best is None:
        return "No arm is complete yet."
    best = judgement.best
    mean = np.mean(list(best.dice.values()))
    text = f"Highest mean Dice: {best.name}, {mean:.3f}"
    if judgement.reference is None or judgement.reference is best:
        return f"{text}."
    reference = judgement.reference
    return f"{text}; the reference, {reference.name}, has {np.mean(list(reference.dice.values())):.3f}."


def _figures(scores: Scores, judgement: Judgement, out: Path) -> tuple[list[tuple[str, bytes]], list[str]]:
    """(caption, PNG) of every figure, and what could not be drawn."""
    figures = []
    for family in dict.fromkeys(entrant.family for entrant in judgement.methods):
        arms = {name: arm for name, arm in scores.plan.arms.items() if arm.family == family and scores.dice(name)}
        if len(arms) > 1:
            groups = {f"R = {arm.rank}": list(scores.dice(name).values()) for name, arm in arms.items()}
            figures.append((f"Dice by rank: {family}", dice_figure(groups)))
    everyone = (*judgement.strategies, *judgement.methods)
    if everyone:
        groups = {entrant.name: list(entrant.dice.values()) for entrant in everyone}
        figures.append(("Dice of the patients, methods at their best rank", dice_figure(groups)))
    if judgement.best is not None and judgement.agreement is not None:
        volumes = scores.volumes_ml(judgement.best.arm)
        predicted, annotated = ([pair[which] for pair in volumes.values()] for which in (0, 1))
        figures.append((f"Volumes: {judgement.best.name}", volume_figure(predicted, annotated, judgement.agreement)))
    try:
        return figures + _masks(scores, judgement, out), []
    except SegraftError as error:
        return figures, [f"The masks are not drawn, as the scans cannot be read: {error}"]


def _masks(scores: Scores, judgement: Judgement, out: Path) -> list[tuple[str, bytes]]:
    """A patient of small, one of middle and one of large volume, masks beside the truth."""
    study = scores.plan.study
    everyone = _shown(judgement)
    order = sorted(scores.annotated_ml().items(), key=lambda item: item[1])
    if study.data is None or not everyone or not order:
        return []
    cohort = Cohort.read(study.data, patient_pattern=study.patient_pattern)
    labels = cohort.select_labels(study.labels)
    chosen = dict.fromkeys(order[place][0] for place in (len(order) // 6, len(order) // 2, len(order) * 5 // 6))
    found = []
    for patient in chosen:
        case = next(case for case in cohort.cases if case.patient == patient)
        masks = {entrant.name: _mask(scores, entrant, case, out) for entrant in everyone}
        found.append(
            (
                f"{case.id}, {dict(order)[patient]:.1f} mL annotated in this patient",
                _picture(case, masks, labels, study.preparation),
            )
        )
    return found


def _shown(judgement: Judgement) -> list[Entrant]:
    """Whose masks are drawn: the methods beside the reference, as figure 4 of the paper; without methods, all."""
    if not judgement.methods:
        return list(judgement.strategies)
    reference = [] if judgement.reference is None else [judgement.reference]
    return [*reference, *(entrant for entrant in judgement.methods if entrant not in reference)]


def _mask(scores: Scores, entrant: Entrant, case: Case, out: Path) -> NDArray[Any]:
    """Of the training that held out this case's fold alone, with the first seed."""
    rows = scores.outer(entrant.arm)
    run = rows[rows["case"] == case.id].sort_values("seed").iloc[0]["run"]
    return np.asanyarray(load_nifti(out / RUNS / str(run) / MASKS / f"{case.id}.nii.gz", what="mask").dataobj)


def _picture(
    case: Case, masks: Mapping[str, NDArray[Any]], labels: Mapping[int, str], preparation: Mapping[str, Any]
) -> bytes:
    """Image, truth and predictions, all turned to RAS."""
    scan, label = load_case(case)
    upright = nib.as_closest_canonical(scan)

    def turned(mask: NDArray[Any]) -> NDArray[Any]:
        image = nib.Nifti1Image(mask.astype(np.int16), scan.affine)
        return np.asanyarray(nib.as_closest_canonical(image).dataobj)

    truth = np.asanyarray(label.dataobj)
    intensity = preparation.get("intensity", {})
    window = (intensity["low"], intensity["high"]) if intensity.get("kind") == "window" else None
    return comparison_figure(
        upright.get_fdata(dtype=np.float32),
        turned(np.where(np.isin(truth, list(labels)), truth, 0)),
        {name: turned(mask) for name, mask in masks.items()},
        window=window,
        spacing_mm=spacing_of(upright.affine),
        title=case.id,
        labels=labels,
    )
