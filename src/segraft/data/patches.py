"""Random patches of prepared cases: what a network sees in training."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data.utils import affine_to_spacing
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from segraft.data.augmentation import AUGMENTATIONS, cut
from segraft.data.cohort import Case
from segraft.data.labels import Labels
from segraft.data.preparation import prepare_positions
from segraft.data.scan_preparation import ScanPreparation
from segraft.errors import SegraftError


class PatchSource(Dataset[dict[str, Any]]):
    """Patches of cases that were prepared once and are kept in memory (4 bytes per voxel and channel, 1 for the label).

    An item is asked for by (epoch, index) and depends on nothing but (seed, epoch, index): resuming at an epoch,
    and any number of loader workers, give the same patches. Volumes smaller than a patch are padded with 0.

    Of an item's patches a share `foreground_fraction` (rounded up or down at random, right on average) is
    centred on a voxel of one of the asked labels, each label present in the case being equally likely whatever
    its size; the others are centred on a voxel with none. Patches are moved as little as keeps them inside the
    volume. A case without foreground gives background alone.

    All channels of a patch are cut, turned, deformed and mirrored alike; their intensities vary each by itself. A
    channel that a scan lacks is NaN throughout.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        preparation: ScanPreparation,
        labels: Collection[int],
        *,
        seed: int,
        patches_per_volume: int = 2,
        foreground_fraction: float = 0.5,
        augmentation: str = "standard",
        flip_axes: Sequence[int] | None = None,
        watch: Callable[[Sequence[Case]], Iterable[Case]] = iter,
    ) -> None:
        """Prepare every case.

        Args:
            cases: cases with labels.
            preparation: how; also the patch size.
            labels: labels or regions (`Labels`), or label values; one plane each, in this order.
            seed: of everything random, not negative.
            patches_per_volume: N, patches per item.
            foreground_fraction: share of patches centred on foreground, 0…1.
            augmentation: how to vary patches, a key of `AUGMENTATIONS`.
            flip_axes: axes of the prepared volume along which patches may be mirrored. None: the preparation's. Empty
                where a label has a side ("left kidney").
            watch: passes the cases on while they are prepared, to show progress.

        Raises:
            SegraftError: no cases, numbers out of range, an unknown augmentation, or a case that cannot be prepared.
        """
        if not cases or not labels:
            raise SegraftError("there are no cases or no labels to train on: give at least one of each.")
        if patches_per_volume < 1 or not 0 <= foreground_fraction <= 1 or seed < 0:
            raise SegraftError(
                f"patches per volume ({patches_per_volume}) must be positive, the foreground fraction "
                f"({foreground_fraction}) in 0…1 and the seed ({seed}) not negative: correct them."
            )
        if augmentation not in AUGMENTATIONS:
            raise SegraftError(f"unknown augmentation {augmentation!r}: choose one of {', '.join(AUGMENTATIONS)}.")
        self.patch = preparation.patch
        self.labels = Labels.of(labels)
        self._planes = self.labels.membership().astype(np.float32)
        self._seed = seed
        self._patches = patches_per_volume
        self._fraction = foreground_fraction
        if flip_axes is None:
            flip_axes = preparation.flip_axes
        kind = AUGMENTATIONS[augmentation]
        self._augmentation = None if kind is None else kind(tuple(flip_axes))
        self._volumes = [_volume(case, preparation, self.labels) for case in watch(cases)]

    def __len__(self) -> int:
        return len(self._volumes)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """N patches of volume `index` in epoch `epoch`.

        Returns:
            "image": [N, C, *patch] float32; "label": [N, L, *patch] float32, planes of 0 and 1; "case": its id.
        """
        epoch, index = key
        rng = np.random.default_rng([self._seed, epoch, index])
        volume = self._volumes[index]
        foreground = int(self._patches * self._fraction + rng.random())
        image = np.empty((self._patches, len(volume.channels), *self.patch), dtype=np.float32)
        label = np.empty((self._patches, len(self.labels), *self.patch), dtype=np.float32)
        for place in range(self._patches):
            centre = volume.centre(rng, foreground=place < foreground)
            self._fill(image[place], label[place], volume, centre, rng)
        return {"image": torch.from_numpy(image), "label": torch.from_numpy(label), "case": volume.case}

    def _fill(
        self,
        image: NDArray[np.float32],
        label: NDArray[np.float32],
        volume: "_Volume",
        centre: NDArray[np.int_],
        rng: np.random.Generator,
    ) -> None:
        patch = np.array(self.patch)
        start = np.clip(centre - patch // 2, 0, np.array(volume.positions.shape) - patch)
        vary = self._augmentation
        warp = vary.warp(self.patch, volume.spacing, rng) if vary else None
        flip = vary.flip(rng) if vary else (slice(None),) * 3
        label[:] = self._planes[:, cut(volume.positions, start, self.patch, warp, order=0)[flip]]
        for plane, channel in zip(image, volume.channels, strict=True):
            if channel is None:
                plane[:] = np.nan
                continue
            plane[:] = cut(channel, start, self.patch, warp, order=1)[flip]
            if vary:
                vary.recolour(plane, rng)


class EpochSampler(Sampler[tuple[int, int]]):
    """Keys (epoch, index) for `PatchSource`, every index once, in an order shuffled from (seed, epoch).

    Where several processes train together, each is given its share of every batch (`shares`): together, by rank, they
    have the batches that one process would have, in the same order. A process that the last batch leaves without a
    share is given the first item of that batch as a stand-in, which must not count, so that all have as many batches.
    """

    def __init__(self, size: int, *, seed: int, batch: int | None = None, rank: int = 0, ranks: int = 1) -> None:
        """Of a process.

        Args:
            size: items of an epoch.
            seed: of their order.
            batch: items of a batch of all processes together; None: an epoch is one batch.
            rank: of this process, from 0.
            ranks: how many processes there are.
        """
        self._size, self._batch = size, batch or max(1, size)
        self._seed = seed
        self._rank, self._ranks = rank, ranks
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields (Lightning calls this)."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._size)
        return ((self._epoch, int(order[place])) for part in self._parts() for place in part)

    def _parts(self) -> Iterator[range]:
        """Which places of the order are this process's, batch by batch."""
        for start in range(0, self._size, self._batch):
            sizes = shares(min(self._batch, self._size - start), self._ranks)
            first = start + sum(sizes[: self._rank])
            yield range(first, first + sizes[self._rank]) if sizes[self._rank] else range(start, start + 1)


def shares(count: int, ranks: int) -> tuple[int, ...]:
    """How many of `count` items each of several processes takes, as evenly as can be, larger shares first."""
    each, more = divmod(count, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))


