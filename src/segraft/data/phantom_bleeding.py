"""Where blood lies in a synthetic head: under the skull (traumatic) or in the fluid of the clefts (subarachnoid).

Each kind gives every place a score, and the blood takes the wanted number of voxels with the lowest scores, so
its volume is exact.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from segraft.data.phantom_anatomy import Floats, waves
from segraft.errors import SegraftError

NOWHERE = np.float32(1e4)
"""The score (mm) of places that blood cannot reach."""


class Blood(NamedTuple):
    """A bleeding: the voxels that are labelled (bool [N]) and how far inside it they lie (mm, [N], 0 at the rim)."""

    mask: npt.NDArray[np.bool_]
    inside: Floats


def lowest(score: Floats, voxels: int) -> Blood:
    """The `voxels` places with the lowest `score` (mm).

    Raises:
        SegraftError: fewer places than that may hold blood (score below `NOWHERE`).
    """
    if voxels > np.count_nonzero(score < NOWHERE):
        raise SegraftError(
            f"A phantom head has no room for a bleeding of {voxels} voxels: let more of the head be in the scan."
        )
    order = np.argpartition(score, voxels - 1)[:voxels]
    mask = np.zeros(score.shape, bool)
    mask[order] = True
    rim = score[order].max()
    return Blood(mask, rim - score)


def lens(points: Floats, depth: Floats, rng: np.random.Generator) -> Floats:
    """Score of an epidural collection: the thickness in mm at which the lens would reach each place.

    A lens of thickness T and radius R = k·T centred on the inner table covers depth < T·(1 - r²/R²), which solves
    for the smallest T; k is drawn, r is the distance from the centre along the bone.
    """
    side = rng.choice((-1.0, 1.0))
    turn, lift = np.radians(rng.uniform(-40, 45)), np.radians(rng.uniform(-5, 40))
    unit = np.array([side * np.cos(turn) * np.cos(lift), np.sin(turn) * np.cos(lift), np.sin(lift)], np.float32)
    radius = np.sqrt((points**2).sum(0))
    surface = radius + depth
    across = unit @ (points / (radius + np.float32(1e-3)))
    along_bone = surface * np.arccos(np.clip(across, -1, 1))
    ratio = np.float32(rng.uniform(1.7, 2.3))
    thickness: Floats = (depth + np.sqrt(depth**2 + 4 * (along_bone / ratio) ** 2)) / 2
    return thickness


def crescent(points: Floats, depth: Floats, millilitres: float, rng: np.random.Generator) -> Floats:
    """Score of a subdural collection: the thickness in mm at which the crescent would reach each place.

    It covers an oval of the convexity of one side, wider for more `millilitres`, and does not cross the falx. The
    oval is measured in angles (degrees), so that it ends below the vertex, where a thin sheet would lie between
    two slices.
    """
    size = float(np.clip((millilitres / 60) ** (1 / 3), 0.5, 1.25))
    length, height = rng.uniform(66, 76) * size, rng.uniform(44, 50) * size
    side = rng.choice((-1.0, 1.0))
    front, up = rng.uniform(-10, 12), min(rng.uniform(2, 16), 66 - height)
    beside = side * points[0]
    turn = np.degrees(np.arctan2(points[1], beside))
    lift = np.degrees(np.arctan2(points[2], np.hypot(points[0], points[1])))
    profile = np.clip(1 - ((turn - front) / length) ** 2 - ((lift - up) / height) ** 2, 0, None) ** 0.4
    there = (profile > 0.05) & (beside > 3)
    return np.where(there, depth / np.maximum(profile, np.float32(0.05)), NOWHERE)


SOURCES_MM = ((0, 19, -24), (32, 14, -19), (-32, 14, -19), (10, 2, -25), (-10, 2, -25), (0, -4, -27))


def subarachnoid(template: Floats, clefts: Floats, voxels: int, rng: np.random.Generator) -> tuple[Blood, float]:
    """Blood that spreads from a ruptured artery through the clefts, in patches.

    Returns:
        The blood and the width in mm by which every cleft has to swell to hold it, 0 if it fits as it is.
    """
    room = min(round(voxels / 0.65), clefts.size - 1)
    swelling = max(0.0, float(np.partition(clefts, room)[room]))
    source = np.array(SOURCES_MM[rng.integers(len(SOURCES_MM))], np.float32)
    offset = template - source[:, None]
    score = np.sqrt((offset**2).sum(0)) + 13 * waves(rng, template, 34.0) + 4 * waves(rng, template, 12.0)
    outside = clefts - np.float32(swelling)
    return lowest(np.where(outside < 0, score, NOWHERE), voxels), swelling
