"""Drawing training cases and folds, always by patient: scans of one patient are never on both sides."""

from collections.abc import Sequence

import numpy as np

from segraft.data.cohort import Case
from segraft.errors import SegraftError


def draw(cases: Sequence[Case], count: int, *, seed: int) -> tuple[Case, ...]:
    """Draw `count` patients and return all their cases.

    The order of `cases` does not matter, and with one seed a smaller draw begins every larger one, so that a
    comparison over the number of training patients adds patients and never exchanges them.

    Raises:
        SegraftError: `count` is not positive, or there are fewer patients.
    """
    if count < 1:
        raise SegraftError(f"{count} patients were asked for: ask for at least 1.")
    patients = _shuffled_patients(cases, seed)
    if count > len(patients):
        raise SegraftError(
            f"{count} patients were asked for but there are only {len(patients)}: ask for fewer or add cases."
        )
    return tuple(case for patient in patients[:count] for case in _of(cases, {patient}))


def folds(cases: Sequence[Case], n: int, *, seed: int) -> list[tuple[tuple[Case, ...], tuple[Case, ...]]]:
    """Split into `n` folds by patient.

    Returns:
        One (train, held-out) pair per fold, each sorted by case id. Every case is held out exactly once; the
        folds' numbers of patients differ by at most one.

    Raises:
        SegraftError: fewer than 2 folds, or more folds than patients.
    """
    if n < 2:
        raise SegraftError(f"{n} folds were asked for: ask for at least 2.")
    patients = _shuffled_patients(cases, seed)
    if n > len(patients):
        raise SegraftError(
            f"{n} folds were asked for but there are only {len(patients)} patients: ask for fewer or add cases."
        )
    everyone = set(patients)
    held_out = (set(patients[fold::n]) for fold in range(n))
    return [(_of(cases, everyone - held), _of(cases, held)) for held in held_out]


def _shuffled_patients(cases: Sequence[Case], seed: int) -> list[str]:
    patients = sorted({case.patient for case in cases})
    return [patients[place] for place in np.random.default_rng(seed).permutation(len(patients))]


def _of(cases: Sequence[Case], patients: set[str]) -> tuple[Case, ...]:
    return tuple(sorted((case for case in cases if case.patient in patients), key=lambda case: case.id))
