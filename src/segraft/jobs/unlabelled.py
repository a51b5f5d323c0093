"""Which scans a training without labels is given."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, Field, StringConstraints, ValidationError

from segraft.data.channel_files import Given, files_of, names_of, scan_name
from segraft.data.cohort import Case, Cohort
from segraft.data.dataset_json import LISTING, load_json
from segraft.data.listed import identities, inside, patients_by
from segraft.data.nnunet_raw import raw_training
from segraft.errors import SegraftError

_Text = Annotated[str, StringConstraints(min_length=1)]


def read_unlabelled(path: str | Path, patient_pattern: str | None = None) -> Cohort:
    """The scans of a cohort, of which none needs a label.

    Of a `.json` list (or the `dataset.json` of a folder) those under "training" and "unlabelled" are taken, each an
    entry with an "image" or that image's file alone; "labels" may be left out. Those under "test" are not: they are to
    be tested on. Of nnU-Net v2's raw data sets all training cases are. Other layouts are read as for any training.

    Args:
        path: as of `Cohort.read`.
        patient_pattern: likewise.

    Raises:
        SegraftError: as `Cohort.read`.
    """
    file = Path(path)
    file = file / LISTING if (file / LISTING).is_file() else file
    if file.suffix != ".json" or file.is_dir():
        return Cohort.read(path, patient_pattern=patient_pattern)
    content = load_json(file, what="a list of scans (.json)")
    raw = raw_training(content, file)
    listing = _validated(content if raw is None else {**content, "training": list(raw.values())}, file)
    entries = listing.entries
    if not entries:
        raise SegraftError(f'{file} lists no scans under "training" or "unlabelled": add at least one.')
    channels = names_of([entry.image for entry in entries], listing.modalities, file)
    files = [
        files_of(entry.image, channels, lambda name: _inside(file, name), who=f"entry {place} of {file}")
        for place, entry in enumerate(entries)
    ]
    firsts = [next((name for name in names if name is not None), "") for names in files]
    known = list(raw or ())  # the first of them
    ids = [*known, *identities(firsts, [scan_name(names, channels) for names in files])[len(known) :]]
    patient = patients_by(patient_pattern, file, cure='correct the pattern, or give that entry a "patient"')
    cases = tuple(
        Case(
            id=identity,
            patient=entry.patient or patient(identity),
            images=tuple(None if name is None else _inside(file, name) for name in names),
            label=None,
            channels=channels if len(channels) > 1 else (),
        )
        for entry, names, identity in zip(entries, files, ids, strict=True)
    )
    twice = [case for case, count in Counter(case.id for case in cases).items() if count > 1]
    if twice:
        raise SegraftError(f"{file} lists the scan {twice[0]} more than once: keep one entry per scan.")
    return Cohort(listing.name or file.resolve().parent.name, file, {}, channels, cases, patient_pattern)


class _Entry(BaseModel):
    image: Given
    patient: Annotated[_Text, Field(coerce_numbers_to_str=True)] | None = None


class _Listing(BaseModel):
    name: str | None = None
    modality: dict[int, str] = Field(default_factory=dict, validation_alias=AliasChoices("modality", "channel_names"))
    training: list[_Entry | _Text] = Field(default_factory=list)
    unlabelled: list[_Entry | _Text] = Field(default_factory=list)

    @property
    def entries(self) -> list[_Entry]:
        """Of the scans to train on."""
        return [each if isinstance(each, _Entry) else _Entry(image=each) for each in (*self.training, *self.unlabelled)]

    @property
    def modalities(self) -> tuple[str, ...]:
        """In the order of the channels."""
        return tuple(self.modality[number] for number in sorted(self.modality))


def _inside(path: Path, name: str) -> Path:
    return inside(path.parent, name, who=str(path), leaves="its folder", cure="move the file beside the list")


def _validated(content: Any, path: Path) -> _Listing:
    try:
        return _Listing.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SegraftError(f"{path} is no list of scans ({place}: {first['msg']}): correct this entry.") from error
