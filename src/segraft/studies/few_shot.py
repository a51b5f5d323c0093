"""What a study of shots found: every arm at every number of shots, and the tests against the reference."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from segraft.evaluation.statistics import best_arm, compare
from segraft.studies.scores import Scores, counted
from segraft.studies.spec import BEST_STRATEGY


@dataclass(frozen=True)
class Standing:
    """An arm at a number of shots, all its runs done.

    Attributes:
        dice: patient -> Dice, mean over scans, labels and seeds.
        by_seed: seed -> Dice, mean over patients. Of what trains nothing there is one.
        labels: label -> seed -> Dice, mean over patients.
        rank_in_use: at the end of training, mean over layers and seeds; None where the rank is fixed.
    """

    dice: Mapping[str, float]
    by_seed: Mapping[int, float]
    labels: Mapping[str, Mapping[int, float]]
    rank_in_use: float | None


@dataclass(frozen=True)
class ShotsJudgement:
    """Attributes, each by number of shots:
    standings: arm -> how it stands; only those that are complete.
    references: the arm that the others are tested against; None if it is not complete.
    tests: of all others against it, as of `compare`; None without a reference or without others.
    best: the arm with the highest mean Dice; None if none is complete.
    notes: what is missing, of all.
    """

    standings: Mapping[int, Mapping[str, Standing]]
    references: Mapping[int, str | None]
    tests: Mapping[int, pd.DataFrame | None]
    best: Mapping[int, str | None]
    notes: tuple[str, ...]


def judge_shots(scores: Scores) -> ShotsJudgement:
    """Compare all that is complete; what is not is named in the notes and left out, never filled up."""
    arms, asked = scores.plan.arms, scores.plan.study.reference
    labels = list(dict.fromkeys(scores.table["label"]))
    standings: dict[int, dict[str, Standing]] = {}
    references: dict[int, str | None] = {}
    tests: dict[int, pd.DataFrame | None] = {}
    best: dict[int, str | None] = {}
    notes: list[str] = []
    for shots in scores.plan.study.shots:
        whole: dict[str, Standing] = {}
        for name in arms:
            if lacking := scores.lacking(name, shots):
                notes.append(f"{name}, {shots} shots: {counted(len(lacking))}, so it is left out there.")
            else:
                whole[name] = _standing(scores, name, shots, labels)
        dice = {name: standing.dice for name, standing in whole.items()}
        strategies = [name for name in whole if arms[name].rank is None]
        if asked == BEST_STRATEGY:
            reference = best_arm(dice, strategies) if strategies else None
        else:
            reference = asked if asked in whole else None
        if reference is None:
            notes.append(f"{shots} shots: the tests' reference, {asked}, has no complete result, so nothing is tested.")
        elif len(dice[reference]) < 2:
            notes.append(f"{shots} shots: there is one test patient, and tests need two.")
        standings[shots], references[shots] = whole, reference
        tests[shots] = _tests(dice, reference)
        best[shots] = best_arm(dice, list(dice)) if dice else None
    return ShotsJudgement(standings, references, tests, best, tuple(notes))


def _standing(scores: Scores, arm: str, shots: int, labels: list[str]) -> Standing:
    return Standing(
        scores.dice(arm, shots),
        scores.dice_by_seed(arm, shots),
        {label: scores.dice_by_seed(arm, shots, label=label) for label in labels},
        scores.rank_in_use(arm, shots),
    )


def _tests(dice: Mapping[str, Mapping[str, float]], reference: str | None) -> pd.DataFrame | None:
    if reference is None or len(dice) < 2 or len(dice[reference]) < 2:
        return None
    return compare(dice, reference)
