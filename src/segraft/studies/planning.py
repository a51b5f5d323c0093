"""From a study and its cohorts to the runs it takes."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console

from segraft.data.case import images_of
from segraft.data.cohort import Case, Cohort
from segraft.data.labels import Labels
from segraft.data.splits import draw
from segraft.errors import SegraftError
from segraft.jobs.unlabelled import read_unlabelled
from segraft.jobs.watching import watched
from segraft.studies.designs import Planned, Training, design_of
from segraft.studies.run import Run, Runs, digest_of, write_json
from segraft.studies.spec import Arm, Arms, Base, Start, Study, arms_of
from segraft.training.settings import TrainingSettings, checked_as

FORMAT = 1
"""Of the identity of a run: raised when the same identity comes to mean something else."""

PLAN = "plan.json"


@dataclass(frozen=True)
class Plan:
    """All runs of a study, bases first.

    Attributes:
        study: the study.
        arms: name -> arm, in the study's order.
        runs: bases first.
        folds: patient -> fold; empty in a study of shots.
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
    """Draw patients, settle who is trained on and who is tested on, and put every run into its folder.

    Args:
        study: with its cohorts.
        runs: where the folders of the runs are.
        device: `auto`, `cpu`, `cuda`, `mps`.
        console: for progress; None is silent.

    Raises:
        SegraftError: a cohort or a file of weights is missing or cannot be read, a cohort has too few patients, or no
            such label; an unknown device.
    """
    study = _placed(study)
    cohort = Cohort.read(_given(study, "data"), patient_pattern=study.patient_pattern)
    patients = len({case.patient for case in cohort.cases})
    cases = draw(cohort.cases, study.patients or patients, seed=study.split_seed)
    digests = _Digests(console if console is not None and console.is_terminal else None)
    split = design_of(study).split(cases)
    _check_apart(cohort, cases, digests)
    target = _Target(cohort, cohort.select_labels(study.labels), digests)
    planned = []
    bases: dict[str, str] = {}
    for name, base in study.bases.items():
        run = MAKING[base.start](study, base, cases, target, device)
        runs.add(run)
        bases[name] = run.key
        planned.append(Planned(run.key, name, seed=run.identity.get("settings", {}).get("seed", 0)))
    for arms in study.arms:
        for arm in arms_of(arms):
            for training in split.trainings(arm):
                run = target.run(study, arms, arm, bases[arm.base], training, device)
                runs.add(run)
                place = (training.held_out, training.seed, run.base, training.shots)
                planned.append(Planned(run.key, arm.name, *place))
    whose = {case.id: case.patient for case in cases}
    return Plan(study, _by_name(study), tuple(planned), split.folds, whose)


def _placed(study: Study) -> Study:
    """With whole paths, as processes elsewhere read them; links in them are kept, as they may lead elsewhere there."""
    cohorts = [("data", "")]
    starts = {base.start for base in study.bases.values()}
    if "masked" in starts and study.pretrain_data is None:
        study = study.model_copy(update={"pretrain_data": study.data})  # the images of patients who are not drawn
    if "labels" in starts:
        cohorts.append(("pretrain_data", ", or --weights"))
    for field, instead in cohorts:
        if getattr(study, field) is None:
            option = f"--{field.replace('_', '-')}"
            raise SegraftError(f"the study {study.name} names no cohort for {option}: give one{instead}.")
    paths = {field: path.absolute() for field in ("data", "pretrain_data") if (path := getattr(study, field))}
    bases = {
        name: base if base.weights is None else base.model_copy(update={"weights": base.weights.absolute()})
        for name, base in study.bases.items()
    }
    return study.model_copy(update={**paths, "bases": bases})


def _given(study: Study, field: str) -> Path:
    path: Path | None = getattr(study, field)
    assert path is not None  # noqa: S101  `_placed` has looked
    return path


def _by_name(study: Study) -> dict[str, Arm]:
    return {arm.name: arm for arms in study.arms for arm in arms_of(arms)}


def _check_apart(cohort: Cohort, cases: Sequence[Case], digests: "_Digests") -> None:
    """One scan under the names of two patients would be trained on and tested on."""
    patients: dict[str, str] = {}
    for case in digests.watched(cases):
        for image in sorted(images_of(digests.image(case))):
            other = patients.setdefault(image, case.patient)
            if other != case.patient:
                raise SegraftError(
                    f"{cohort.path} has the same scan for the patients {other} and {case.patient} ({case.image}): keep "
                    "one, or give both the same patient."
                )


@dataclass(frozen=True)
class _Target:
    """The cohort that the bases are adapted to."""

    cohort: Cohort
    labels: Labels
    digests: "_Digests"

    def run(self, study: Study, arms: Arms, arm: Arm, base: str, training: Training, device: str) -> Run:
        """One adaptation, and its test."""
        settings = _on(device, study.settings(arms.training, seed=training.seed))
        identity = {
            "format": FORMAT,
            "kind": "adapt",
            "base": base,
            "spec": None if arm.trains_nothing else arm.spec().to_dict(),
            **_labels_of(self.cohort, self.labels),
            "preparation": study.preparation,
            "settings": {"device": device} if arm.trains_nothing else settings.model_dump(mode="json"),
            "train": self.digests.of_all(training.train, self.labels),
            "test": self.digests.of_all(training.test, self.labels),
        }
        where, pattern = str(self.cohort.path), self.cohort.patient_pattern
        train, test = (tuple(case.id for case in cases) for cases in (training.train, training.test))
        return Run("adapt", identity, where, pattern, train, test, base)


