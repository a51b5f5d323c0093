"""FLARE'22's layout: scans in one folder, masks in another, thirteen abdominal organs with fixed numbers."""

import re
from pathlib import Path

from segraft.data.case import Case
from segraft.data.listed import Listed, patients_by, stem
from segraft.data.nifti import SUFFIXES
from segraft.errors import SegraftError

ORGANS = {
    1: "liver",
    2: "right kidney",
    3: "spleen",
    4: "pancreas",
    5: "aorta",
    6: "inferior vena cava",
    7: "right adrenal gland",
    8: "left adrenal gland",
    9: "gallbladder",
    10: "esophagus",
    11: "stomach",
    12: "duodenum",
    13: "left kidney",
}
"""Label values of the challenge."""

_FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"))
_NAME = re.compile(r"FLARE(22_T[rs]|Ts)_\d+")  # the 50 training cases, and those for tuning


def is_flare_name(name: str) -> bool:
    """Whether a case (its file's name without ending and channel) is named as those of the challenge."""
    return _NAME.fullmatch(name) is not None


def is_flare(folder: Path) -> bool:
    """Whether a folder holds scans and masks of the challenge."""
    return _places(folder) is not None


def read_flare(folder: Path, patient_pattern: str | None) -> Listed:
    """Read such a folder. A case is named as its mask; a scan without mask is a case without label.

    Raises:
        SegraftError: files with other names, two files of one case, or a mask without scan.
    """
    places = _places(folder)
    if places is None:
        raise SegraftError(f"{folder} has no scans of FLARE'22: give the folder that holds its images and labels.")
    images, labels = (_by_case(place) for place in places)
    patient = patients_by(patient_pattern, folder)
    if alone := sorted(labels.keys() - images.keys()):
        raise SegraftError(f"the mask {labels[alone[0]]} has no scan: add {places[0] / (alone[0] + '_0000.nii.gz')}.")
    return Listed(
        name=folder.resolve().name,
        path=folder,
        labels=dict(ORGANS),
        modalities=("CT",),
        cases=tuple(Case(name, patient(name), (images[name],), labels.get(name)) for name in sorted(images)),
    )


def _places(folder: Path) -> tuple[Path, Path] | None:
    """The folders of scans and masks."""
    for images, labels in _FOLDERS:
        scans, masks = folder / images, folder / labels
        if scans.is_dir() and masks.is_dir() and any(is_flare_name(stem(file.name)) for file in scans.iterdir()):
            return scans, masks
    return None


def _by_case(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.name.endswith(SUFFIXES):
            continue
        name = stem(file.name)
        if not is_flare_name(name):
            raise SegraftError(
                f"{file} is not named as the files of FLARE'22 beside it (FLARE22_Tr_0001_0000.nii.gz): move it "
                "elsewhere, or list all in a dataset.json."
            )
        other = found.setdefault(name, file)
        if other != file:
            raise SegraftError(f"{other} and {file} are files of one case: keep one.")
    return found
