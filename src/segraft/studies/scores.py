"""What the runs of a study found, as one table."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from segraft.studies.planning import Plan, Planned
from segraft.studies.run import FINISHED, Runs, failure_of, is_finished


@dataclass(frozen=True)
class Scores:
    """Results of a study, as far as its runs are finished.

    Attributes:
        plan: the study's runs.
        table: one row per run, test case and label: `run`, `arm`, `family`, `method`, `rank` (0 without factors),
            `seed`, `held_out`, `case`, `patient`, `fold`, `label`, `dice`, `hausdorff95_mm`, `volume_ml`, `truth_ml`.
        finished: key -> what the run says of itself.
        failures: key -> reason of the last try.
        waiting: keys of runs that were not done, or are being done.
    """

    plan: Plan
    table: pd.DataFrame
    finished: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, str]
    waiting: tuple[str, ...]

    @property
    def missing(self) -> dict[str, list[Planned]]:
        """Arm -> its runs that have no result."""
        missing: dict[str, list[Planned]] = {}
        for run in self.plan.runs:
            if run.key not in self.finished:
                missing.setdefault(run.arm, []).append(run)
        return missing

    def outer(self, arm: str) -> pd.DataFrame:
        """The rows in which every patient is predicted by the training that held out his fold alone."""
        rows = self.table[self.table["arm"] == arm]
        return rows.loc[[held == (fold,) for held, fold in zip(rows["held_out"], rows["fold"], strict=True)]]

    def dice(self, arm: str) -> dict[str, float]:
        """Patient -> Dice: mean over scans and labels, then over seeds."""
        return self._by_patient(arm, "dice")

    def volumes_ml(self, arm: str) -> dict[str, tuple[float, float]]:
        """Patient -> predicted and annotated volume in mL, all labels together: mean over scans, then over seeds."""
        rows = self.outer(arm).groupby(["patient", "seed", "case"], sort=True)[["volume_ml", "truth_ml"]].sum()
        means = rows.groupby(["patient", "seed"]).mean().groupby("patient").mean()
        return {str(patient): (float(row.iloc[0]), float(row.iloc[1])) for patient, row in means.iterrows()}

    def _by_patient(self, arm: str, column: str) -> dict[str, float]:
        rows = self.outer(arm).groupby(["patient", "seed"], sort=True)[column].mean()
        return {str(patient): float(value) for patient, value in rows.groupby("patient").mean().items()}

    def annotated_ml(self) -> dict[str, float]:
        """Patient -> annotated volume in mL, of any arm: all are tested on the same scans."""
        found: dict[str, float] = {}
        for arm in self.plan.arms:
            found |= {patient: truth for patient, (_, truth) in self.volumes_ml(arm).items()}
        return dict(sorted(found.items()))

    def trained(self, arm: str) -> int | None:
        """Trained parameters of one training of an arm."""
        counts = [self.finished[run.key]["trained"] for run in self._runs(arm)]
        return counts[0] if counts else None

    def bytes(self, arm: str) -> int | None:
        """Size of the tensors in one adapter file of an arm."""
        sizes = [self.finished[run.key]["bytes"] for run in self._runs(arm)]
        return sizes[0] if sizes else None

    def seconds(self, arm: str) -> float | None:
        """Mean time of one training of an arm."""
        training = [self.finished[run.key]["training"] for run in self._runs(arm)]
        times = [each["seconds"] for each in training if each]
        return fmean(times) if times else None

    def _runs(self, arm: str) -> list[Planned]:
        return [run for run in self.plan.runs if run.arm == arm and run.key in self.finished]


COLUMNS = (
    "run", "arm", "family", "method", "rank", "seed", "held_out", "case", "patient", "fold", "label", "dice",
    "hausdorff95_mm", "volume_ml", "truth_ml",
)  # fmt: skip


def collect(plan: Plan, runs: Runs) -> Scores:
    """Read what is there of all runs."""
    rows: list[dict[str, Any]] = []
    finished, failures, waiting = {}, {}, []
    for planned in plan.runs:
        folder = runs.folder(planned.key)
        if not is_finished(folder):
            reason = failure_of(folder)
            if reason is None:
                waiting.append(planned.key)
            else:
                failures[planned.key] = reason
            continue
        finished[planned.key] = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        if planned.base is not None:
            rows += _rows(plan, planned, folder)
    return Scores(plan, pd.DataFrame(rows, columns=list(COLUMNS)), finished, failures, tuple(waiting))


def _rows(plan: Plan, planned: Planned, folder: Path) -> list[dict[str, Any]]:
    arm = plan.arms[planned.arm]
    rows = []
    for case in json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["cases"]:
        patient = plan.patients[case["case"]]
        fold = plan.folds[patient]
        rows.append(
            {
                "run": planned.key,
                "arm": planned.arm,
                "family": arm.family,
                "method": arm.method,
                "rank": arm.rank or 0,
                "seed": planned.seed,
                # What nothing was trained for has held out each fold as well as all.
                "held_out": (fold,) if arm.trains_nothing else planned.held_out,
                "case": case["case"],
                "patient": patient,
                "fold": fold,
                "label": case["name"],
                **{name: case[name] for name in ("dice", "hausdorff95_mm", "volume_ml", "truth_ml")},
            }
        )
    return rows
