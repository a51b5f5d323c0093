"""One scan of one patient, of one or several channels, with its label where there is one."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from segraft.data.channels import Scan, load_channels
from segraft.data.dicom_seg import segments_digest
from segraft.data.labels import Labels
from segraft.data.organ_masks import mask_file
from segraft.errors import SegraftError

MISSING = "missing"
"""The digest of a channel that a scan lacks."""


@dataclass(frozen=True)
class Case:
    """One scan of one patient: NIfTI files or folders of one DICOM series each, with its label.

    Attributes:
        id: of the case, one in a cohort.
        patient: whose scan it is.
        images: one file per channel, None where the scan lacks one; or one 4D file whose last axis is the channel.
        label: a file of label numbers, or a folder with one binary mask per organ; None where there is none.
        organs: of such a folder: the names of the cohort's labels, label k at `organs[k - 1]`; a mask is the file of
            that name.
        channels: names of the channels, where there are several.
        segment_labels: where the label is a DICOM SEG: the labels of the cohort, which its segments are told by.
    """

    id: str
    patient: str
    images: tuple[Path | None, ...]
    label: Path | None
    organs: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    segment_labels: Labels | None = field(default=None, compare=False)

    @property
    def image(self) -> Path:
        """The first file that is there: it names the scan."""
        return next((file for file in self.images if file is not None), Path(self.id))

    def load(self) -> Scan:
        """Read the scan whole.

        Raises:
            SegraftError: what `load_channels` refuses.
        """
        return load_channels(self.images, self.channels, who=f"the case {self.id}")

    def digest(self) -> str:
        """For each channel the first 16 hex digits of the SHA-256 of its shape and voxel values, joined by "-".

        Recognises a scan that served before, also renamed, compressed anew, with another header, or as one channel of
        others (`images_of`). A channel that is missing is "missing".

        Raises:
            SegraftError: the image cannot be read.
        """
        return "-".join(MISSING if channel is None else _voxel_digest(channel) for channel in self.load().channels)

    def label_digest(self, asked: Collection[int]) -> str:
        """The first 16 hex digits of the SHA-256 of the label file; of a folder, of the asked organs' names and files.

        Of a DICOM SEG the cohort's labels count too, as its segments are told by them.

        The order of `asked` does not matter, nor do the numbers of organs.

        Args:
            asked: the labels asked for, of which what they cover counts; a label file is read whole whatever they are.

        Raises:
            SegraftError: there is no label, or a file of it cannot be read.
        """
        label = self.require_label()
        if self.segment_labels is not None:
            return segments_digest(label, self.segment_labels)[:16]
        if not self.organs:
            return _read_digest(label)[:16]
        digest = hashlib.sha256()
        for organ in sorted(self.asked_organs(Labels.of(asked).values_covered).values()):
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


def images_of(digest: str) -> frozenset[str]:
    """The images that a digest of a case is of: of its channels those that are there."""
    return frozenset(digest.split("-")) - {MISSING}


def _voxel_digest(image: nib.Nifti1Image) -> str:
    voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    digest = hashlib.sha256(repr(voxels.shape).encode())
    digest.update(np.ascontiguousarray(voxels).data)
    return digest.hexdigest()[:16]


def _read_digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise SegraftError(f"the label {file} cannot be read ({error.strerror}): add it.") from error
