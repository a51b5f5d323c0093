"""What the report of a study of shots says, as the few-shot paper does."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from segraft.evaluation.few_shot_figures import Point, parameters_figure, rank_figure
from segraft.evaluation.results import MISSING
from segraft.studies import tables
from segraft.studies.few_shot import ShotsJudgement, Standing
from segraft.studies.pages import Shown
from segraft.studies.scores import Scores

SPREAD = "mean over test patients and seeds (SD over seeds of the mean over patients)"
DRAWN = (
    "For each seed, every arm learns from the same patients, and fewer shots are the first of more; all are tested on "
    "the same other patients. Nothing is chosen on them: there are no patients to validate on, and each rank is an arm "
    "of its own. The SD over seeds is of who is drawn and of how trainings go; an arm that trains nothing has none. In "
    "the tests, a patient counts with the mean over seeds."
)


@dataclass(frozen=True)
class ShotsPage:
    """A `Page` of what `judge_shots` found."""

    scores: Scores
    judgement: ShotsJudgement

    def lead(self) -> str:
        """The best arm at each number of shots, beside the reference."""
        told = []
        for shots, best in self.judgement.best.items():
            if best is None:
                continue
            text = f"{shots} shots: {best} has the highest mean Dice, {self._mean(shots, best):.3f}"
            reference = self.judgement.references[shots]
            if reference not in (None, best):
                text += f"; the reference, {reference}, has {self._mean(shots, str(reference)):.3f}"
            told.append(f"{text}.")
        return " ".join(told) or "No arm is complete yet."

    def notes(self) -> list[str]:
        """How patients were drawn, and what is missing."""
        return [DRAWN, *self.judgement.notes]

    def tables(self) -> list[tuple[str, pd.DataFrame]]:
        """Tables 1 and 2 of the paper, ranks, and the tests."""
        found, frames = self.judgement, []
        for shots, standings in found.standings.items():
            labels = list(dict.fromkeys(label for standing in standings.values() for label in standing.labels))
            if len(labels) > 1:
                frames.append((f"{shots} shots: Dice by label, {SPREAD}", self._by_label(shots, labels)))
        for shots, frame in found.tests.items():
            against = f"{shots} shots: arms against {found.references[shots]} {tables.TESTED}"
            frames.append((against, tables.tests(frame)))
        return [
            ("Modules that each strategy trains whole", tables.modules(self.scores.plan.study)),
            (f"Dice by number of shots: {SPREAD}", self._by_shots()),
            ("Dice by initial rank, and the mean rank in use at the end", self._by_rank()),
            *frames,
        ]

    def figures(self) -> list[tuple[str, bytes]]:
        """Dice by initial rank, and against trained parameters."""
        figures = []
        standings = self.judgement.standings
        by_rank = {
            shots: {
                self._called(family): {
                    rank: list(whole[arm].by_seed.values()) for rank, arm in names.items() if arm in whole
                }
                for family, names in self._ranks().items()
            }
            for shots, whole in standings.items()
        }
        if any(dice for families in by_rank.values() for dice in families.values()):
            figures.append(("Dice by initial rank: mean and SD over seeds", rank_figure(by_rank)))
        points = {
            shots: [self._point(shots, name, each) for name, each in whole.items()]
            for shots, whole in standings.items()
        }
        if any(points.values()):
            figures.append(("Dice against trained parameters: mean and SD over seeds", parameters_figure(points)))
        return figures

    def shown(self) -> list[Shown]:
        """At most shots: what trains nothing, the reference, the best method."""
        shots = max(self.judgement.standings)
        standings = self.judgement.standings[shots]
        arms = self.scores.plan.arms
        methods = sorted((n for n in standings if arms[n].rank is not None), key=lambda n: -self._mean(shots, n))
        asked = [
            *(name for name in standings if arms[name].trains_nothing),
            self.judgement.references[shots],
            *methods[:1],
        ]
        return [Shown(self._called(name), name, shots) for name in dict.fromkeys(asked) if name is not None]

    def values(self) -> dict[str, Any]:
        """Every arm at every number of shots."""
        scores, found = self.scores, self.judgement
        return {
            "shots": list(found.standings),
            "seeds": list(scores.plan.study.seeds),
            "test_patients": sorted({str(patient) for patient in scores.table["patient"]}),
            "arms": {
                name: {
                    "family": arm.family,
                    "rank": arm.rank,
                    "trained": scores.trained(name),
                    "bytes": scores.bytes(name),
                    "runs": scores.runs(name),
                    "shots": {
                        shots: _values(standings[name])
                        for shots, standings in found.standings.items()
                        if name in standings
                    },
                }
                for name, arm in scores.plan.arms.items()
            },
            "reference": found.references,
            "tests": {
                shots: None if frame is None else frame.to_dict(orient="index") for shots, frame in found.tests.items()
            },
            "best": found.best,
        }

    def _by_shots(self) -> pd.DataFrame:
        rows = []
        most = max(self.judgement.standings)
        for name in self.scores.plan.arms:
            trained, size = self.scores.trained(name), self.scores.bytes(name)
            seconds = self.scores.seconds(name, most)
            rows.append(
                {
                    "Arm": name,
                    "Trained parameters": MISSING if trained is None else f"{trained:,}",
                    "Tensors (kB)": MISSING if size is None else f"{size / 1000:,.0f}",
                    f"Training (s), {most} shots": MISSING if seconds is None else f"{seconds:,.0f}",
                    **{f"{shots} shots": self._cell(shots, name) for shots in self.judgement.standings},
                }
            )
        return pd.DataFrame(rows)

    def _by_label(self, shots: int, labels: Sequence[str]) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "Arm": name,
                **{label: _told(standing.labels[label]) for label in labels},
                "Average": _told(standing.by_seed),
            }
            for name, standing in self.judgement.standings[shots].items()
        )

    def _by_rank(self) -> pd.DataFrame:
        """Of methods with more ranks than one, or with a rank that they adapt."""
        rows = []
        several = {name for names in self._ranks().values() for name in names.values()}
        for name, arm in self.scores.plan.arms.items():
            used = {shots: self._rank_in_use(shots, name) for shots in self.judgement.standings}
            if arm.rank is None or (name not in several and set(used.values()) == {MISSING}):
                continue
            row = {"Method": arm.family, "Initial rank": arm.rank}
            for shots, rank in used.items():
                row |= {f"Rank in use, {shots} shots": rank, f"{shots} shots": self._cell(shots, name)}
            rows.append(row)
        frame = pd.DataFrame(rows)
        empty = [column for column in frame if "in use" in str(column) and set(frame[column]) == {MISSING}]
        return frame.drop(columns=empty)

    def _ranks(self) -> dict[str, dict[int, str]]:
        """Family -> initial rank -> arm, of those with more ranks than one."""
        families: dict[str, dict[int, str]] = {}
        for name, arm in self.scores.plan.arms.items():
            if arm.rank is not None:
                families.setdefault(arm.family, {})[arm.rank] = name
        return {family: dict(sorted(names.items())) for family, names in families.items() if len(names) > 1}

    def _rank_in_use(self, shots: int, arm: str) -> str:
        standing = self.judgement.standings[shots].get(arm)
        return MISSING if standing is None or standing.rank_in_use is None else f"{standing.rank_in_use:.1f}"

    def _cell(self, shots: int, arm: str) -> str:
        standing = self.judgement.standings[shots].get(arm)
        return MISSING if standing is None else _told(standing.by_seed)

    def _mean(self, shots: int, arm: str) -> float:
        return fmean(self.judgement.standings[shots][arm].by_seed.values())

    def _called(self, name: str) -> str:
        """In a picture: without the base, where there is one."""
        several = len({arm.base for arm in self.scores.plan.arms.values()}) > 1
        return name if several else name.rpartition(" (")[0]

    def _point(self, shots: int, name: str, standing: Standing) -> Point:
        dice = list(standing.by_seed.values())
        return Point(self._called(name), self.scores.trained(name, shots) or 0, dice, self._kind(name))

    def _kind(self, name: str) -> str:
        """By which points of the figure look alike: with factors or without, the decoder frozen or trained."""
        arm = self.scores.plan.arms[name]
        return (
            "parts of the network alone"
            if arm.rank is None
            else "adapter" + ("" if arm.strategy == "none" else f" + {arm.strategy}")
        )


def _values(standing: Standing) -> dict[str, Any]:
    return {
        "dice": standing.dice,
        **_spread(standing.by_seed.values()),
        "labels": {label: _spread(seeds.values()) for label, seeds in standing.labels.items()},
        "by_seed": standing.by_seed,
        "rank_in_use": standing.rank_in_use,
    }


def _spread(means: Iterable[float]) -> dict[str, float | None]:
    values = list(means)
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None}


def _told(by_seed: Mapping[int, float]) -> str:
    """Mean and SD over seeds, which is small: both have three digits."""
    found = _spread(by_seed.values())
    return f"{found['mean']:.3f} ({MISSING if found['sd'] is None else format(found['sd'], '.3f')})"
