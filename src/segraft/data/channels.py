"""The channels of a scan (FLAIR, T1, …): a file for each, or one file whose last axis is the channel."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from segraft.data.nifti import load_nifti
from segraft.data.scans import load_scan
from segraft.errors import SegraftError

Files = Sequence[Path | None]
"""Of a scan: one file, or one per channel, None where a channel is missing."""


@dataclass(frozen=True)
class Scan:
    """A scan in memory.

    Attributes:
        who: names it in messages, such as "the case p1".
        names: of its channels; of a single one perhaps empty.
        files: of its channels, None where one is missing; all the same where one file holds them.
        channels: images [X, Y, Z], None where one is missing. They need not lie on one grid.
        own: place of the channel whose grid the scan's masks have; None: the first that is there.
    """

    who: str
    names: tuple[str, ...]
    files: tuple[Path | None, ...]
    channels: tuple[nib.Nifti1Image | None, ...]
    own: int | None = None

    @property
    def grid(self) -> nib.Nifti1Image:
        """The channel whose grid the scan's masks have: the first that is there, in the order in which it is stored."""
        return self._at(self.own)[1]

    @property
    def grid_path(self) -> Path:
        """The file of that channel."""
        return self._at(self.own)[0]

    @property
    def first(self) -> nib.Nifti1Image:
        """The first channel that is there: what a network sees is on its grid."""
        return self._at(None)[1]

    @property
    def path(self) -> Path:
        """The file of the first channel that is there."""
        return self._at(None)[0]

    def _at(self, place: int | None) -> tuple[Path, nib.Nifti1Image]:
        """A channel that is there, by its place or the first."""
        there = zip(self.files, self.channels, strict=True)
        whole = {at: (file, image) for at, (file, image) in enumerate(there) if file is not None and image is not None}
        return whole[min(whole) if place is None else place]

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the channels that it lacks."""
        return tuple(name for name, channel in zip(self.names, self.channels, strict=True) if channel is None)

    def told(self, place: int) -> str:
        """One of its channels, for messages."""
        if len(self.channels) == 1:
            return f"the image {self.files[0]}"
        return f"the channel {self.names[place]} of {self.who} ({self.files[place]})"

    def in_order(self, names: Sequence[str]) -> "Scan":
        """The same scan with its channels in the order of these names, which are its own."""
        places = [self.names.index(name) for name in names]
        own = next(place for place, image in enumerate(self.channels) if image is not None)
        return Scan(
            self.who,
            tuple(names),
            tuple(self.files[place] for place in places),
            tuple(self.channels[place] for place in places),
            places.index(own if self.own is None else self.own),
        )


def load_channels(files: Files, names: Sequence[str] = (), *, who: str) -> Scan:
    """Read a scan whole.

    Args:
        files: one per channel (a NIfTI file or a folder of one DICOM series), None where it is missing; or one NIfTI
            file whose last axis is the channel. In such a file a channel that is NaN throughout is missing.
        names: of the channels, where there are several.
        who: names the scan in messages.

    Raises:
        SegraftError: a file is not usable, or holds another number of channels; there is no channel at all.
    """
    if len(files) > 1:
        names = names or numbered(len(files))
        if len(files) != len(names):
            raise SegraftError(
                f"{who} has {len(files)} files for the channels {', '.join(names)}: give one file for each."
            )
        scan = Scan(who, tuple(names), tuple(files), tuple(None if file is None else load_scan(file) for file in files))
    elif len(names) > 1 and files[0] is not None:
        channels = _split(load_nifti(files[0], channels=tuple(names)))
        scan = Scan(who, tuple(names), tuple(files) * len(names), channels)
    else:
        found = tuple(None if file is None else load_scan(file) for file in files)
        scan = Scan(who, tuple(names) or ("",), tuple(files), found)
    if len(scan.missing) == len(scan.channels):
        raise SegraftError(f"{who} has none of its channels: add their files, or leave it out.")
    return scan


def numbered(count: int) -> tuple[str, ...]:
    """Names of channels that have none."""
    return tuple(f"channel {place}" for place in range(count))


def plain(name: str) -> str:
    """What two spellings of a channel's name have in common: "T1-Gd" is "t1gd"."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def described(image: nib.Nifti1Image) -> str:
    """A grid in words."""
    shape, mm = "×".join(map(str, image.shape)), "×".join(f"{edge:.3g}" for edge in voxel_sizes(image.affine))
    place = ", ".join(f"{edge:.1f}" for edge in image.affine[:3, 3])
    return f"{shape} voxels of {mm} mm from ({place}) mm"


def _split(image: nib.Nifti1Image) -> tuple[nib.Nifti1Image | None, ...]:
    data = np.moveaxis(np.asanyarray(image.dataobj), -1, 0)
    return tuple(
        None
        if volume.dtype.kind == "f" and np.isnan(volume).all()
        else type(image)(np.ascontiguousarray(volume), image.affine, image.header)
        for volume in data
    )
