"""Random patches of scans alone, without labels: what a network sees in self-supervised training."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.data.utils import affine_to_spacing
from numpy.typing import NDArray
from torch.utils.data import Dataset

from segraft.data.augmentation import AUGMENTATIONS, cut
from segraft.data.checks import check_scan
from segraft.data.cohort import Case
from segraft.data.preparation import Preparation, prepare_scan
from segraft.errors import SegraftError


class ScanSource(Dataset[dict[str, Any]]):
    """Patches from anywhere in scans that were prepared once and are kept in memory (4 bytes per voxel and channel).

    Each patch is of one channel, drawn among those that the scan has. As of `PatchSource`, an item is asked for by
    (epoch, index) and depends on nothing but (seed, epoch, index), and volumes smaller than a patch are padded with 0.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        preparation: Preparation,
        *,
        seed: int,
        patches_per_volume: int = 2,
        augmentation: str = "standard",
        flip_axes: Sequence[int] | None = None,
        watch: Callable[[Sequence[Case]], Iterable[Case]] = iter,
    ) -> None:
        """Prepare every scan.

        Args:
            cases: with or without labels, which are not read.
            preparation: how; also the patch size.
            seed: of everything random, not negative.
            patches_per_volume: N, patches per item.
            augmentation: how to vary patches, a key of `AUGMENTATIONS`.
            flip_axes: axes along which patches may be mirrored. None: left-right alone.
            watch: passes the cases on while they are prepared, to show progress.

        Raises:
            SegraftError: no cases, numbers out of range, an unknown augmentation, or a scan that cannot be prepared.
        """
        if not cases:
            raise SegraftError("there are no scans to train on: give at least one.")
        if patches_per_volume < 1 or seed < 0:
            raise SegraftError(
                f"patches per volume ({patches_per_volume}) must be positive and the seed ({seed}) not negative: "
                "correct them."
            )
        if augmentation not in AUGMENTATIONS:
            raise SegraftError(f"unknown augmentation {augmentation!r}: choose one of {', '.join(AUGMENTATIONS)}.")
        self.patch = preparation.patch
        self._seed = seed
        self._patches = patches_per_volume
        if flip_axes is None:
            flip_axes = preparation.flip_axes
        kind = AUGMENTATIONS[augmentation]
        self._augmentation = None if kind is None else kind(tuple(flip_axes))
        self._volumes = [_volume(case, preparation) for case in watch(cases)]

    def __len__(self) -> int:
        return len(self._volumes)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """N patches of volume `index` in epoch `epoch`.

        Returns:
            "image": [N, 1, *patch] float32; "label": the same, as it is the image that is to be told; "case": its id.
        """
        epoch, index = key
        rng = np.random.default_rng([self._seed, epoch, index])
        volume = self._volumes[index]
        image = np.empty((self._patches, 1, *self.patch), dtype=np.float32)
        for place in image:
            which = int(rng.integers(len(volume.channels)))
            start = rng.integers(np.array(volume.channels[which].shape) - np.array(self.patch), endpoint=True)
            self._fill(place[0], volume.channels[which], start, volume.spacings[which], rng)
        patches = torch.from_numpy(image)
        return {"image": patches, "label": patches, "case": volume.case}

    def middle(self, index: int) -> torch.Tensor:
        """The patch [1, *patch] in the middle of a volume, of its first channel, as it is: what pictures show."""
        volume = self._volumes[index].channels[0]
        start = (np.array(volume.shape) - np.array(self.patch)) // 2
        return torch.from_numpy(np.array(cut(volume, start, self.patch, None, order=1)))[None]

    def case(self, index: int) -> str:
        """The id of a volume's case."""
        return self._volumes[index].case

    def _fill(
        self,
        image: NDArray[np.float32],
        volume: NDArray[np.float32],
        start: NDArray[np.int_],
        spacing: NDArray[np.float64],
        rng: np.random.Generator,
    ) -> None:
        vary = self._augmentation
        warp = vary.warp(self.patch, spacing, rng) if vary else None
        flip = vary.flip(rng) if vary else (slice(None),) * 3
        image[:] = cut(volume, start, self.patch, warp, order=1)[flip]
        if vary:
            vary.recolour(image, rng)


@dataclass(frozen=True)
class _Scan:
    """A prepared scan: the channels that it has, each at least as large as a patch, with its voxel size in mm."""

    case: str
    channels: tuple[NDArray[np.float32], ...]
    spacings: tuple[NDArray[np.float64], ...]


def _volume(case: Case, preparation: Preparation) -> _Scan:
    """Every channel by itself, on its own grid."""
    scan = check_scan(case)
    intensities = preparation.intensities(len(scan.channels))
    prepared = [
        prepare_scan(
            replace(scan, names=(name,), files=(file,), channels=(image,)),
            preparation.model_copy(update={"intensity": intensity}),
        )
        for name, file, image, intensity in zip(scan.names, scan.files, scan.channels, intensities, strict=True)
        if image is not None
    ]
    channels = tuple(_padded(each.as_tensor().numpy()[0], preparation.patch) for each in prepared)
    spacings = tuple(np.asarray(affine_to_spacing(each.affine.numpy()), dtype=np.float64) for each in prepared)
    return _Scan(case.id, channels, spacings)


def _padded(volume: NDArray[np.float32], patch: tuple[int, int, int]) -> NDArray[np.float32]:
    missing = [max(0, size - have) for size, have in zip(patch, volume.shape, strict=True)]
    return np.ascontiguousarray(np.pad(volume, [(gap // 2, gap - gap // 2) for gap in missing]))