def _started(kind: str, base: Base, target: _Target) -> dict[str, Any]:
    """What a base depends on that is not pre-trained on labels: its outputs stand for those of the study."""
    channels = len(target.cohort.channels)
    return {
        "format": FORMAT,
        "kind": kind,
        "network": base.network,
        "arguments": base.arguments if channels == 1 else {"in_channels": channels, **base.arguments},
        "labels": list(base.labels),
        "task": list(target.labels.values()),
    }


def _imported(study: Study, base: Base, tested: Sequence[Case], target: _Target, device: str) -> Run:  # noqa: ARG001
    """A base of weights from elsewhere, which are known by their bytes."""
    assert base.weights is not None  # noqa: S101
    identity = _started("import", base, target) | {"weights": digest_of(base.weights)}
    return Run("import", identity, str(base.weights), None, ())


def _random(study: Study, base: Base, tested: Sequence[Case], target: _Target, device: str) -> Run:  # noqa: ARG001
    """A base that is not pre-trained."""
    return Run("random", _started("random", base, target), "", None, ())


def _masked(study: Study, base: Base, tested: Sequence[Case], target: _Target, device: str) -> Run:
    """A base whose encoder learns to complete scans, of patients none of whose scans is in the study itself."""
    assert base.encoder is not None  # noqa: S101
    cohort = read_unlabelled(_given(study, "pretrain_data"), study.patient_pattern)
    cases = _others(study, base, cohort, tested, target.digests)
    identity = _started("masked", base, target) | {
        "encoder": base.encoder.model_dump(mode="json"),
        "preparation": study.preparation,
        "settings": _on(device, base.settings()).model_dump(mode="json"),
        "train": target.digests.of_all(cases, None),
    }
    return Run("masked", identity, str(cohort.path), study.patient_pattern, tuple(case.id for case in cases))


def _folder(data: Path) -> Path:
    """Where a cohort's files are, of its list or of the folder that it is."""
    return data if data.is_dir() else data.parent


def _others(study: Study, base: Base, cohort: Cohort, tested: Sequence[Case], digests: "_Digests") -> list[Case]:
    """What a base is pre-trained on: cases of patients none of whose scans is in the study itself (`tested`)."""
    taken = {image for case in tested for image in images_of(digests.image(case))}
    patients = {case.patient for case in tested}
    served = {case.patient for case in digests.watched(cohort.cases) if images_of(digests.image(case)) & taken}
    if _folder(cohort.path) == _folder(_given(study, "data")):
        served |= patients  # two lists of one folder: other scans of the same patients
    free = [case for case in cohort.cases if case.patient not in served]
    count = base.patients or len({case.patient for case in free})
    if not free:
        raise SegraftError(f"every patient of {cohort.path} is in the study: pre-train on others, or draw fewer.")
    return sorted(draw(free, count, seed=study.split_seed), key=lambda case: case.id)


def _pretrained(study: Study, base: Base, tested: Sequence[Case], target: _Target, device: str) -> Run:
    """A base that learns labels, of patients none of whose scans is in the study itself."""
    cohort = Cohort.read(_given(study, "pretrain_data"), patient_pattern=study.patient_pattern)
    cases = _others(study, base, cohort, tested, target.digests)
    labels = cohort.select_labels(study.pretrain_labels)
    settings = _on(device, base.settings())
    identity = {
        "format": FORMAT,
        "kind": "pretrain",
        "network": base.network,
        "arguments": base.arguments,
        **_labels_of(cohort, labels),
        "preparation": study.preparation,
        "settings": settings.model_dump(mode="json"),
        "train": target.digests.of_all(cases, labels),
    }
    return Run("pretrain", identity, str(cohort.path), study.patient_pattern, tuple(case.id for case in cases))


MAKING: dict[Start, Callable[[Study, Base, Sequence[Case], _Target, str], Run]] = {
    "labels": _pretrained,
    "masked": _masked,
    "weights": _imported,
    "random": _random,
}
"""What plans the run that makes a base, from the study, the base, the study's own cases, its target and the device."""


def _on(device: str, settings: TrainingSettings) -> TrainingSettings:
    return checked_as(type(settings), {**settings.model_dump(), "device": device})


def _labels_of(cohort: Cohort, labels: Labels) -> dict[str, Any]:
    """How to ask the cohort for them and their names, as the network's outputs stand for them, and what regions cover.

    In lists, as a mapping would lose the order in the digest.
    """
    found: dict[str, Any] = {
        "labels": list(zip(labels.asked_of(Labels.of(cohort.labels)), labels.values(), strict=True))
    }
    if labels.regions:
        found["regions"] = [(str(value), covers) for value, covers in labels.regions.items()]
    return found


class _Digests:
    """What cases are recognised by, each read once."""

    def __init__(self, console: Console | None) -> None:
        self.watched = watched("fingerprinting scans", console)
        self._images: dict[tuple[Path | None, ...], str] = {}
        self._whole: dict[tuple[Case, tuple[int, ...]], str] = {}

    def image(self, case: Case) -> str:
        """Of the voxels of its image, as of `Case.digest`."""
        if case.images not in self._images:
            self._images[case.images] = case.digest()
        return self._images[case.images]

    def of_all(self, cases: Iterable[Case], labels: Labels | None) -> dict[str, str]:
        """Case -> digest of its image, where that lies in space, and its label, unless none are asked for."""
        return {case.id: self._of(case, labels) for case in cases}

    def _of(self, case: Case, labels: Labels | None) -> str:
        place = case, () if labels is None else labels.values_covered
        if place not in self._whole:
            label = "" if labels is None else case.label_digest(labels)
            there = [channel for channel in case.load().channels if channel is not None]
            grids = b"".join(np.asarray(channel.affine, dtype="<f8").tobytes() for channel in there)
            self._whole[place] = "-".join((self.image(case), _digest(grids), label))
        return self._whole[place]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
