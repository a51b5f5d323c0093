"""One scan of one patient, with its label where there is one."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segraft.data.organ_masks import mask_file
from segraft.data.scans import load_scan
from segraft.errors import SegraftError


@dataclass(frozen=True)
class Case:
    """One scan of one patient: a NIfTI file or a folder of one DICOM series, with its label.

    Attributes:
        id: of the case, one in a cohort.
        patient: whose scan it is.
        image: the scan.
        label: a file of label numbers, or a folder with one binary mask per organ; None where there is none.
        organs: of such a folder: the names of the cohort's labels, label k at `organs[k - 1]`; a mask is the file of
            that name.
    """

    id: str
    patient: str
    image: Path
    label: Path | None
    organs: tuple[str, ...] = ()

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

    def label_digest(self, asked: Collection[int]) -> str:
        """The first 16 hex digits of the SHA-256 of the label file; of a folder, of the asked organs' names and files.

        The order of `asked` does not matter, nor do the numbers of organs.

        Args:
            asked: the label values asked for (or value -> name); a label file is read whole whatever they are.

        Raises:
            SegraftError: there is no label, or a file of it cannot be read.
        """
        label = self.require_label()
        if not self.organs:
            return _read_digest(label)[:16]
        digest = hashlib.sha256()
        for organ in sorted(self.asked_organs(asked).values()):
            digest.update(f"{organ}\0{_read_digest(mask_file(label, organ))}\n".encode())
        return digest.hexdigest()[:16]

    def require_label(self) -> Path:
        """The label.

        Raises:
            SegraftError: there is none.
        """
        if self.label is None:
            raise SegraftError(
                f"the case {self.id} ({self.image}) has no label: add its mask, or leave the case out (in a "
                'dataset.json: a "label" in its entry).'
            )
        return self.label

    def asked_organs(self, asked: Collection[int] | None) -> dict[int, str]:
        """Of a case with a folder of masks, the organs of these label values; of all of them for None.

        Raises:
            SegraftError: a value that is none of the cohort's labels.
        """
        numbers = range(1, len(self.organs) + 1)
        for number in asked or ():
            if number not in numbers:
                raise SegraftError(
                    f"the case {self.id} has organs 1 to {len(self.organs)}, and {number} is asked for: name labels by "
                    "their organs."
                )
        return {number: self.organs[number - 1] for number in (numbers if asked is None else asked)}


def _read_digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise SegraftError(f"the label {file} cannot be read ({error.strerror}): add it.") from error
