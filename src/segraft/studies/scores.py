"""What the runs of a study found, as one table."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from segraft.errors import SegraftError
from segraft.studies.designs import Design, Planned, design_of
from segraft.studies.planning import Plan
from segraft.studies.run import FINISHED, Runs, failure_of, is_finished


@dataclass(frozen=True)
class Scores:
    """Results of a study, as far as its runs are finished.

    Where a study holds several comparisons (`Design.levels`), `level` says which: a number of shots.

    Attributes:
        plan: the study's runs.
        table: one row per run, test case and label: `run`, `arm`, `family`, `method`, `rank` (0 without factors),
            `seed`, the columns of the study's design (`held_out` and `fold`, or `shots`), `case`, `patient`, `label`,
            `dice`, `hausdorff95_mm`, `volume_ml`, `truth_ml`.
        finished: key -> what the run says of itself.
        failures: key -> reason of the last try.
        waiting: keys of runs that were not done, or are being done.
        together: (key, case) -> predicted and annotated volume in mL of all labels, where they may overlap.
    """

    plan: Plan
    table: pd.DataFrame
    finished: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, str]
    waiting: tuple[str, ...]
    together: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    @property
    def of_bases(self) -> list[str]:
        """What is to be known of the bases, such as what was loaded of a checkpoint."""
        return [
            f"{run.arm}: {note}"
            for run in self.plan.runs
            if run.base is None
            for note in self.finished.get(run.key, {}).get("notes", ())
        ]

    @property
    def missing(self) -> dict[str, list[Planned]]:
        """Arm -> its runs that have no result."""
        missing: dict[str, list[Planned]] = {}
        for run in self.plan.runs:
            if run.key not in self.finished:
                missing.setdefault(run.arm, []).append(run)
        return missing

    @property
    def design(self) -> Design:
        """Of the study."""
        return design_of(self.plan.study)

    def lacking(self, arm: str, level: int | None = None) -> list[Planned]:
        """Runs without a result, without which the arm cannot be compared."""
        known = self.plan.arms[arm]
        return [run for run in self.missing.get(arm, ()) if self.design.counts(run, known, level)]

    def outer(self, arm: str, level: int | None = None) -> pd.DataFrame:
        """The rows that count: every patient once per seed, scan and label."""
        return self.design.counted(self.table[self.table["arm"] == arm], level)

    def dice(self, arm: str, level: int | None = None, *, label: str | None = None) -> dict[str, float]:
        """Patient -> Dice: mean over scans and labels (or of one label), then over seeds."""
        means = self._by_patient(arm, level, label).groupby("patient").mean()
        return {str(patient): float(value) for patient, value in means.items()}

    def dice_by_seed(self, arm: str, level: int | None = None, *, label: str | None = None) -> dict[int, float]:
        """Seed -> mean over patients."""
        means = self._by_patient(arm, level, label).groupby("seed").mean()
        return {int(str(seed)): float(value) for seed, value in means.items()}

    def volumes_ml(self, arm: str, level: int | None = None) -> dict[str, tuple[float, float]]:
        """Patient -> predicted and annotated volume in mL, all labels together: mean over scans, then over seeds."""
        scans = self.outer(arm, level).groupby(["patient", "seed", "run", "case"], sort=True)
        rows = scans[["volume_ml", "truth_ml"]].sum()
        for place in rows.index:
            rows.loc[place] = self.together.get(place[2:], tuple(rows.loc[place]))
        means = rows.groupby(["patient", "seed"]).mean().groupby("patient").mean()
        return {str(patient): (float(row.iloc[0]), float(row.iloc[1])) for patient, row in means.iterrows()}

    def _by_patient(self, arm: str, level: int | None, label: str | None) -> "pd.Series[float]":
        rows = self.outer(arm, level)
        rows = rows if label is None else rows[rows["label"] == label]
        return rows.groupby(["patient", "seed"], sort=True)["dice"].mean()

    def annotated_ml(self) -> dict[str, float]:
        """Patient -> annotated volume in mL, of any arm: all are tested on the same scans."""
        found: dict[str, float] = {}
        for arm in self.plan.arms:
            for level in self.design.levels:
                found |= {patient: truth for patient, (_, truth) in self.volumes_ml(arm, level).items()}
        return dict(sorted(found.items()))

    def trained(self, arm: str, level: int | None = None) -> int | None:
        """Trained parameters of one training; the mean, as methods that adapt their rank keep more or fewer."""
        return self._mean_of("trained", arm, level)

    def bytes(self, arm: str, level: int | None = None) -> int | None:
        """Size of the tensors in one adapter file, likewise."""
        return self._mean_of("bytes", arm, level)

    def _mean_of(self, what: str, arm: str, level: int | None) -> int | None:
        counts = [self.finished[run.key][what] for run in self._runs(arm, level)]
        return round(fmean(counts)) if counts else None

    def seconds(self, arm: str, level: int | None = None) -> float | None:
        """Mean time of one training of an arm; of a level, of those that count for it."""
        times = [each["seconds"] for run in self._runs(arm, level) if (each := self.finished[run.key]["training"])]
        return fmean(times) if times else None

    def rank_in_use(self, arm: str, level: int | None = None) -> float | None:
        """Mean rank in use at the end of training, over layers and seeds; None for methods that do not adapt it."""
        training = [self.finished[run.key]["training"] for run in self._runs(arm, level)]
        ranks = [each["ranks"][-1] for each in training if each and each.get("ranks")]
        return fmean(ranks) if ranks else None

    def runs(self, arm: str) -> list[str]:
        """Keys of its runs, done or not."""
        return [run.key for run in self.plan.runs if run.arm == arm]

    def _runs(self, arm: str, level: int | None = None) -> list[Planned]:
        """Those that are done; of a level, those that count for it."""
        done = [run for run in self.plan.runs if run.arm == arm and run.key in self.finished]
        return done if level is None else [r for r in done if self.design.counts(r, self.plan.arms[arm], level)]


FIRST = ("run", "arm", "family", "method", "rank", "seed")
METRICS = ("dice", "hausdorff95_mm", "volume_ml", "truth_ml")


def counted(lacking: int) -> str:
    """How many runs lack, in half a sentence."""
    return "one of its runs has no result" if lacking == 1 else f"{lacking} of its runs have no result"


def collect(plan: Plan, runs: Runs) -> Scores:
    """Read what is there of all runs.

    Raises:
        SegraftError: the result of a run is of an earlier version that measured otherwise.
    """
    rows: list[dict[str, Any]] = []
    finished, failures, waiting = {}, {}, []
    together: dict[tuple[str, str], tuple[float, float]] = {}
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
            found = _evaluation(folder)
            rows += _rows(plan, planned, found["cases"])
            together |= {(planned.key, c["case"]): (c["volume_ml"], c["truth_ml"]) for c in found.get("together", ())}
    columns = [*FIRST, *design_of(plan.study).columns, "case", "patient", "label", *METRICS]
    return Scores(plan, pd.DataFrame(rows, columns=columns), finished, failures, tuple(waiting), together)


def _evaluation(folder: Path) -> dict[str, Any]:
    """What `save_results` wrote of a run.

    Raises:
        SegraftError: its labels are regions, and it was done when their volumes were added up.
    """
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    if "together" not in found and found.get("record", {}).get("identity", {}).get("regions"):
        raise SegraftError(
            f"{folder} does not say what its regions, which may overlap, measure together, as an earlier version did "
            "it: remove that folder and run the study again."
        )
    return found


def _rows(plan: Plan, planned: Planned, cases: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    arm, design = plan.arms[planned.arm], design_of(plan.study)
    rows = []
    for case in cases:
        patient = plan.patients[case["case"]]
        rows.append(
            {
                "run": planned.key,
                "arm": planned.arm,
                "family": arm.family,
                "method": arm.method,
                "rank": arm.rank or 0,
                "seed": planned.seed,
                **design.row(planned, arm, plan.folds.get(patient)),
                "case": case["case"],
                "patient": patient,
                "label": case["name"],
                **{name: case[name] for name in METRICS},
            }
        )
    return rows