def collate(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join B items of a `PatchSource`.

    Returns:
        "image": [B·N, C, *patch]; "label": [B·N, L, *patch]; "case": B ids.
    """
    return {
        "image": torch.cat([item["image"] for item in batch]),
        "label": torch.cat([item["label"] for item in batch]),
        "case": [item["case"] for item in batch],
    }


@dataclass(frozen=True)
class _Volume:
    """A prepared case, at least as large as a patch, with its foreground indexed once.

    `channels` are None where the scan lacks one. `voxels` holds the flat indices of each label that is present;
    `gaps[i]` counts the background voxels before the i-th foreground voxel, so that the n-th background voxel is found
    without listing them all.
    """

    case: str
    channels: tuple[NDArray[np.float32] | None, ...]
    positions: NDArray[np.uint8]
    spacing: NDArray[np.float64]
    voxels: tuple[NDArray[np.int_], ...]
    gaps: NDArray[np.int_]

    def centre(self, rng: np.random.Generator, *, foreground: bool) -> NDArray[np.int_]:
        """A random voxel [3] of one of the labels, or of none; the other kind where there is no such voxel."""
        background = self.positions.size - self.gaps.size
        if self.voxels and (foreground or not background):
            label = self.voxels[rng.integers(len(self.voxels))]
            flat = int(label[rng.integers(label.size)])
        else:
            nth = int(rng.integers(background))
            flat = nth + int(np.searchsorted(self.gaps, nth, side="right"))
        return np.array(np.unravel_index(flat, self.positions.shape))


def _volume(case: Case, preparation: ScanPreparation, labels: Labels) -> _Volume:
    prepared, moved = prepare_positions(case, preparation, labels)
    missing = [max(0, size - have) for size, have in zip(preparation.patch, moved.shape, strict=True)]
    margins = [(gap // 2, gap - gap // 2) for gap in missing]
    planes = prepared.as_tensor().numpy()
    channels = (None if np.isnan(plane.flat[0]) else np.ascontiguousarray(np.pad(plane, margins)) for plane in planes)
    positions = np.ascontiguousarray(np.pad(moved.numpy(), margins))
    foreground = np.flatnonzero(positions)
    which = positions.ravel()[foreground]
    voxels = (foreground[covers[which]] for covers in labels.membership())
    return _Volume(
        case=case.id,
        channels=tuple(channels),
        positions=positions,
        spacing=np.asarray(affine_to_spacing(prepared.affine.numpy()), dtype=np.float64),
        voxels=tuple(label for label in voxels if label.size),
        gaps=foreground - np.arange(foreground.size),
    )
