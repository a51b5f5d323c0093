"""The Decathlon's and nnU-Net's layout: a `dataset.json` that lists cases, labels and modalities."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, Field, StringConstraints, ValidationError, field_validator

from segraft.data.case import Case
from segraft.data.listed import Listed, identities, inside, patients_by, stem
from segraft.errors import SegraftError

LISTING = "dataset.json"
_Text = Annotated[str, StringConstraints(min_length=1)]
_LARGEST_LABEL = 65_535  # what a mask file can hold (uint16)


def read_dataset_json(path: Path, patient_pattern: str | None) -> Listed:
    """Read a `dataset.json`, or the one in a folder.

    `labels` may be `{"1": "liver"}` or nnU-Net's `{"liver": 1}`. A case's id is its image's file name without
    `.nii`/`.nii.gz` (and without nnU-Net's `_0000`), or its path where several images share a name. Its patient is
    the entry's "patient", else as the pattern says, else the id.

    Raises:
        SegraftError: no such file, not JSON, keys missing or of a wrong type, no training cases, a case listed twice, a
            path that leaves the folder, or a pattern that fits no patient.
    """
    if path.is_dir():
        path = path / LISTING
    listing = _parse(path, _Listing)
    cure = 'correct the pattern, or give that entry a "patient"'
    patient = patients_by(patient_pattern, path, cure=cure)
    images = [entry.image for entry in listing.training]
    cases = tuple(
        Case(
            id=identity,
            patient=entry.patient or patient(identity),
            image=_inside(path, entry.image),
            label=None if entry.label is None else _inside(path, entry.label),
        )
        for entry, identity in zip(listing.training, identities(images, [stem(image) for image in images]), strict=True)
    )
    if not cases:
        raise SegraftError(f'{path} lists no cases under "training": add at least one.')
    twice = [case for case, count in Counter(case.id for case in cases).items() if count > 1]
    if twice:
        raise SegraftError(f"{path} lists the case {twice[0]} more than once: keep one entry per case.")
    return Listed(
        name=listing.name or path.resolve().parent.name,
        path=path,
        labels=listing.labels,
        modalities=tuple(listing.modality[number] for number in sorted(listing.modality)),
        cases=cases,
    )


def read_labels(path: Path) -> dict[int, str]:
    """The labels that a `dataset.json` names, value -> name, background left out; its other keys are not looked at.

    Raises:
        SegraftError: as `read_dataset_json`.
    """
    return _parse(path, _Labels).labels


def _inside(path: Path, name: str) -> Path:
    return inside(path.parent, name, who=str(path), leaves="its folder", cure=f"move the file beside {LISTING}")


class _Entry(BaseModel):
    image: _Text
    label: _Text | None = None
    patient: Annotated[_Text, Field(coerce_numbers_to_str=True)] | None = None


class _Labels(BaseModel):
    """The labels of a `dataset.json` alone."""

    labels: dict[int, _Text]

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


_Kind = TypeVar("_Kind", bound=_Labels)


class _Listing(_Labels):
    """The keys of `dataset.json` that are read; others are ignored."""

    name: str | None = None
    modality: dict[int, str] = Field(default_factory=dict, validation_alias=AliasChoices("modality", "channel_names"))
    training: list[_Entry]


def _parse(path: Path, kind: type[_Kind]) -> _Kind:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SegraftError(
            f"{path} cannot be read ({error.strerror}): give a dataset.json or the folder that holds one."
        ) from error
    except ValueError as error:  # not JSON, or not text at all
        raise SegraftError(f"{path} is not JSON ({error}): correct the file.") from error
    try:
        return kind.model_validate(content)
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
