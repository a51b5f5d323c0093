"""The layouts that data sets come in, told apart by what is there."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from segraft.data.dataset_json import LISTING, read_dataset_json
from segraft.data.flare import is_flare, read_flare
from segraft.data.listed import Listed
from segraft.data.organ_folders import is_organ_folders, read_organ_folders
from segraft.data.split_file import SUFFIX, read_split_file
from segraft.errors import SegraftError


@dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        name: how to describe it to somebody whose folder is in none.
        fits: whether a path is in it, without reading scans.
        read: its reader: the path and the pattern that patients are told by to what is there.
    """

    name: str
    fits: Callable[[Path], bool]
    read: Callable[[Path, str | None], Listed]


LAYOUTS = (
    Layout(
        "a list of images and masks, one case per line (.txt)",
        lambda path: path.suffix.lower() == SUFFIX and not path.is_dir(),
        read_split_file,
    ),
    Layout(
        f"a {LISTING} in the layout of the Decathlon or nnU-Net, or the folder that holds it",
        lambda path: (path / LISTING).is_file() or not path.is_dir(),
        read_dataset_json,
    ),
    Layout(
        "TotalSegmentator's folders (s0001/ct.nii.gz or mri.nii.gz, s0001/segmentations/liver.nii.gz)",
        is_organ_folders,
        read_organ_folders,
    ),
    Layout(
        "FLARE'22's folders (imagesTr/FLARE22_Tr_0001_0000.nii.gz, labelsTr/FLARE22_Tr_0001.nii.gz; or images, labels)",
        is_flare,
        read_flare,
    ),
)
"""In the order they are tried; a path is read by the first that fits."""


def read_layout(path: Path, patient_pattern: str | None) -> Listed:
    """Read what is at a path.

    Args:
        path: a file or a folder.
        patient_pattern: regular expression whose first group, searched in a case's id, is the patient.

    Raises:
        SegraftError: a folder in none of the layouts; what the reader refuses.
    """
    for layout in LAYOUTS:
        if layout.fits(path):
            return layout.read(path, patient_pattern)
    raise SegraftError(
        f"there is no {path / LISTING}, and the folder is in none of the layouts that are read: give "
        f"{'; '.join(each.name for each in LAYOUTS)}."
    )
