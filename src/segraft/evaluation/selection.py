"""Choosing each method's rank, and the scores that go with the choice.

`best_on_all`, the papers' way, is optimistic: the patients that choose the rank are those whose score is then
reported, so that of ranks which differ by chance alone the luckiest is taken, and its score is higher than new
patients would give. `nested` chooses for each outer fold among models that saw none of its patients, on patients of
the other folds; what it reports is the score of the whole procedure, choice included.

Scores are a table with one row per prediction and label:

| column     | holds                                                                                       |
|------------|---------------------------------------------------------------------------------------------|
| `method`   | name of the method                                                                          |
| `rank`     | whole number; a method with one rank alone (a strategy without adapter: 0) needs no choice  |
| `seed`     | whole number                                                                                |
| `held_out` | the folds that the model was not trained on, a frozenset or tuple of whole numbers          |
| `patient`  | name of the patient                                                                         |
| `fold`     | the patient's fold, whole number                                                            |
| `dice`     | 0 to 1                                                                                      |

A patient's score is the mean over scans and labels for each seed, then the mean over seeds. Every run must be there:
each rank of a method (those in its rows) for every fold and every seed (those that appear with as many folds held out).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from statistics import fmean

import pandas as pd

from segraft.errors import SegraftError

COLUMNS = ("method", "rank", "seed", "held_out", "patient", "fold", "dice")

_NAMES = (pd.api.types.is_string_dtype, "names")
_WHOLE = (pd.api.types.is_integer_dtype, "whole numbers")
_KINDS = {
    "method": _NAMES, "patient": _NAMES, "rank": _WHOLE, "seed": _WHOLE, "fold": _WHOLE,
    "dice": (pd.api.types.is_numeric_dtype, "numbers"),
}  # fmt: skip
_DECIMALS = 12  # mean scores that differ by less than this are equal

Folds = frozenset[int]
OnAll = Mapping[str, int]
"""Method → rank."""
Nested = Mapping[tuple[str, int], int]
"""(Method, outer fold) → rank."""


@dataclass(frozen=True)
class _Study:
    """The rows of a table by run."""

    ranks: dict[str, list[int]]
    patients: dict[int, list[str]]
    """Fold → its patients."""
    seeds: dict[int, list[int]]
    """Number of folds held out → seeds."""
    scores: dict[tuple[str, int, Folds, int], dict[str, list[float]]]
    """(Method, rank, held out, seed) → patient → Dice of each scan and label."""
    counts: dict[str, int]
    """Patient → number of scans and labels."""


def best_on_all(scores: pd.DataFrame) -> dict[str, int]:
    """Choose for each method the rank with the highest mean Dice over all patients, as the papers do.

    Each patient counts as predicted by the model of its outer fold (`held_out` is the patient's fold alone); other
    rows are not used. Of equal ranks the smaller is taken. See the module on why the result is optimistic.

    Args:
        scores: the table that the module describes.

    Returns:
        Method → rank, in the order of the rows.

    Raises:
        SegraftError: a column is missing or wrong, or a run or patient is missing: the message names it.
    """
    study = _study(scores)
    outer = [(frozenset({fold}), fold) for fold in study.patients]
    return {method: _best(study, method, outer) for method in study.ranks}


def nested(scores: pd.DataFrame) -> dict[tuple[str, int], int]:
    """Choose for each method and outer fold k the rank with the highest mean Dice over the patients of other folds.

    A patient of fold j counts as predicted by the model that was trained without folds j and k, so no patient of
    fold k has a say in the choice for k. Of equal ranks the smaller is taken.

    Args:
        scores: the table that the module describes.

    Returns:
        (Method, outer fold) → rank, in the order of the rows and of the folds. A method with one rank needs no such
        runs: it has that rank everywhere.

    Raises:
        SegraftError: a column is missing or wrong, there are fewer than 3 folds, or a run or patient is missing: the
            message names it.
    """
    study = _study(scores)
    if len(study.patients) < 3:
        raise SegraftError(
            f"{len(study.patients)} folds leave nothing to train on once two are held out: use 3 folds or more."
        )
    inner = {k: [(frozenset({j, k}), j) for j in study.patients if j != k] for k in study.patients}
    return {
        (method, k): ranks[0] if len(ranks) == 1 else _best(study, method, needed)
        for method, ranks in study.ranks.items()
        for k, needed in inner.items()
    }


def scores_of_choice(scores: pd.DataFrame, choice: OnAll | Nested) -> dict[str, dict[str, float]]:
    """Return each patient's Dice, predicted at the chosen rank by the model of the patient's outer fold.

    Args:
        scores: the table that was chosen from.
        choice: of `best_on_all` or of `nested`.

    Returns:
        Method → patient → mean Dice over the seeds, 0 to 1: what `segraft.evaluation.statistics.compare` takes.

    Raises:
        SegraftError: a column is missing or wrong, the choice lacks a fold or names a method or rank that is not in the
            table, or a run or patient is missing: the message names it.
    """
    study = _study(scores)
    chosen: dict[str, dict[int, int]] = {}
    for key, rank in choice.items():
        method, folds = (key, list(study.patients)) if isinstance(key, str) else (key[0], [key[1]])
        chosen.setdefault(method, {}).update(dict.fromkeys(folds, rank))
    result = {}
    for method, ranks in chosen.items():
        if set(ranks) != set(study.patients):
            raise SegraftError(
                f"The choice for {method} is for folds {_listed(ranks)}, the scores have {_listed(study.patients)}: "
                "choose from the same table."
            )
        parts = [_patient_scores(study, method, rank, [(frozenset({k}), k)]) for k, rank in ranks.items()]
        result[method] = dict(sorted((patient, dice) for part in parts for patient, dice in part.items()))
    return result


def _best(study: _Study, method: str, needed: list[tuple[Folds, int]]) -> int:
    ranks = study.ranks[method]
    means = {rank: round(fmean(_patient_scores(study, method, rank, needed).values()), _DECIMALS) for rank in ranks}
    return max(ranks, key=means.__getitem__)  # ranks grow, and of equal ones max takes the first


def _patient_scores(study: _Study, method: str, rank: int, needed: list[tuple[Folds, int]]) -> dict[str, float]:
    """Mean Dice of the patients of each (held out, fold) pair."""
    _check_complete(study, method, rank, needed)
    return {
        patient: fmean(
            fmean(study.scores[method, rank, held_out, seed][patient]) for seed in study.seeds[len(held_out)]
        )
        for held_out, fold in needed
        for patient in study.patients[fold]
    }


def _check_complete(study: _Study, method: str, rank: int, needed: list[tuple[Folds, int]]) -> None:
    lacking: dict[Folds, str] = {}
    for held_out, fold in needed:
        for seed in study.seeds.get(len(held_out)) or next(iter(study.seeds.values())):
            run = study.scores.get((method, rank, held_out, seed), {})
            absent = [patient for patient in study.patients[fold] if len(run.get(patient, ())) < study.counts[patient]]
            if absent:
                lacking.setdefault(held_out, f"seed {seed}, patient {absent[0]}")
    if lacking:
        folds = " and ".join(_listed(held_out) for held_out in lacking)
        raise SegraftError(
            f"Scores of {method} at rank {rank} are missing or incomplete where the folds held out are {folds} "
            f"(first: {next(iter(lacking.values()))}): run and score that again."
        )


def _study(scores: pd.DataFrame) -> _Study:
    _check_table(scores)
    ranks: dict[str, set[int]] = {}
    patients: dict[int, set[str]] = {}
    seeds: dict[int, set[int]] = {}
    by_run: dict[tuple[str, int, Folds, int], dict[str, list[float]]] = {}
    for method, rank, seed, held_out, patient, fold, dice in zip(*(scores[name] for name in COLUMNS), strict=True):
        held = _held_out(held_out)
        ranks.setdefault(method, set()).add(rank)
        patients.setdefault(fold, set()).add(patient)
        seeds.setdefault(len(held), set()).add(seed)
        by_run.setdefault((method, rank, held, seed), {}).setdefault(patient, []).append(dice)
    counts: dict[str, int] = {}
    for run in by_run.values():
        for patient, values in run.items():
            counts[patient] = max(len(values), counts.get(patient, 0))
    return _Study(
        ranks={method: sorted(values) for method, values in ranks.items()},
        patients={fold: sorted(patients[fold]) for fold in sorted(patients)},
        seeds={count: sorted(values) for count, values in seeds.items()},
        scores=by_run,
        counts=counts,
    )


def _check_table(scores: pd.DataFrame) -> None:
    missing = [name for name in COLUMNS if name not in scores]
    if missing:
        raise SegraftError(f"The table of scores has no column {', '.join(missing)}: give all of {', '.join(COLUMNS)}.")
    if scores.empty:
        raise SegraftError("The table of scores has no rows: run the study first.")
    for name, (holds, what) in _KINDS.items():
        if not holds(scores[name]) or (name != "dice" and scores[name].isna().any()):
            raise SegraftError(f"The column {name} of the scores does not hold {what}: give one in every row.")
    wrong = scores[~scores["dice"].between(0, 1)]
    if len(wrong):
        row = wrong.iloc[0]
        raise SegraftError(
            f"{row['method']}, rank {row['rank']}: the Dice of patient {row['patient']} is {row['dice']}, "
            "not between 0 and 1: score that run again."
        )
    folds = scores.groupby("patient")["fold"].nunique()
    if folds.max() > 1:
        raise SegraftError(f"Patient {folds.idxmax()} is in {folds.max()} folds: split the cohort by patient.")


def _held_out(folds: object) -> Folds:
    if not isinstance(folds, frozenset | tuple) or not all(isinstance(fold, Integral) for fold in folds):
        raise SegraftError(f"held_out is {folds!r} where folds are expected: give a frozenset or tuple of numbers.")
    return frozenset(folds)


def _listed(folds: Iterable[int]) -> str:
    return "{" + ", ".join(str(fold) for fold in sorted(folds)) + "}"
