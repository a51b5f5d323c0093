"""What kinds of studies there are: who is trained on, who is tested on, and which rows of the results count.

To add a kind, add a class that `Design` fits, its condition to `design_of`, and what its report says to
`segraft.studies.report.KINDS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import pandas as pd

from segraft.data.cohort import Case
from segraft.data.splits import draw, folds
from segraft.errors import SegraftError
from segraft.studies.spec import Arm, Study


@dataclass(frozen=True)
class Planned:
    """A run and its place in the study.

    Attributes:
        key: of the run.
        arm: name of the arm; of a base, its own name.
        held_out: folds that it did not train on; empty for a base, and in a study of shots.
        seed: of the training.
        base: key of the run of its base; None for a base itself.
        shots: patients that it trained on, in a study of shots; 0 for what trains nothing, which stands for all.
    """

    key: str
    arm: str
    held_out: tuple[int, ...] = ()
    seed: int = 0
    base: str | None = None
    shots: int | None = None


@dataclass(frozen=True)
class Training:
    """One training of an arm, with the cases it takes, each sorted by id; the other fields as of `Planned`."""

    train: tuple[Case, ...]
    test: tuple[Case, ...]
    seed: int = 0
    held_out: tuple[int, ...] = ()
    shots: int | None = None


class Split(Protocol):
    """The patients of a study, by what they serve for.

    Attributes:
        folds: patient -> fold; empty in a study of shots.
    """

    @property
    def folds(self) -> dict[str, int]: ...  # noqa: D102

    def trainings(self, arm: Arm) -> list[Training]:
        """All that the study takes of an arm."""
        ...


class Design(Protocol):
    """A kind of study.

    Attributes:
        columns: of the table of scores, beside those that all studies have.
        levels: the comparisons that the study holds, each over all arms: each number of shots; None where there is one.
    """

    @property
    def columns(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def levels(self) -> tuple[int | None, ...]: ...  # noqa: D102

    def split(self, cases: Sequence[Case]) -> Split:
        """Who serves for what.

        Raises:
            SegraftError: there are too few patients.
        """
        ...

    def row(self, run: Planned, arm: Arm, fold: int | None) -> dict[str, Any]:
        """The values of `columns` for a patient of a fold that a run was tested on."""
        ...

    def counted(self, rows: pd.DataFrame, level: int | None) -> pd.DataFrame:
        """Of the table of scores, the rows that a comparison is made from: every patient once per seed and scan."""
        ...

    def counts(self, run: Planned, arm: Arm, level: int | None) -> bool:
        """Whether a comparison lacks rows until this run is finished."""
        ...

    def told(self, run: Planned) -> str:
        """What tells the trainings of one arm apart, but for their seeds."""
        ...


@dataclass(frozen=True)
class CrossValidation:
    """Every patient is tested on once, by what was trained without his fold.

    Attributes:
        n: folds.
        seeds: each training is done with each.
        split_seed: of the folds.
        nested: whether a rank is also chosen inside the training folds.
    """

    n: int
    seeds: tuple[int, ...]
    split_seed: int
    nested: bool

    columns = ("held_out", "fold")
    levels = (None,)

    def split(self, cases: Sequence[Case]) -> Split:
        """Folds, by patient."""
        held = tuple(held for _, held in folds(cases, self.n, seed=self.split_seed))
        return _Folds(self, tuple(cases), held)

    def row(self, run: Planned, arm: Arm, fold: int | None) -> dict[str, Any]:
        """What nothing was trained for has held out each fold as well as all."""
        return {"held_out": (fold,) if arm.trains_nothing else run.held_out, "fold": fold}

    def counted(self, rows: pd.DataFrame, level: int | None) -> pd.DataFrame:  # noqa: ARG002  there is one
        """Those in which a patient is predicted by the training that held out his fold alone."""
        return rows.loc[[held == (fold,) for held, fold in zip(rows["held_out"], rows["fold"], strict=True)]]

    def counts(self, run: Planned, arm: Arm, level: int | None) -> bool:  # noqa: ARG002  there is one
        """A training without two folds only serves the choice of a rank."""
        return len(run.held_out) == 1 or arm.trains_nothing

    def told(self, run: Planned) -> str:
        """Such as `without fold 1 and 3`."""
        return f"without fold {' and '.join(str(fold + 1) for fold in run.held_out)}" if run.held_out else ""


@dataclass(frozen=True)
class _Folds:
    design: CrossValidation
    cases: tuple[Case, ...]
    held: tuple[tuple[Case, ...], ...]

    @property
    def folds(self) -> dict[str, int]:
        return {case.patient: fold for fold, held in enumerate(self.held) for case in held}

    def trainings(self, arm: Arm) -> list[Training]:
        """Each fold alone; and, to choose a rank without it, each pair.

        What is trained without j and k tells, on j, which rank to take for k, and on k, which to take for j.
        """
        n = self.design.n
        if arm.trains_nothing:
            return [Training((), _sorted(self.cases), 0, tuple(range(n)))]
        out: list[tuple[int, ...]] = [(fold,) for fold in range(n)]
        if self.design.nested and arm.rank is not None:
            out += combinations(range(n), 2)
        return [self._without(held, seed) for seed in self.design.seeds for held in out if len(held) < n]

    def _without(self, held_out: tuple[int, ...], seed: int) -> Training:
        test = [case for fold in held_out for case in self.held[fold]]
        tested = {case.id for case in test}
        train = [case for case in self.cases if case.id not in tested]
        return Training(_sorted(train), _sorted(test), seed, held_out)


@dataclass(frozen=True)
class FewShot:
    """All arms learn from the same few patients, a draw of them per seed, and are tested on the same others.

    For a seed, fewer shots are the first of more (`segraft.data.splits.draw`). There are no patients to validate on,
    and no rank is chosen: each is an arm of its own.

    Attributes:
        shots: patients to train on.
        test_patients: None means half, rounded down: as many whatever the shots, so that more of them or further seeds
            change no run.
        seeds: each draws patients of its own.
        split_seed: of the patients to test on.
    """

    shots: tuple[int, ...]
    test_patients: int | None
    seeds: tuple[int, ...]
    split_seed: int

    columns = ("shots",)

    @property
    def levels(self) -> tuple[int | None, ...]:
        """One comparison per number of shots."""
        return self.shots

    def split(self, cases: Sequence[Case]) -> Split:
        """Patients to test on, and those left to draw from."""
        patients = len({case.patient for case in cases})
        tested = patients // 2 if self.test_patients is None else self.test_patients
        most, left = max(self.shots), patients - tested
        if tested < 1 or most > left:
            raise SegraftError(
                f"{most} shots were asked for, but of {patients} patients {tested} are tested on, which leaves "
                f"{max(left, 0)} to learn from: ask for fewer --shots or --test-patients, or add labelled scans."
            )
        test = _sorted(draw(cases, tested, seed=self.split_seed))
        held = {case.patient for case in test}
        return _Shots(self, tuple(case for case in cases if case.patient not in held), test)

    def row(self, run: Planned, arm: Arm, fold: int | None) -> dict[str, Any]:  # noqa: ARG002  there are no folds
        """The shots."""
        return {"shots": run.shots}

    def counted(self, rows: pd.DataFrame, level: int | None) -> pd.DataFrame:
        """Those of so many shots, and those of what trains nothing, which stands for any number."""
        return rows[rows["shots"].isin([0, level])]

    def counts(self, run: Planned, arm: Arm, level: int | None) -> bool:  # noqa: ARG002  the run knows
        """As the rows."""
        return run.shots in (0, level)

    def told(self, run: Planned) -> str:
        """Such as `5 shots`."""
        return f"{run.shots} shots" if run.shots else ""


@dataclass(frozen=True)
class _Shots:
    design: FewShot
    pool: tuple[Case, ...]
    test: tuple[Case, ...]

    @property
    def folds(self) -> dict[str, int]:
        return {}

    def trainings(self, arm: Arm) -> list[Training]:
        """One for each seed and number of shots."""
        if arm.trains_nothing:
            return [Training((), self.test, shots=0)]
        return [
            Training(_sorted(draw(self.pool, shots, seed=seed)), self.test, seed, shots=shots)
            for seed in self.design.seeds
            for shots in self.design.shots
        ]


def design_of(study: Study) -> Design:
    """The kind that a study is of."""
    if study.folds is None:
        return FewShot(study.shots, study.test_patients, study.seeds, study.split_seed)
    return CrossValidation(study.folds, study.seeds, study.split_seed, study.nested)


def _sorted(cases: Sequence[Case]) -> tuple[Case, ...]:
    return tuple(sorted(cases, key=lambda case: case.id))
