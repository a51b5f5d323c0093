"""Labels that are a folder with one binary mask per organ, joined into one volume of label numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from segraft.data.nifti import SUFFIXES, load_nifti, require_same_grid
from segraft.errors import SegraftError


@dataclass(frozen=True)
class Overlap:
    """What the masks of a case share; a label file shares nothing.

    Attributes:
        shared: voxels that two masks or more claim.
        claimed: label -> voxels in its mask.
        taken: (label, another) -> voxels in the mask of the first that count for the other.
    """

    shared: int = 0
    claimed: Mapping[int, int] = field(default_factory=dict)
    taken: Mapping[tuple[int, int], int] = field(default_factory=dict)


def organs_in(folder: Path) -> dict[str, Path]:
    """Organ -> its mask, of every `.nii` and `.nii.gz` file in a folder, sorted; hidden files are left out.

    Raises:
        SegraftError: the folder cannot be read, or holds two masks of one organ.
    """
    found: dict[str, Path] = {}
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise SegraftError(f"the folder of masks {folder} cannot be read ({error.strerror}): correct it.") from error
    for file in files:
        if file.name.startswith(".") or not file.name.endswith(SUFFIXES):
            continue
        other = found.setdefault(organ_of(file), file)
        if other != file:
            raise SegraftError(f"{other} and {file} are masks of one organ: keep one.")
    return found


def organ_of(mask: Path) -> str:
    """The organ that a mask is named after."""
    return mask.name.removesuffix(".gz").removesuffix(".nii")


def mask_file(folder: Path, organ: str) -> Path:
    """The mask of an organ; where there is none, the name that it should have."""
    plain = folder / f"{organ}.nii"
    return plain if plain.is_file() else folder / f"{organ}.nii.gz"


def join_masks(
    folder: Path, organs: Mapping[int, str], image: nib.Nifti1Image, scan: Path
) -> tuple[nib.Nifti1Image, Overlap]:
    """Read the masks of these organs, and no others, into one volume.

    Masks of neighbours share voxels in most scans of such data, so that refusing would refuse the data. A voxel
    that several claim counts for the smallest of them (of equals, for the lower number), whatever the order they
    are asked for in: a few voxels are little of a liver and much of the vessel in it, and what lies in an organ
    (a cyst, a lobe's vessels) stays there.

    Args:
        folder: of the masks.
        organs: label number -> organ.
        image: the scan, for its grid.
        scan: where it is, for messages.

    Returns:
        The label numbers [X, Y, Z], 0 where there is none, and what was shared.

    Raises:
        SegraftError: a mask is missing, lies on another grid than the scan, or holds other values than 0 and 1.
    """
    places = {number: _voxels(folder, organ, image, scan) for number, organ in organs.items()}
    claimed = {number: place.size for number, place in places.items()}
    joined = np.zeros(image.shape, dtype=np.min_scalar_type(max(organs, default=0)))
    flat = joined.reshape(-1)
    shared = np.zeros(0, dtype=np.int64)
    taken: dict[tuple[int, int], int] = {}
    for number in sorted(places, key=lambda each: (-claimed[each], -each)):  # what is written last, stays
        before = flat[places[number]]
        flat[places[number]] = number
        shared = np.union1d(shared, places[number][before > 0])
        losers, counts = np.unique(before[before > 0], return_counts=True)
        taken |= {(loser, number): count for loser, count in zip(losers.tolist(), counts.tolist(), strict=True)}
    return nib.Nifti1Image(joined, image.affine), Overlap(int(shared.size), claimed, taken)


def _voxels(folder: Path, organ: str, image: nib.Nifti1Image, scan: Path) -> NDArray[np.int64]:
    """Flat indices of the voxels in a mask: far fewer than the scan has."""
    file = mask_file(folder, organ)
    if not file.is_file():
        raise SegraftError(
            f"the mask {file} is missing: add it (empty, if {organ} is not in view), or leave the case out."
        )
    mask = load_nifti(file, what="mask")
    require_same_grid(mask, file, image, scan)
    data: NDArray[Any] = np.asanyarray(mask.dataobj)
    marked = data != 0
    wrong = data[marked & (data != 1)]
    if wrong.size:
        raise SegraftError(f"the mask {file} holds the value {wrong[0]:g}: use 1 for the organ and 0 for all else.")
    return np.flatnonzero(marked)
