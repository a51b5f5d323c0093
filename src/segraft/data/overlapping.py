"""Labels that were drawn apart and may overlap, as one mask of label values."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segraft.data.labels import Labels
from segraft.errors import SegraftError


def joined(
    places: Mapping[int, NDArray[np.int64]], known: Labels, asked: Labels, shape: tuple[int, ...], *, who: str
) -> NDArray[Any]:
    """Give each voxel the value that just those labels cover which it is in.

    So regions whole {1, 2} and core {2} make a mask of 1 (whole alone) and 2 (both); labels that exclude each other may
    not share a voxel.

    Args:
        places: label -> flat indices of its voxels, in any order, also twice.
        known: the labels, with what they cover.
        asked: the labels that the mask is for: they must not tell apart values that the known ones do not.
        shape: [X, Y, Z] of the mask.
        who: names where they are from in messages.

    Returns:
        [*shape], of the smallest unsigned type.

    Raises:
        SegraftError: voxels in labels that no value is covered by together, or that several are which are told apart.
    """
    ids = np.zeros(int(np.prod(shape)), dtype=np.int32)  # places in this list
    sets: list[frozenset[int]] = [frozenset()]
    for label, where in places.items():
        before = ids[where]
        for each in np.flatnonzero(np.bincount(before)):  # far faster here than np.unique
            ids[where[before == each]] = len(sets)
            sets.append(sets[each] | {label})
    counts = np.bincount(ids, minlength=len(sets)).tolist()
    values = [
        _value(labels, count, known, asked, who) if labels and count else 0
        for labels, count in zip(sets, counts, strict=True)
    ]
    return np.array(values, dtype=np.min_scalar_type(max(values)))[ids].reshape(shape)


def _value(labels: frozenset[int], count: int, known: Labels, asked: Labels, who: str) -> int:
    """The value that just these labels cover."""
    fitting = [value for value in sorted(known.values_covered) if _covering(value, known) == labels]
    told = " and ".join(known[label] for label in sorted(labels))
    if not fitting:
        alone = f"{told} alone" if len(labels) == 1 else f"{told} together"
        raise SegraftError(
            f"{count} voxels of {who} are in {alone}, which no label value stands for: correct the segments, or list "
            "regions that share a value."
        )
    if any(_covering(value, asked) != _covering(fitting[0], asked) for value in fitting):
        raise SegraftError(
            f"the values {' and '.join(map(str, fitting))} are all {told} in {who}, which cannot tell them apart: ask "
            "for regions that cover all of them or none."
        )
    return fitting[0]


def _covering(value: int, labels: Labels) -> frozenset[int]:
    return frozenset(label for label in labels if value in labels.covers(label))
