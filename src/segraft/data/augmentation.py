"""Where a patch is cut and how it is varied: turns and zooms or elastic deformation, mirroring, intensity."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform, map_coordinates
from scipy.spatial.transform import Rotation

TURN_CHANCE = 0.2
LARGEST_TURN = 15.0  # degrees about each axis
ZOOM = (0.85, 1.18)
FLIP_CHANCE = 0.5
GAMMA = (0.7, 1.5)
SCALE = (0.9, 1.1)
SHIFT = (-0.1, 0.1)

ELASTIC_CHANCE = 0.5
ELASTIC_STRENGTH = 2.0  # mm: standard deviation of the displacement along each axis
ELASTIC_SMOOTHNESS = 10.0  # mm: standard deviation of the Gaussian that smooths it
REACH = 3.0  # of that Gaussian, in its standard deviations


@dataclass(frozen=True)
class Augmentation:
    """The standard: random variations, in this order, all drawn from the generator that is passed in.

    - With chance 0.2, the patch is cut turned by up to 15° about each axis and zoomed by 0.85…1.18, in mm, so that
      anatomy keeps its shape on anisotropic voxels; image linear, label nearest. 2D patches turn in their plane.
      It is cut out of the whole volume, so no false borders appear inside the patch.
    - Along each of `flip_axes`, mirrored with chance 0.5.
    - Intensity, each channel by itself: x^g, then scaled and shifted (g in 0.7…1.5, scale in 0.9…1.1, shift in
      -0.1…0.1).
    """

    flip_axes: tuple[int, ...]

    def warp(
        self, patch: tuple[int, ...], spacing: NDArray[np.float64], rng: np.random.Generator
    ) -> NDArray[np.float64] | None:
        """Where a patch is cut.

        Args:
            patch: its shape.
            spacing: [3], voxel size in mm.
            rng: what is random.

        Returns:
            None for a straight cut, or a warp for `cut`; here [3, 3], from patch voxel offsets about the centre to
            volume voxel offsets.
        """
        if rng.random() >= TURN_CHANCE:
            return None
        flat = patch[2] == 1
        angles = rng.uniform(-LARGEST_TURN, LARGEST_TURN, size=3) * (np.array([0, 0, 1]) if flat else 1)
        zoom = np.full(3, np.exp(rng.uniform(*np.log(ZOOM))))
        if flat:
            zoom[2] = 1
        rotation = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
        return np.asarray((rotation / zoom) * spacing / spacing[:, None], dtype=np.float64)

    def flip(self, rng: np.random.Generator) -> tuple[slice, ...]:
        """The index [X, Y, Z] that mirrors a patch."""
        chances = rng.random(3) < FLIP_CHANCE
        return tuple(
            slice(None, None, -1) if chances[axis] and axis in self.flip_axes else slice(None) for axis in range(3)
        )

    def recolour(self, image: NDArray[np.float32], rng: np.random.Generator) -> None:
        """Change the intensities of one channel of a patch in place; below 0, x^g is −|x|^g.

        NumPy rather than torch: the last bit of its power does not depend on the number of threads, which
        differs between a loader's workers and the main process.
        """
        gamma = np.float32(np.exp(rng.uniform(*np.log(GAMMA))))
        below = image < 0  # nowhere, where intensities are 0…1
        np.power(np.abs(image, out=image), gamma, out=image)
        np.negative(image, out=image, where=below)
        image *= np.float32(rng.uniform(*SCALE))
        image += np.float32(rng.uniform(*SHIFT))


@dataclass(frozen=True)
class ElasticAugmentation(Augmentation):
    """Flips and elastic deformation in four near-equal shares, and contrast: section 2.3 of the haemorrhage paper.

    - With chance 0.5, the patch is cut along a smooth random displacement field, in mm: independent along each axis,
      with standard deviation 2 mm, and white noise smoothed by a Gaussian of 10 mm (so that the correlation over a
      distance r is exp(−r²/400 mm²), and folds do not occur). Image linear, label nearest; 2D patches deform in their
      plane. The paper has no numbers.
    - Along each of `flip_axes` (by default one, left-right), mirrored with chance 0.5, independently: none, flip,
      elastic, and both are equally likely.
    - Intensity: as the standard.
    """

    def warp(
        self, patch: tuple[int, ...], spacing: NDArray[np.float64], rng: np.random.Generator
    ) -> NDArray[np.float64] | None:
        """As of `Augmentation`; here [3, *patch], volume voxel offsets of every voxel of the patch from its first."""
        if rng.random() >= ELASTIC_CHANCE:
            return None
        offsets = np.indices(patch, dtype=np.float64)
        moving = 2 if patch[2] == 1 else 3
        displacement = displacement_mm(patch[:moving], spacing[:moving], rng).reshape(moving, *patch)
        offsets[:moving] += displacement / spacing[:moving, None, None, None]
        return offsets


AUGMENTATIONS: Mapping[str, type[Augmentation] | None] = {
    "none": None,
    "standard": Augmentation,
    "elastic": ElasticAugmentation,
}
"""To add an augmentation, add one entry."""


def displacement_mm(
    patch: tuple[int, ...], spacing: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """A smooth random field on the grid of a patch: u(x) = s · (1/√π)^(d/2) · Σ_c n_c · exp(−‖x − c‖² / 2σ²).

    n is white noise on a lattice of points c that are σ apart and reach 3σ beyond the patch. As the Gaussian is a
    product over the axes, the sum is one small matrix product per axis: much less work than to filter noise on the
    voxels' grid, and the field's law is the same whatever the voxels, at the patch's border too.

    Args:
        patch: d sizes, in voxels.
        spacing: [d], voxel size in mm.
        rng: what is random.

    Returns:
        [d, *patch] displacement along each axis in mm, of mean 0 and standard deviation s everywhere.
    """
    kernels = []
    for size, step in zip(patch, spacing, strict=True):
        voxels = (np.arange(size) - (size - 1) / 2) * step / ELASTIC_SMOOTHNESS  # in σ from the patch's centre
        most = np.ceil(voxels[-1] + REACH)
        kernels.append(np.exp(-0.5 * (voxels[:, None] - np.arange(-most, most + 1)) ** 2) / np.pi**0.25)
    field = rng.normal(0, ELASTIC_STRENGTH, (len(patch), *(kernel.shape[1] for kernel in kernels)))
    for kernel in kernels:
        # Every pass takes the first lattice axis and puts the patch's axis last. NumPy's own loops (without BLAS),
        # whose rounding does not depend on the number of threads.
        field = np.einsum("ac...,xc->a...x", field, kernel)
    return np.asarray(field, dtype=np.float64)


def cut(
    volume: NDArray[np.number[Any]],
    start: NDArray[np.int_],
    patch: tuple[int, ...],
    warp: NDArray[np.float64] | None,
    *,
    order: Literal[0, 1],
) -> NDArray[np.number[Any]]:
    """Cut a patch out of a volume.

    Args:
        volume: [X, Y, Z].
        start: first voxel of the straight patch.
        patch: its shape.
        warp: as of `Augmentation.warp`: None cuts straight (a view); [3, 3] cuts turned about the patch's centre;
            [3, *patch] takes each voxel from its own place.
        order: 1 interpolates linearly, 0 takes the nearest voxel; outside the volume is 0.
    """
    if warp is None:
        return volume[tuple(slice(first, first + size) for first, size in zip(start, patch, strict=True))]
    if warp.ndim > 2:
        where = warp + start[:, None, None, None]
        return map_coordinates(volume, where, order=order, mode="constant", cval=0.0, prefilter=False)
    middle = (np.array(patch) - 1) / 2
    offset = start + middle - warp @ middle
    return affine_transform(
        volume, warp, offset=offset, output_shape=patch, order=order, mode="constant", cval=0.0, prefilter=False
    )
