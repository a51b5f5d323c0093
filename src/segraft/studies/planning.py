"""From a study and its cohorts to the runs it takes."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Self

import numpy as np
from rich.console import Console

from segraft.data.cohort import Case, Cohort
from segraft.data.scans import load_scan
from segraft.data.splits import draw, folds
from segraft.errors import SegraftError
from segraft.jobs.watching import watched
from segraft.studies.run import Run, Runs, write_json
from segraft.studies.spec import Arm, Arms, Base, Study, arms_of
from segraft.training.settings import TrainingSettings, check_settings
from segraft.training.strategies import selectors

FORMAT = 1
"""Of the identity of a run: raised when the same identity comes to mean something else."""

PLAN = "plan.json"


@dataclass(frozen=True)
class Planned:
    """A run and its place in the study.

    Attributes:
        key: of the run.
        arm: name of the arm; of a base, its own name.
        held_out: folds that it did not train on; empty for a base.
        seed: of the training.
        base: key of the run of its base; None for a base itself.
    """

    key: str
    arm: str
    held_out: tuple[int, ...] = ()
    seed: int = 0
    base: str | None = None


@dataclass(frozen=True)
class Plan:
    """All runs of a study, bases first.

    Attributes:
        study: the study.
        arms: name -> arm, in the study's order.
        runs: bases first.
        folds: patient -> fold.
        patients: case -> patient.
    """

    study: Study
    arms: dict[str, Arm]
    runs: tuple[Planned, ...]
    folds: dict[str, int]
    patients: dict[str, str]

    def write(self, path: Path) -> None:
        """As JSON."""
        content = {
            "study": self.study.model_dump(mode="json"),
            "runs": [asdict(run) for run in self.runs],
            "folds": self.folds,
            "patients": self.patients,
        }
        write_json(path, content)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Of the file that `write` wrote.

        Raises:
            SegraftError: there is none, or it is of another version of Segraft.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SegraftError(f"{path.parent} holds no study: give the folder that `study run` wrote.") from error
        try:
            study = Study.model_validate(content["study"])
            runs = tuple(Planned(**{**run, "held_out": tuple(run["held_out"])}) for run in content["runs"])
            return cls(study, _by_name(study), runs, content["folds"], content["patients"])
        except (ValueError, KeyError, TypeError) as error:
            raise SegraftError(f"{path} is no plan of this version of Segraft: remove it and run the study.") from error


def plan(study: Study, runs: Runs, *, device: str = "auto", console: Console | None = None) -> Plan:
    """Draw patients and folds, and put every run that the study takes into its folder.

    Args:
        study: with its cohorts.
        runs: where the folders of the runs are.
        device: `auto`, `cpu`, `cuda`, `mps`.
        console: for progress; None is silent.

    Raises:
        SegraftError: a cohort is missing or cannot be read, has too few patients, or no such label; an unknown device.
    """
    if study.data is None or study.pretrain_data is None:
        missing = "--data" if study.data is None else "--pretrain-data"
        raise SegraftError(f"the study {study.name} names no cohort for {missing}: give one.")
    # Read by processes elsewhere, so paths are whole; links in them are kept, as they may lead elsewhere there.
    data, pretrain_data = study.data.absolute(), study.pretrain_data.absolute()
    study = study.model_copy(update={"data": data, "pretrain_data": pretrain_data})
    cohort = Cohort.read(data, patient_pattern=study.patient_pattern)
    patients = len({case.patient for case in cohort.cases})
    cases = draw(cohort.cases, study.patients or patients, seed=study.split_seed)
    digests = _Digests(console if console is not None and console.is_terminal else None)
    split = [held for _, held in folds(cases, study.folds, seed=study.split_seed)]
    _check_apart(cohort, cases, digests)
    target = _Target(cohort, cohort.select_labels(study.labels), cases, digests, split)
    planned = []
    bases: dict[str, str] = {}
    for name, base in study.bases.items():
        run = _base(study, base, cases, len(target.labels), device, digests)
        runs.add(run)
        bases[name] = run.key
        planned.append(Planned(run.key, name, seed=run.identity["settings"]["seed"]))
    for arms in study.arms:
        for arm in arms_of(arms):
            for seed, held_out in _trainings(study, arm):
                run = target.run(study, arms, arm, bases[arm.base], seed, held_out, device)
                runs.add(run)
                planned.append(Planned(run.key, arm.name, held_out, seed, run.base))
    return Plan(
        study,
        _by_name(study),
        tuple(planned),
        {case.patient: fold for fold, held in enumerate(split) for case in held},
        {case.id: case.patient for case in cases},
    )


def _by_name(study: Study) -> dict[str, Arm]:
    return {arm.name: arm for arms in study.arms for arm in arms_of(arms)}


def _trainings(study: Study, arm: Arm) -> list[tuple[int, tuple[int, ...]]]:
    """(seed, folds held out) of every training of an arm.

    Each fold alone; and, to choose a rank without it, each pair: what is trained without j and k tells, on j, which
    rank to take for k, and on k, which to take for j.
    """
    if arm.trains_nothing:
        return [(0, tuple(range(study.folds)))]
    held: list[tuple[int, ...]] = [(fold,) for fold in range(study.folds)]
    if study.nested and arm.rank is not None:
        held += combinations(range(study.folds), 2)
    return [(seed, out) for seed in study.seeds for out in held if len(out) < study.folds]


def _check_apart(cohort: Cohort, cases: Sequence[Case], digests: "_Digests") -> None:
    """One scan under the names of two patients would be trained on and tested on."""
    patients: dict[str, str] = {}
    for case in digests.watched(cases):
        other = patients.setdefault(digests.image(case), case.patient)
        if other != case.patient:
            raise SegraftError(
                f"{cohort.path} has the same scan for the patients {other} and {case.patient} ({case.image}): keep "
                "one, or give both the same patient."
            )


@dataclass(frozen=True)
class _Target:
    """The cohort that the bases are adapted to."""

    cohort: Cohort
    labels: Mapping[int, str]
    cases: Sequence[Case]
    digests: "_Digests"
    split: Sequence[Sequence[Case]]

    def run(
        self, study: Study, arms: Arms, arm: Arm, base: str, seed: int, held_out: tuple[int, ...], device: str
    ) -> Run:
        """One adaptation, tested on the folds it did not train on."""
        test = {case.id: case for fold in held_out for case in self.split[fold]}
        train = {case.id: case for case in self.cases if case.id not in test and not arm.trains_nothing}
        settings = _on(device, study.settings(arms.training, seed=seed))
        identity = {
            "format": FORMAT,
            "kind": "adapt",
            "base": base,
            "spec": None if arm.trains_nothing else arm.spec(selectors([arm.strategy])).to_dict(),
            "labels": _in_order(self.labels),
            "preparation": study.preparation,
            "settings": {"device": device} if arm.trains_nothing else settings.model_dump(mode="json"),
            "train": self.digests.of_all(train.values()),
            "test": self.digests.of_all(test.values()),
        }
        where, pattern = str(self.cohort.path), self.cohort.patient_pattern
        return Run("adapt", identity, where, pattern, tuple(sorted(train)), tuple(sorted(test)), base)


def _base(
    study: Study, base: Base, tested: Sequence[Case], count_of_labels: int, device: str, digests: "_Digests"
) -> Run:
    """The pre-training of one base, on patients none of whose scans is in the study itself (`tested`)."""
    taken, patients = {digests.image(case) for case in tested}, {case.patient for case in tested}
    assert study.pretrain_data is not None  # noqa: S101
    cohort = Cohort.read(study.pretrain_data, patient_pattern=study.patient_pattern)
    served = {case.patient for case in digests.watched(cohort.cases) if digests.image(case) in taken}
    if cohort.path.parent == Path(study.data or "").parent:
        served |= patients  # two lists of one folder: other scans of the same patients
    free = [case for case in cohort.cases if case.patient not in served]
    count = base.patients or len({case.patient for case in free})
    if not free:
        raise SegraftError(f"every patient of {cohort.path} is in the study: pre-train on others, or draw fewer.")
    cases = sorted(draw(free, count, seed=study.split_seed), key=lambda case: case.id)
    labels = cohort.select_labels(study.pretrain_labels)
    if len(labels) != count_of_labels:
        raise SegraftError(
            f"the bases of the study {study.name} learn {len(labels)} labels ({', '.join(labels.values())}), but "
            f"{count_of_labels} are asked of the adaptations: name as many of each with labels and pretrain_labels."
        )
    settings = _on(device, check_settings(**base.training))
    identity = {
        "format": FORMAT,
        "kind": "pretrain",
        "network": base.network,
        "arguments": base.arguments,
        "labels": _in_order(labels),
        "preparation": study.preparation,
        "settings": settings.model_dump(mode="json"),
        "train": digests.of_all(cases),
    }
    return Run("pretrain", identity, str(cohort.path), study.patient_pattern, tuple(case.id for case in cases))


def _on(device: str, settings: TrainingSettings) -> TrainingSettings:
    return check_settings(**{**settings.model_dump(), "device": device})


def _in_order(labels: Mapping[int, str]) -> list[tuple[str, str]]:
    """(value, name) as the network's outputs stand for them; a mapping would lose the order in the digest."""
    return [(str(value), name) for value, name in labels.items()]


class _Digests:
    """What cases are recognised by, each read once."""

    def __init__(self, console: Console | None) -> None:
        self.watched = watched("fingerprinting scans", console)
        self._images: dict[Path, str] = {}
        self._whole: dict[tuple[str, str], str] = {}

    def image(self, case: Case) -> str:
        """Of the voxels of its image."""
        if case.image not in self._images:
            self._images[case.image] = case.digest()
        return self._images[case.image]

    def of_all(self, cases: Iterable[Case]) -> dict[str, str]:
        """Case -> digest of its image, where that lies in space, and its label file."""
        return {case.id: self._of(case) for case in cases}

    def _of(self, case: Case) -> str:
        if case.label is None:
            raise SegraftError(f'the case {case.id} ({case.image}) has no label: add a "label" to its entry.')
        place = str(case.image), str(case.label)
        if place not in self._whole:
            affine = np.asarray(load_scan(case.image).affine, dtype="<f8")
            try:
                label = case.label.read_bytes()
            except OSError as error:
                raise SegraftError(f"the label {case.label} cannot be read ({error.strerror}): add it.") from error
            self._whole[place] = "-".join((self.image(case), _digest(affine.tobytes()), _digest(label)))
        return self._whole[place]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
