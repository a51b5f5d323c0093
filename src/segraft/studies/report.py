"""The report of a study: one page for people, CSV and JSON for programs, all from the runs' folders."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from segraft.atomic import replacing
from segraft.data.checks import load_case
from segraft.data.cohort import Case, Cohort
from segraft.data.labels import Labels
from segraft.data.nifti import load_nifti
from segraft.errors import SegraftError
from segraft.evaluation.figures import comparison_figure
from segraft.evaluation.metrics import spacing_of
from segraft.evaluation.report import write_report
from segraft.studies import tables
from segraft.studies.designs import CrossValidation, Design, FewShot
from segraft.studies.executing import MASKS
from segraft.studies.few_shot import judge_shots
from segraft.studies.folds_page import FoldsPage
from segraft.studies.judging import judge
from segraft.studies.pages import Page, Shown
from segraft.studies.planning import PLAN, Plan
from segraft.studies.run import Runs, told, write_json
from segraft.studies.scores import Scores, collect
from segraft.studies.shots_page import ShotsPage

RUNS = "runs"
REPORT, RESULTS, SCORES, FIGURES = "report.html", "results.json", "scores.csv", "figures"


@dataclass(frozen=True)
class Kind:
    """How a kind of study is judged, and the page of its report that says what was found."""

    judge: Callable[[Scores], Any]
    page: Callable[[Scores, Any], Page]


KINDS: dict[type[Design], Kind] = {
    CrossValidation: Kind(judge, FoldsPage),
    FewShot: Kind(judge_shots, ShotsPage),
}


def results_of(out: Path) -> tuple[Scores, Any]:
    """What the runs in a study's folder found so far, and how it is judged (`Judgement`, or `ShotsJudgement`).

    Raises:
        SegraftError: the folder holds no study.
    """
    scores = collect(Plan.read(out / PLAN), Runs(out / RUNS))
    return scores, KINDS[type(scores.design)].judge(scores)


def page_of(scores: Scores, judgement: Any) -> Page:
    """What the report says of that."""
    return KINDS[type(scores.design)].page(scores, judgement)


def tables_of(scores: Scores, judgement: Any) -> list[tuple[str, pd.DataFrame]]:
    """(caption, frame) of every table that has rows."""
    return [(caption, frame) for caption, frame in page_of(scores, judgement).tables() if len(frame)]


def write_study_report(out: Path) -> Path:
    """Write `report.html`, `results.json`, `scores.csv` and `figures/` into a study's folder.

    Returns:
        The path of the report.

    Raises:
        SegraftError: the folder holds no study, or cannot be written to.
    """
    scores, judgement = results_of(out)
    study, page = scores.plan.study, page_of(scores, judgement)
    figures, drawn = _figures(scores, page, out)
    for left in (out / FIGURES).glob("*.png"):
        left.unlink()
    for number, (_, png) in enumerate(figures, start=1):
        with replacing(out / FIGURES / f"{number}.png") as aside:
            aside.write_bytes(png)
    with replacing(out / SCORES) as aside:
        scores.table.to_csv(aside, index=False, lineterminator="\n")
    write_json(out / RESULTS, as_json(scores, judgement))
    waiting = [f"{len(scores.waiting)} runs are not done yet."] if scores.waiting else []
    return write_report(
        out / REPORT,
        title=study.title,
        lead=f"{study.about} {page.lead()}".strip(),
        notes=[*study.notes, *scores.of_bases, *page.notes(), *told(scores.failures), *waiting, *drawn],
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


def as_json(scores: Scores, judgement: Any) -> dict[str, Any]:
    """Everything that the report says, for programs."""
    found: dict[str, Any] = _finite(
        {
            "study": scores.plan.study.name,
            **page_of(scores, judgement).values(),
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


def _figures(scores: Scores, page: Page, out: Path) -> tuple[list[tuple[str, bytes]], list[str]]:
    """(caption, PNG) of every figure, and what could not be drawn."""
    figures = page.figures()
    try:
        return figures + _masks(scores, page.shown(), out), []
    except SegraftError as error:
        return figures, [f"The masks are not drawn, as the scans cannot be read: {error}"]


def _masks(scores: Scores, shown: list[Shown], out: Path) -> list[tuple[str, bytes]]:
    """A patient of small, one of middle and one of large volume, masks beside the truth."""
    study = scores.plan.study
    order = sorted(scores.annotated_ml().items(), key=lambda item: item[1])
    if study.data is None or not shown or not order:
        return []
    cohort = Cohort.read(study.data, patient_pattern=study.patient_pattern)
    labels = cohort.select_labels(study.labels)
    chosen = dict.fromkeys(order[place][0] for place in (len(order) // 6, len(order) // 2, len(order) * 5 // 6))
    found = []
    for patient in chosen:
        case = next(case for case in cohort.cases if case.patient == patient)
        masks = {each.name: _mask(scores, each, case, out) for each in shown}
        found.append(
            (
                f"{case.id}, {dict(order)[patient]:.1f} mL annotated in this patient",
                _picture(case, masks, labels, study.preparation),
            )
        )
    return found


def _mask(scores: Scores, shown: Shown, case: Case, out: Path) -> NDArray[Any]:
    """Of the training that held out this case, with the first seed."""
    rows = scores.outer(shown.arm, shown.level)
    run = rows[rows["case"] == case.id].sort_values("seed").iloc[0]["run"]
    return np.asanyarray(load_nifti(out / RUNS / str(run) / MASKS / f"{case.id}.nii.gz", what="mask").dataobj)


def _picture(case: Case, masks: Mapping[str, NDArray[Any]], labels: Labels, preparation: Mapping[str, Any]) -> bytes:
    """Image, truth and predictions, all turned to RAS."""
    scan, label = load_case(case, labels)
    upright = nib.as_closest_canonical(scan.first)

    def turned(mask: NDArray[Any]) -> NDArray[Any]:
        image = nib.Nifti1Image(mask.astype(np.int16), scan.first.affine)
        return np.asanyarray(nib.as_closest_canonical(image).dataobj)

    truth = np.asanyarray(label.dataobj)
    intensity = preparation.get("intensity", {})
    intensity = intensity[0] if isinstance(intensity, list | tuple) else intensity  # the first channel is shown
    window = (intensity["low"], intensity["high"]) if intensity.get("kind") == "window" else None
    return comparison_figure(
        upright.get_fdata(dtype=np.float32),
        turned(labels.map_of(truth)),
        {name: turned(mask) for name, mask in masks.items()},
        window=window,
        spacing_mm=spacing_of(upright.affine),
        title=case.id,
        labels=labels,
    )
