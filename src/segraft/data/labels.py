"""What a network is asked for: labels that exclude each other, or regions that may overlap, sets of label values."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from segraft.errors import SegraftError

Regions = dict[int, tuple[int, ...]]
"""Value that a region is painted with in masks that are written -> the label values that it covers, in the order of
painting."""


class Labels(dict[int, str]):
    """Value in masks that are written -> name, in the order of a network's outputs.

    Attributes:
        regions: what each covers, where they are regions; empty where they are labels that exclude each other.
    """

    def __init__(
        self, names: Mapping[int, str] | Iterable[tuple[int, str]] = (), regions: Mapping[int, Collection[int]] = {}
    ) -> None:
        super().__init__(names)
        self.regions: Regions = {value: tuple(covers) for value, covers in regions.items()}

    @classmethod
    def of(cls, labels: Iterable[int]) -> Self:
        """These, or labels that exclude each other, where they are plain values (or values -> names)."""
        if isinstance(labels, cls):
            return labels
        return cls(labels if isinstance(labels, Mapping) else {value: f"label {value}" for value in labels})

    def covers(self, label: int) -> tuple[int, ...]:
        """The label values that one of them covers."""
        return self.regions.get(label, (label,))

    @property
    def values_covered(self) -> tuple[int, ...]:
        """The label values that they cover, each once."""
        return tuple(dict.fromkeys(value for label in self for value in self.covers(label)))

    def plane(self, label_map: NDArray[Any], label: int) -> NDArray[np.bool_]:
        """Where a map of label values [X, Y, Z] has one of them."""
        return np.asarray(np.isin(label_map, self.covers(label)) if self.regions else label_map == label)

    def map_of(self, label_map: NDArray[Any]) -> NDArray[Any]:
        """A map of label values as it would be written by a network that found just that; others are 0."""
        if self.regions:
            return self.painted({label: self.plane(label_map, label) for label in self})
        return np.where(np.isin(label_map, list(self)), label_map, 0)

    def membership(self) -> NDArray[np.bool_]:
        """[L, V + 1]: whether label l covers the v-th of `values_covered`, at 1 + v; the first column is False."""
        return np.array([[False, *(value in self.covers(label) for value in self.values_covered)] for label in self])

    def painted(self, planes: Mapping[int, NDArray[np.bool_]]) -> NDArray[np.int64]:
        """One map of regions that may overlap: each lies over those before it in the order of `regions`."""
        mask = np.zeros(next(iter(planes.values())).shape, dtype=np.int64)
        for value in self.regions:
            if value in planes:
                mask[planes[value]] = value
        return mask

    def asked_of(self, known: "Labels") -> list[str]:
        """How to ask a cohort for them, which lists the labels `known`: by value, or, of other regions, as name=1+2."""
        if all(known.get(value) == name and known.covers(value) == self.covers(value) for value, name in self.items()):
            return [str(value) for value in self]
        return [f"{name}={'+'.join(map(str, self.covers(value)))}" for value, name in self.items()]


def paint_values(covers: Mapping[str, Collection[int]]) -> Regions:
    """Choose the value that each region is painted with, in order: one of its label values that is seen in the end.

    That is the first that no other region covers, else the first that none after it covers: for whole tumour {1, 2, 4},
    core {1, 4} and enhancing {4} it gives 2, 1 and 4, so that the mask holds the label values again.

    Raises:
        SegraftError: a region that those after it would paint over.
    """
    names, chosen = list(covers), Regions()
    for place, name in enumerate(names):
        mine = list(dict.fromkeys(covers[name]))
        others = {value for other in names if other != name for value in covers[other]}
        after = {value for other in names[place + 1 :] for value in covers[other]}
        free = [value for value in mine if value not in others] or [
            value for value in mine if value not in after and value not in chosen
        ]
        if not free:
            raise SegraftError(
                f"the regions after {name} cover all of it, so a mask could not show it: name larger regions first."
            )
        chosen[free[0]] = tuple(mine)
    return chosen
