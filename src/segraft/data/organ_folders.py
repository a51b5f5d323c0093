"""TotalSegmentator's layout: a folder per case with its scan, and in `segmentations` one binary mask per organ.

Data sets 1.0 and 2.0 of CT (`ct.nii.gz`), the one of MR (`mri.nii.gz`), and others in the same form (AbdomenAtlas).
What else lies there is not read, `meta.csv` with age, sex and the authors' own split among it.
"""

from collections.abc import Iterator
from pathlib import Path

from segraft.data.case import Case
from segraft.data.listed import Listed, foreground, patients_by
from segraft.data.organ_masks import organs_in
from segraft.errors import SegraftError

MASKS = "segmentations"
IMAGES = {"ct.nii.gz": "CT", "ct.nii": "CT", "mri.nii.gz": "MR", "mri.nii": "MR"}
"""File name of a case's scan -> modality."""


def is_organ_folders(folder: Path) -> bool:
    """Whether a folder holds folders of cases."""
    return next(_case_folders(folder), None) is not None


def read_organ_folders(folder: Path, patient_pattern: str | None) -> Listed:
    """Read such a folder. A case is named after its own folder; its patient is told by the pattern, else the case.

    Labels are the organs that any case has a mask of, numbered from 1 in sorted order. No mask is opened.

    Raises:
        SegraftError: a case with masks and without scan, or with two scans; no masks at all.
    """
    patient = patients_by(patient_pattern, folder)
    organs: dict[str, Path] = {}
    found: list[tuple[Path, Path, Path | None]] = []
    for case in _case_folders(folder):
        masks = case / MASKS
        labelled = masks if masks.is_dir() else None
        if labelled is not None:
            organs = organs_in(labelled) | organs
        found.append((case, scan_in(case), labelled))
    if not organs:
        raise SegraftError(
            f"the {len(found)} cases of {folder} have no masks: put one per organ into each case's folder {MASKS}, "
            f"such as {found[0][0] / MASKS / 'liver.nii.gz'}."
        )
    labels = foreground(organs)
    names = tuple(labels.values())
    modalities = dict.fromkeys(IMAGES[image.name] for _, image, _ in found)
    return Listed(
        name=folder.resolve().name,
        path=folder,
        labels=labels,
        modalities=(" or ".join(modalities),),
        cases=tuple(Case(case.name, patient(case.name), (image,), masks, names) for case, image, masks in found),
    )


def scan_in(case: Path) -> Path:
    """The scan in a case's folder.

    Raises:
        SegraftError: there is none, or more than one.
    """
    scans = [case / name for name in IMAGES if (case / name).is_file()]
    if not scans:
        raise SegraftError(f"the case {case} has masks and no scan: add {case / next(iter(IMAGES))}.")
    if len(scans) > 1:
        raise SegraftError(f"the case {case} has the scans {scans[0].name} and {scans[1].name}: keep one.")
    return scans[0]


def _case_folders(folder: Path) -> Iterator[Path]:
    """Folders with a scan or masks, sorted, hidden ones left out."""
    if not folder.is_dir():
        return
    for case in sorted(folder.iterdir()):
        if case.name.startswith("."):
            continue
        if (case / MASKS).is_dir() or any((case / name).is_file() for name in IMAGES):
            yield case
