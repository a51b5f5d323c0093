"""The files of the phantom brains of `phantom_contrasts`: a cohort with labels, and scans of others without."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from segraft.atomic import replacing
from segraft.data.dataset_json import LISTING
from segraft.data.phantom import Triple, write_nifti
from segraft.data.phantom_contrasts import CHANNELS, CORE, EDEMA, ENHANCING, SHAPE, SPACING_MM, brain, check_grid
from segraft.errors import SegraftError

REGIONS = {"WT": [EDEMA, CORE, ENHANCING], "TC": [CORE, ENHANCING], "ET": [ENHANCING]}
"""Whole tumour, its core, and what of that enhances."""

UNLABELLED = "unlabelled.json"
DESCRIPTION = (
    "Synthetic brains with tumours drawn by a program: no patients, no anatomy of any person, not for clinical use. "
    "A stand-in to show and test the software; results on it say nothing about results in patients."
)
_LABELLED, _OTHERS = 0, 1  # told apart in the seeds of brains, so that no patient is in both


def write_contrast_cohort(
    folder: Path,
    *,
    patients: int,
    seed: int,
    shape: tuple[int, int, int] = SHAPE,
    spacing: Triple = SPACING_MM,
) -> Path:
    """Write brains with tumours in the layout of the Medical Segmentation Decathlon, four channels in each file.

    The labels are regions that overlap, as nnU-Net has them: WT, TC and ET. A case depends on the seed, its number and
    the grid alone, so a larger cohort begins with the smaller one of the same seed.

    Args:
        folder: receives `imagesTr/`, `labelsTr/` and `dataset.json`, which is written last.
        patients: number of cases, one per patient.
        seed: 0 or more.
        shape: voxels along right, anterior and superior.
        spacing: voxel size in mm.

    Returns:
        The path of `dataset.json`.

    Raises:
        SegraftError: as for `brain`; fewer than one patient; a negative seed; or `folder` holds the list of another
            data set.
    """
    content: dict[str, Any] = {
        "name": "PHANTOM brain tumours (synthetic stand-in)",
        "tensorImageSize": "4D",
        "modality": {str(place): name for place, name in enumerate(CHANNELS)},
        "labels": {"background": 0, **REGIONS},
        "regions_class_order": [EDEMA, CORE, ENHANCING],
        "numTraining": patients,
        "numTest": 0,
        "test": [],
    }
    listing = _begun(folder / LISTING, content["name"], patients, seed, shape, spacing)
    content["training"] = []
    for number in range(patients):
        image, label = brain(np.random.default_rng([seed, _LABELLED, number]), shape=shape, spacing=spacing)
        name = f"phantom_brain_{number:03d}"
        entry = {
            "image": _written(folder, "imagesTr", name, image, spacing),
            "label": _written(folder, "labelsTr", name, label, spacing),
            "patient": f"brain_{number:03d}",
        }
        content["training"].append(entry)
    return _listed(listing, content)


def write_unlabelled_contrasts(
    folder: Path,
    *,
    patients: int,
    seed: int,
    shape: tuple[int, int, int] = SHAPE,
    spacing: Triple = SPACING_MM,
) -> Path:
    """Write scans of one channel each, of patients that no cohort of `write_contrast_cohort` has, without labels.

    Patient k was scanned in contrast k mod 4 of `CHANNELS`; which it is is not said. He has a tumour too.

    Args:
        folder: receives `images/` and `unlabelled.json`, which is written last.
        patients: number of scans, one per patient.
        seed: 0 or more.
        shape: voxels along right, anterior and superior.
        spacing: voxel size in mm.

    Returns:
        The path of `unlabelled.json`.

    Raises:
        SegraftError: as for `write_contrast_cohort`.
    """
    content: dict[str, Any] = {"name": "PHANTOM brains without labels (synthetic stand-in)"}
    listing = _begun(folder / UNLABELLED, content["name"], patients, seed, shape, spacing)
    content["unlabelled"] = []
    for number in range(patients):
        image, _ = brain(np.random.default_rng([seed, _OTHERS, number]), shape=shape, spacing=spacing)
        name = f"phantom_other_{number:03d}"
        file = _written(folder, "images", name, np.ascontiguousarray(image[..., number % len(CHANNELS)]), spacing)
        content["unlabelled"].append({"image": file, "patient": f"other_{number:03d}"})
    return _listed(listing, content)


def _begun(listing: Path, name: str, patients: int, seed: int, shape: tuple[int, int, int], spacing: Triple) -> Path:
    """The list to write, nothing being in the way."""
    if patients < 1 or seed < 0:
        raise SegraftError(
            f"A phantom cohort of {patients} patients with seed {seed} cannot be drawn: "
            "ask for at least 1 patient and a seed of 0 or more."
        )
    check_grid(shape, spacing)
    if listing.exists() and f'"{name}"' not in listing.read_text(encoding="utf-8", errors="replace"):
        raise SegraftError(f"{listing} belongs to another data set: choose another folder for the phantom cohort.")
    return listing


def _written(folder: Path, part: str, name: str, voxels: npt.NDArray[Any], spacing: Triple) -> str:
    """Write a file, and say where it is, as seen from the list."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(voxels.shape[:3], spacing, strict=True)]
    scan = nib.Nifti1Image(voxels, affine)
    scan.header.set_xyzt_units("mm")
    return f"./{write_nifti(scan, folder / part, name).relative_to(folder).as_posix()}"


def _listed(listing: Path, content: dict[str, Any]) -> Path:
    about = {"description": DESCRIPTION, "reference": "Drawn by segraft.data.phantom_contrasts", "licence": "CC0-1.0"}
    with replacing(listing) as aside:
        aside.write_text(json.dumps({**content, **about}, indent=1) + "\n", encoding="utf-8")
    return listing
