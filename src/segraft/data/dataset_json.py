"""The Decathlon's and nnU-Net's layout: a `dataset.json` that lists cases, labels and modalities."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from segraft.data.case import Case
from segraft.data.channel_files import Given, files_of, names_of, scan_name
from segraft.data.dicom_seg import is_segmentation, segmentation_file
from segraft.data.labels import Labels
from segraft.data.listed import Listed, identities, inside, patients_by
from segraft.data.nnunet_raw import raw_training
from segraft.errors import SegraftError

LISTING = "dataset.json"
_Text = Annotated[str, StringConstraints(min_length=1)]
_IGNORE = "ignore"
_LARGEST_LABEL = 65_535  # what a mask file can hold (uint16)


def read_dataset_json(path: Path, patient_pattern: str | None) -> Listed:
    """Read a `dataset.json`, or the one in a folder.

    `labels` may be `{"1": "liver"}` or nnU-Net's `{"liver": 1}`, or its regions, `{"whole tumor": [1, 2], "core": 2}`
    with `regions_class_order`. A case's id is its image's file name without `.nii`/`.nii.gz` (and without nnU-Net's
    `_0000`), of several files what their names begin with, or their folder's; or its path where several images share a
    name. Its patient is the entry's "patient", else as the pattern says, else the id.

    A label is a NIfTI file, or a DICOM SEG (a file, or a folder with that alone) whose segments have the labels' names.

    Where `modality` (or `channel_names`) lists several, each entry's "image" is as `channel_files` says. Of nnU-Net
    v2's raw data sets, which list no cases, see `nnunet_raw`; a case's id is its identifier there.

    Raises:
        SegraftError: no such file, not JSON, keys missing or of a wrong type, no training cases, a case listed twice, a
            path that leaves the folder, channels that are not those listed, or a pattern that fits no patient.
    """
    if path.is_dir():
        path = path / LISTING
    content = load_json(path)
    raw = raw_training(content, path)
    listing = _validated(content if raw is None else {**content, "training": list(raw.values())}, path, _Listing)
    cure = 'correct the pattern, or give that entry a "patient"'
    patient = patients_by(patient_pattern, path, cure=cure)
    channels = names_of([entry.image for entry in listing.training], listing.modalities, path)
    images = [
        files_of(entry.image, channels, lambda name: _inside(path, name), who=f"training entry {place} of {path}")
        for place, entry in enumerate(listing.training)
    ]
    firsts = [next((name for name in names if name is not None), "") for names in images]
    ids = list(raw or ()) or identities(firsts, [scan_name(names, channels) for names in images])
    labels = listing.known()
    cases = tuple(
        Case(
            id=identity,
            patient=entry.patient or patient(identity),
            images=tuple(None if name is None else _inside(path, name) for name in names),
            channels=channels if len(channels) > 1 else (),
            **_label(path, entry.label, labels),
        )
        for entry, names, identity in zip(listing.training, images, ids, strict=True)
    )
    if not cases:
        raise SegraftError(f'{path} lists no cases under "training": add at least one.')
    twice = [case for case, count in Counter(case.id for case in cases).items() if count > 1]
    if twice:
        raise SegraftError(f"{path} lists the case {twice[0]} more than once: keep one entry per case.")
    return Listed(
        name=listing.name or path.resolve().parent.name,
        path=path,
        labels=labels,
        modalities=channels,
        cases=cases,
    )


def read_labels(path: Path) -> Labels:
    """The labels that a `dataset.json` names, value -> name, background left out; what is no label is not looked at.

    Raises:
        SegraftError: as `read_dataset_json`.
    """
    return _validated(load_json(path), path, _Labels).known()


def _inside(path: Path, name: str) -> Path:
    return inside(path.parent, name, who=str(path), leaves="its folder", cure=f"move the file beside {LISTING}")


def _label(path: Path, name: str | None, known: Labels) -> dict[str, Any]:
    """What a `Case` says of its label."""
    if name is None:
        return {"label": None}
    file = _inside(path, name)
    return {"label": segmentation_file(file), "segment_labels": known} if is_segmentation(file) else {"label": file}


class _Entry(BaseModel):
    image: Given
    label: _Text | None = None
    patient: Annotated[_Text, Field(coerce_numbers_to_str=True)] | None = None


class _Labels(BaseModel):
    """The labels of a `dataset.json` alone."""

    labels: dict[int, _Text]
    regions: dict[int, tuple[int, ...]]

    def known(self) -> Labels:
        return Labels(self.labels, self.regions)

    @model_validator(mode="before")
    @classmethod
    def _regions_apart(cls, content: Any) -> Any:
        """Of nnU-Net's {"whole": [1, 2], "core": 2}, take apart what each is painted with and what it covers."""
        labels = content.get("labels") if isinstance(content, dict) else None
        if isinstance(labels, dict) and _IGNORE in labels:
            raise ValueError(
                f'the label "{_IGNORE}" is nnU-Net\'s for voxels that nobody has annotated, which a training here does '
                "not leave out: annotate them and take it out"
            )
        if not isinstance(labels, dict) or not any(isinstance(value, list) for value in labels.values()):
            return {**content, "regions": {}} if isinstance(content, dict) else content
        covers = {name: value if isinstance(value, list) else [value] for name, value in labels.items()}
        if not all(type(value) is int and 0 <= value <= _LARGEST_LABEL for each in covers.values() for value in each):
            raise ValueError(f"labels must be numbers in 0…{_LARGEST_LABEL}, or lists of them")
        covers = {name: values for name, values in covers.items() if any(values)}
        order = content.get("regions_class_order")
        if (
            not isinstance(order, list)
            or not all(type(number) is int and number > 0 for number in order)
            or not len(set(order)) == len(order) == len(covers)
        ):
            raise ValueError(
                f"as some labels are regions of several numbers, regions_class_order must list another number above 0 "
                f"for each of the {len(covers)} labels"
            )
        painted = dict(zip(covers, order, strict=True))
        return {**content, "labels": painted, "regions": {painted[name]: values for name, values in covers.items()}}

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

    @property
    def modalities(self) -> tuple[str, ...]:
        """In the order of the channels."""
        return tuple(self.modality[number] for number in sorted(self.modality))


def load_json(path: Path, *, what: str = "a dataset.json or the folder that holds one") -> Any:
    """What a list holds.

    Args:
        path: of the list.
        what: to give instead, for messages.

    Raises:
        SegraftError: there is none, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SegraftError(f"{path} cannot be read ({error.strerror}): give {what}.") from error
    except ValueError as error:  # not JSON, or not text at all
        raise SegraftError(f"{path} is not JSON ({error}): correct the file.") from error


def _validated(content: Any, path: Path, kind: type[_Kind]) -> _Kind:
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
