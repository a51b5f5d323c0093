"""Which part of a volume a picture shows: one axial slice, cropped to the body, in radiological convention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[Any]

_FOREGROUND = 0.1  # of the displayed range: darker than this is air
_MARGIN_MM = 4.0


@dataclass(frozen=True)
class AxialView:
    """A rectangle of one axial slice of arrays `[X, Y, Z]` in RAS+ order.

    Attributes:
        x: the voxels shown from the patient's left to right.
        y: the voxels shown from posterior to anterior.
        z: the slice.
        spacing_mm: voxel edges along X and Y in mm.
    """

    x: slice
    y: slice
    z: int
    spacing_mm: tuple[float, float]

    def of(self, array: Array) -> Array:
        """Return the pixels `[rows, columns]`: row 0 is posterior, column 0 the patient's right."""
        return array[self.x, self.y, self.z][::-1].T

    @property
    def size_mm(self) -> tuple[float, float]:
        """Width and height in mm."""
        return (
            (self.x.stop - self.x.start) * self.spacing_mm[0],
            (self.y.stop - self.y.start) * self.spacing_mm[1],
        )


def axial_view(
    image: Array, truth: Array, predictions: Sequence[Array], display: tuple[float, float], spacing_mm: Sequence[float]
) -> AxialView:
    """Choose the axial slice with the most truth and crop it to the largest connected foreground and all masks.

    Without truth, the slice with the most predicted voxels is taken; without those, the middle one.

    Args:
        image: `[X, Y, Z]` intensities.
        truth: label map of the same shape; 0 is the background.
        predictions: label maps of the same shape.
        display: the intensities shown black and white, which tell the body from the air.
        spacing_mm: voxel edge along each axis in mm.
    """
    marked = (truth > 0).sum(axis=(0, 1))
    if not marked.any():
        marked = sum(((mask > 0).sum(axis=(0, 1)) for mask in predictions), start=marked)
    z = int(marked.argmax()) if marked.any() else image.shape[2] // 2
    low, high = display
    body = _largest(image[:, :, z] > low + _FOREGROUND * (high - low))
    for mask in (truth, *predictions):
        body |= mask[:, :, z] > 0
    x, y = (_reach(np.asarray(body.any(axis=1 - axis)), _MARGIN_MM / spacing_mm[axis]) for axis in (0, 1))
    return AxialView(x, y, z, (spacing_mm[0], spacing_mm[1]))


def displayed_range(image: Array, window: tuple[float, float] | None) -> tuple[float, float]:
    """Return the intensities to show black and white: `window`, or the image's 0.5th and 99.5th percentiles."""
    if window is not None:
        return window
    low, high = (float(value) for value in np.nanpercentile(image, (0.5, 99.5)))
    return (low, high) if high > low else (low, low + 1.0)


def _largest(mask: Array) -> Array:
    """The largest connected component; specks of noise around a head must not widen the picture."""
    components, count = ndimage.label(mask)
    if not count:
        return mask.copy()
    return np.asarray(components == 1 + np.bincount(components.ravel())[1:].argmax())


def _reach(occupied: Array, margin: float) -> slice:
    """The range from the first to the last occupied place and a margin in voxels; everything if none is."""
    places = np.flatnonzero(occupied)
    if not places.size:
        return slice(0, occupied.size)
    wider = round(margin)
    return slice(max(int(places[0]) - wider, 0), min(int(places[-1]) + 1 + wider, occupied.size))
