"""A cohort: the cases, labels and modalities that one `dataset.json` lists."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
from pydantic import AliasChoices, BaseModel, Field, StringConstraints, ValidationError, field_validator

from segraft.data.scans import load_scan
from segraft.errors import SegraftError

_Text = Annotated[str, StringConstraints(min_length=1)]
_LARGEST_LABEL = 65_535  # what a mask file can hold (uint16)


@dataclass(frozen=True)
class Case:
    """One scan of one patient: a NIfTI file or a folder of one DICOM series, with its label file where there is one."""

    id: str
    patient: str
    image: Path
    label: Path | None

    def digest(self) -> str:
        """The first 16 hex digits of the SHA-256 of the image's shape and voxel values.

        Recognises a scan that served before, also renamed, compressed anew or with another header.

        Raises:
            SegraftError: the image cannot be read.
        """
        voxels = load_scan(self.image).get_fdata(dtype=np.float32, caching="unchanged")
        digest = hashlib.sha256(repr(voxels.shape).encode())
        digest.update(np.ascontiguousarray(voxels).data)
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Cohort:
    """What one `dataset.json` lists. `labels` maps mask values to names, background (0) left out.

    `patient_pattern` is the expression that the patients were told by, None where there was none.
    """

    name: str
    path: Path
    labels: dict[int, str]
    modalities: tuple[str, ...]
    cases: tuple[Case, ...]
    patient_pattern: str | None = None

    @classmethod
    def read(cls, path: str | Path, *, patient_pattern: str | None = None) -> "Cohort":
        """Read a `dataset.json` in the layout of the Medical Segmentation Decathlon.

        `labels` may be `{"1": "liver"}` or nnU-Net's `{"liver": 1}`. A case's id is its image's file name without
        `.nii`/`.nii.gz` (and without nnU-Net's `_0000`), or its path where several images share a name. Its patient is
        the entry's "patient", else the first group of `patient_pattern` searched in the id, else the id.

        Args:
            path: the file, or the folder that holds it.
            patient_pattern: regular expression with a group, for cohorts with several scans of a patient.

        Raises:
            SegraftError: no such file, not JSON, keys missing or of a wrong type, no training cases, a case
                listed twice, a path that leaves the folder, or a pattern that fits no patient.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "dataset.json"
        listing = _parse(path)
        pattern = _compiled(patient_pattern)
        names = Counter(_name(entry.image) for entry in listing.training)
        cases = tuple(_case(path, entry, pattern, alone=names[_name(entry.image)] == 1) for entry in listing.training)
        if not cases:
            raise SegraftError(f'{path} lists no cases under "training": add at least one.')
        twice = [case for case, count in Counter(case.id for case in cases).items() if count > 1]
        if twice:
            raise SegraftError(f"{path} lists the case {twice[0]} more than once: keep one entry per case.")
        modalities = tuple(listing.modality[number] for number in sorted(listing.modality))
        name = listing.name or path.resolve().parent.name
        return cls(
            name=name,
            path=path,
            labels=listing.labels,
            modalities=modalities,
            cases=cases,
            patient_pattern=patient_pattern,
        )

    def select_labels(self, asked: Sequence[str]) -> dict[int, str]:
        """The labels asked for, by number or name (case does not matter), in the order asked; all if none is.

        Raises:
            SegraftError: a label that the cohort does not have, or one asked for twice.
        """
        if not asked:
            return dict(self.labels)
        numbers = {name.casefold(): number for number, name in self.labels.items()}
        numbers |= {str(number): number for number in self.labels}
        selected: dict[int, str] = {}
        for label in asked:
            number = numbers.get(label.strip().casefold())
            if number is None:
                known = ", ".join(f"{value} ({name})" for value, name in self.labels.items())
                raise SegraftError(f'{self.path} has no label "{label}": choose among {known}.')
            if number in selected:
                raise SegraftError(
                    f"label {number} ({self.labels[number]}) of {self.path} is asked for twice: name it once."
                )
            selected[number] = self.labels[number]
        return selected


class _Entry(BaseModel):
    image: _Text
    label: _Text | None = None
    patient: Annotated[_Text, Field(coerce_numbers_to_str=True)] | None = None


class _Listing(BaseModel):
    """The keys of `dataset.json` that are read; others are ignored."""

    name: str | None = None
    labels: dict[int, _Text]
    modality: dict[int, str] = Field(default_factory=dict, validation_alias=AliasChoices("modality", "channel_names"))
    training: list[_Entry]

    @field_validator("labels", mode="before")
    @classmethod
    def _numbers_first(cls, labels: Any) -> Any:
        """Turn nnU-Net's {"liver": 1} round; what is neither way is left for the field's own type to refuse."""
        if not isinstance(labels, dict) or not all(type(value) is int for value in labels.values()):
            return labels
        if len(set(labels.values())) < len(labels):
            raise ValueError("two names have the same number")
        return {number: name for name, number in labels.items()}

    @field_validator("labels")
    @classmethod
    def _foreground(cls, labels: dict[int, str]) -> dict[int, str]:
        foreground = {number: labels[number] for number in sorted(labels) if number != 0}
        if not foreground:
            raise ValueError("there is no label beside the background")
        if min(foreground) < 0 or max(foreground) > _LARGEST_LABEL:
            raise ValueError(f"label numbers must lie in 0…{_LARGEST_LABEL}")
        if len({name.casefold() for name in foreground.values()}) < len(foreground):
            raise ValueError("two labels have the same name")
        return foreground


def _parse(path: Path) -> _Listing:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SegraftError(
            f"{path} cannot be read ({error.strerror}): give a dataset.json or the folder that holds one."
        ) from error
    except ValueError as error:  # not JSON, or not text at all
        raise SegraftError(f"{path} is not JSON ({error}): correct the file.") from error
    try:
        return _Listing.model_validate(content)
    except ValidationError as error:
        raise SegraftError(
            f"{path} does not follow the Medical Segmentation Decathlon's layout ({_reasons(error)}): "
            "correct these entries."
        ) from error


def _reasons(error: ValidationError) -> str:
    """The first few complaints, as `training.0.image: Field required`."""
    complaints = []
    for detail in error.errors()[:3]:
        place = ".".join(str(part) for part in detail["loc"])
        complaints.append(f"{place}: {detail['msg']}" if place else detail["msg"])
    more = error.error_count() - len(complaints)
    return "; ".join(complaints) + (f"; and {more} more" if more else "")


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SegraftError(
            f'the patient pattern "{pattern}" is not a regular expression ({error}): correct it.'
        ) from error
    if not compiled.groups:
        raise SegraftError(f'the patient pattern "{pattern}" has no group: put the patient in parentheses.')
    return compiled


def _name(image: str) -> str:
    return PurePosixPath(image).name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")


def _case(path: Path, entry: _Entry, pattern: re.Pattern[str] | None, *, alone: bool) -> Case:
    """A case is named as its file or, where several files share a name (`s1/ct.nii.gz`), as its path."""
    image = _inside(path, entry.image)
    label = None if entry.label is None else _inside(path, entry.label)
    folder = PurePosixPath(entry.image).parent
    identity = _name(entry.image) if alone else "_".join((*folder.parts, _name(entry.image)))
    return Case(id=identity, patient=entry.patient or _patient(path, identity, pattern), image=image, label=label)


def _patient(path: Path, identity: str, pattern: re.Pattern[str] | None) -> str:
    if pattern is None:
        return identity
    found = pattern.search(identity)
    if found is None or not found.group(1):
        raise SegraftError(
            f'the patient pattern "{pattern.pattern}" does not match the case {identity} of {path}: correct the '
            'pattern, or give that entry a "patient".'
        )
    return found.group(1)


def _inside(path: Path, name: str) -> Path:
    """The file that an entry names; a list from elsewhere must not reach files outside its own folder."""
    file = path.parent / name
    try:
        resolved = file.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null character
        raise SegraftError(f'{path} names the file "{name}", which is no usable path: correct it.') from error
    if not resolved.is_relative_to(path.parent.resolve()):
        raise SegraftError(
            f'{path} names the file "{name}", which leaves its folder: move the file beside dataset.json.'
        )
    return file
