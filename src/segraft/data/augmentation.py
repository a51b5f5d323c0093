"""Where a patch is cut and how it is varied: small turns and zooms, mirroring, intensity."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

TURN_CHANCE = 0.2
LARGEST_TURN = 15.0  # degrees about each axis
ZOOM = (0.85, 1.18)
FLIP_CHANCE = 0.5
GAMMA = (0.7, 1.5)
SCALE = (0.9, 1.1)
SHIFT = (-0.1, 0.1)


@dataclass(frozen=True)
class Augmentation:
    """Random variations, in this order, all drawn from the generator that is passed in.

    - With chance 0.2, the patch is cut turned by up to 15° about each axis and zoomed by 0.85…1.18, in mm, so that
      anatomy keeps its shape on anisotropic voxels; image linear, label nearest. 2D patches turn in their plane.
      It is cut out of the whole volume, so no false borders appear inside the patch.
    - Along each of `flip_axes`, mirrored with chance 0.5.
    - Intensity: x^g, then scaled and shifted (g in 0.7…1.5, scale in 0.9…1.1, shift in -0.1…0.1).
    """

    flip_axes: tuple[int, ...]

    def turn(
        self, patch: tuple[int, ...], spacing: NDArray[np.float64], rng: np.random.Generator
    ) -> NDArray[np.float64] | None:
        """[3, 3] from patch voxel offsets to volume voxel offsets, or None for a straight cut."""
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
        """Change the intensities of a patch (0…1) in place.

        NumPy rather than torch: the last bit of its power does not depend on the number of threads, which
        differs between a loader's workers and the main process.
        """
        gamma = np.float32(np.exp(rng.uniform(*np.log(GAMMA))))
        np.power(image, gamma, out=image)
        image *= np.float32(rng.uniform(*SCALE))
        image += np.float32(rng.uniform(*SHIFT))


def cut(
    volume: NDArray[np.number[Any]],
    start: NDArray[np.int_],
    patch: tuple[int, ...],
    turn: NDArray[np.float64] | None,
    *,
    order: Literal[0, 1],
) -> NDArray[np.number[Any]]:
    """Cut a patch out of a volume.

    Args:
        volume: [X, Y, Z].
        start: first voxel of the straight patch.
        patch: its shape.
        turn: [3, 3] about the patch's centre, as of `Augmentation.turn`; None cuts straight (a view).
        order: 1 interpolates linearly, 0 takes the nearest voxel; outside the volume is 0.
    """
    if turn is None:
        return volume[tuple(slice(first, first + size) for first, size in zip(start, patch, strict=True))]
    middle = (np.array(patch) - 1) / 2
    offset = start + middle - turn @ middle
    return affine_transform(
        volume, turn, offset=offset, output_shape=patch, order=order, mode="constant", cval=0.0, prefilter=False
    )
