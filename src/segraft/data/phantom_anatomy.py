"""The anatomy of a synthetic head: skull, brain, ventricles and subarachnoid spaces as functions of position.

Every structure is a *clearance*: about the distance in mm to its surface, negative inside. Positions are in mm in
RAS axes from the centre of the cranial cavity, as an array of shape [3, N], so one patient looks the same on any
voxel grid. The lengths below are those of an adult head and are stretched per patient.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

Floats = npt.NDArray[np.float32]

CAVITY_MM = (64.0, 82.0, 63.0)  # half-axes: left-right, front-back, up
FLOOR_MM = 50.0  # half-axis down


def waves(rng: np.random.Generator, points: Floats, wavelength: float, count: int = 14) -> Floats:
    """A smooth random field of mean 0 and variance 1 at `points` [3, N], with bumps of `wavelength` mm: [N]."""
    directions = rng.standard_normal((count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    wavenumbers = 2 * np.pi / wavelength * rng.uniform(0.75, 1.25, (count, 1)) * directions
    phases = rng.uniform(0, 2 * np.pi, count)
    field = np.zeros(points.shape[1], np.float32)
    for (kx, ky, kz), phase in zip(wavenumbers.astype(np.float32), phases.astype(np.float32), strict=True):
        field += np.cos(kx * points[0] + ky * points[1] + kz * points[2] + phase)
    return field * np.float32(np.sqrt(2 / count))


def union(*clearances: Floats) -> Floats:
    """Clearance (mm, [N]) of what lies in any of the structures."""
    nearest: Floats = np.minimum.reduce(clearances)
    return nearest


def common(*clearances: Floats) -> Floats:
    """Clearance (mm, [N]) of what lies in all of the structures."""
    farthest: Floats = np.maximum.reduce(clearances)
    return farthest


def ellipsoid(points: Floats, centre: tuple[float, ...], half_axes: tuple[float, ...]) -> Floats:
    """Clearance (mm, [N]) of an ellipsoid; right at its surface, scaled by the mean half-axis elsewhere."""
    unit = (points - np.array(centre, np.float32)[:, None]) / np.array(half_axes, np.float32)[:, None]
    clearance: Floats = (np.sqrt((unit**2).sum(0)) - 1) * np.float32(np.cbrt(np.prod(half_axes)))
    return clearance


def tube(points: Floats, path: list[tuple[float, float, float]], radius: float) -> Floats:
    """Clearance (mm, [N]) of a round tube of `radius` mm along the corners of `path`."""
    nearest = np.full(points.shape[1], np.inf, np.float32)
    for start, end in pairwise(path):
        along = np.subtract(end, start).astype(np.float32)
        offset = points - np.asarray(start, np.float32)[:, None]
        share = np.clip((along @ offset) / (along @ along), 0, 1)
        np.minimum(nearest, ((offset - along[:, None] * share) ** 2).sum(0), out=nearest)
    return np.sqrt(nearest) - np.float32(radius)


@dataclass(frozen=True)
class Patient:
    """What differs from head to head; lengths in mm, intensities in HU, angles in degrees."""

    stretch: tuple[float, float, float]
    tilt: tuple[float, float, float]
    centre: tuple[float, float, float]
    squareness: float
    skull: float
    scalp: float
    ventricle: float
    sulcus: float
    noise: float
    shading: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        """A random adult; older heads have wider ventricles and sulci together."""
        age = rng.uniform()
        left_right, front_back, up = rng.normal(1, 0.03, 3).clip(0.94, 1.05)
        pitch, roll, yaw = rng.normal(0, (5, 2.5, 3)).clip(-10, 10)
        across, along, height = rng.normal(0, (2, 2, 1.5)).clip(-3, 3)
        return cls(
            stretch=(left_right, front_back, up),
            tilt=(pitch, roll, yaw),
            centre=(across, along, height - 7.0),
            squareness=rng.uniform(2.05, 2.45),
            skull=rng.uniform(5.0, 7.5),
            scalp=rng.uniform(4.0, 6.5),
            ventricle=0.75 + 0.55 * age + rng.normal(0, 0.08),
            sulcus=0.8 + 0.7 * age + rng.uniform(0, 0.3),
            noise=rng.uniform(4.0, 6.0),
            shading=rng.uniform(2.0, 6.0),
        )

    def place(self, points: Floats) -> Floats:
        """Scanner positions (mm, [3, N]) as positions in the head that lies there, moved and tilted."""
        turn = Rotation.from_euler("xyz", self.tilt, degrees=True).as_matrix().astype(np.float32)
        placed: Floats = turn @ (points - np.asarray(self.centre, np.float32)[:, None])
        return placed

    def template(self, points: Floats) -> Floats:
        """Positions in this head (mm, [3, N]) as positions in the average head."""
        return points / np.asarray(self.stretch, np.float32)[:, None]


class Shell(NamedTuple):
    """Distances (mm, [N]), positive inwards: from the inner table of the skull, and from the skin."""

    depth: Floats
    below_skin: Floats


def shell(patient: Patient, points: Floats, rng: np.random.Generator) -> Shell:
    """Where head positions `points` (mm, [3, N]) lie between cranial cavity and skin.

    Distances are taken along the line to the centre of the head, which on so round a body is within a few per
    cent of the shortest one.
    """
    radius = np.sqrt((points**2).sum(0)) + np.float32(1e-3)
    unit = points / radius
    bumps = 1 + np.float32(0.008) * waves(rng, unit * 70, 110.0, 6)
    power = np.float32(patient.squareness)
    wide, long, high = (np.float32(a * s) for a, s in zip(CAVITY_MM, patient.stretch, strict=True))
    in_plane = np.abs(unit[0] / (wide * (1 - np.float32(0.09) * unit[1]))) ** power
    in_plane += np.abs(unit[1] / long) ** power

    def surface(floor: Floats) -> Floats:
        half_axis = np.where(unit[2] > 0, high, floor * np.float32(patient.stretch[2]))
        extent: Floats = bumps * (in_plane + np.abs(unit[2] / half_axis) ** power) ** (-1 / power)
        return extent

    # The floor of the cavity climbs from the posterior to the anterior fossa; the face fills what is below it.
    cavity = surface(np.float32(FLOOR_MM) - 13 * unit[1])
    head = surface(np.full_like(radius, FLOOR_MM + 6))
    skin = np.maximum(cavity, head) + np.float32(patient.skull + patient.scalp)
    return Shell(cavity - radius, skin - radius)


def base_bones(template: Floats) -> Floats:
    """Clearance (mm, [N]) of the petrous ridges, the lesser sphenoid wings and the dorsum sellae."""
    half = np.stack([np.abs(template[0]), template[1], template[2]])
    petrous = tube(half, [(19, -8, -40), (60, -27, -35)], 6.5)
    wing = tube(half, [(9, 21, -32), (38, 29, -28), (62, 22, -22)], 2.6)
    sella = tube(half, [(0, 3, -36), (7, 3, -36)], 3.0)
    return union(petrous, wing, sella)


def ventricles(template: Floats, scale: float) -> Floats:
    """Clearance (mm, [N]) of the lateral, third and fourth ventricles; `scale` 1 is a middle-aged adult."""
    half = np.stack([np.abs(template[0]), template[1], template[2]])
    frontal = tube(half, [(6.5, 6, 15), (9, 20, 13), (13, 33, 8)], 4.3 * scale)
    body = tube(half, [(6.5, 8, 17), (10, -12, 20), (22, -32, 13)], 4.8 * scale)
    atrium = tube(half, [(22, -32, 13), (25, -40, 6)], 6.3 * scale)
    occipital = tube(half, [(25, -40, 6), (24, -58, 3)], 3.6 * scale)
    temporal = tube(half, [(26, -36, 2), (33, -18, -18), (30, -4, -22)], 2.0 * scale)
    third = ellipsoid(half, (0, -4, 0), (2.3 * scale, 13, 9))
    fourth = ellipsoid(template, (0, -39, -34), (6.5 * scale, 4.5 * scale, 9))
    return union(frontal, body, atrium, occipital, temporal, third, fourth)


def cisterns(template: Floats, width: float) -> Floats:
    """Clearance (mm, [N]) of the basal cisterns and Sylvian fissures: the star round the midbrain and its arms.

    `width` is the half-width in mm of the narrow parts.
    """
    x, y, z = np.abs(template[0]), template[1], template[2]
    half = np.stack([x, y, z])
    pentagon = ellipsoid(half, (0, 8, -25), (10, 9, 8))
    stem = tube(half, [(6, 12, -25), (22, 16, -23), (37, 13, -17)], 1.2 + width)
    # Round the midbrain: from the notch between the peduncles in front, wider behind.
    turn = np.arctan2(x, y + 14)
    waist = 15 - 4.5 * np.exp(-((turn / 0.45) ** 2)) - 2.5 * np.clip(turn - 2.2, 0, None) + 0.12 * (z + 22)
    ring = np.abs(np.hypot(x, y + 14) - waist) - (0.1 + width * (0.7 + 0.2 * turn))
    ambient = common(ring, np.abs(z + 22) - 12)
    quadrigeminal = ellipsoid(half, (0, -31, -10), (9, 4, 7))
    prepontine = ellipsoid(half, (0, -1, -39), (12, 3.5, 11))
    magna = ellipsoid(half, (0, -62, -44), (12, 5, 8))
    # The insula is a standing sheet; the fissure leaves it sideways and backwards along a line that climbs.
    insula = common(np.abs(x - 38 + 0.012 * (y - 4) ** 2) - 0.8 * width, np.abs(y - 2) - 19, np.abs(z + 1) - 17)
    climb = z + 12 - 0.55 * (12 - y - 0.35 * (x - 38))
    lateral = common(np.abs(climb) * 0.85 - (0.7 * width + 0.04 * (x - 38)), 37 - x, np.abs(y + 4) - 28)
    return union(pentagon, stem, ambient, quadrigeminal, prepontine, magna, insula, lateral)


def midline(template: Floats, half_width: float) -> Floats:
    """Clearance (mm, [N]) of the interhemispheric fissure: the midline plane but for the callosum and below."""
    x, y, z = template
    callosum = (1 - np.hypot((y + 3) / 42, (z - 3) / 26)) * 33
    below = -22 - 0.22 * y - z
    return common(np.abs(x) - np.float32(half_width), callosum, below)


def sulci(template: Floats, depth: Floats, half_width: float, rng: np.random.Generator) -> Floats:
    """Clearance (mm, [N]) of furrows that run inwards from the brain's surface, `depth` mm below it.

    They follow the zero lines of a random field that only depends on direction, so they stand upright on the
    surface; their width varies along the way and dies out at about 18 mm depth.
    """
    radius = np.sqrt((template**2).sum(0)) + np.float32(1e-3)
    wavelength = 27.0
    field = waves(rng, template / radius * 70, wavelength, 24)
    distance = np.abs(field) * radius * np.float32(wavelength / (2 * np.pi * 70))
    reach = 1 - depth / np.float32(18)
    opening = half_width * (np.float32(0.9) + np.float32(0.45) * waves(rng, template, 45.0, 8))
    return common(distance - opening * np.clip(reach, 0, 1), -reach * 18)


class Spaces(NamedTuple):
    """Clearances (mm, [N]) of the fluid in a brain: where blood can run, the film over the gyri, the ventricles."""

    clefts: Floats
    film: Floats
    ventricles: Floats


def spaces(patient: Patient, template: Floats, depth: Floats, rng: np.random.Generator) -> Spaces:
    """The fluid spaces of `patient` at average-head positions `template`, `depth` mm below the brain's cover."""
    furrows = sulci(template, depth, patient.sulcus, rng)
    gap = midline(template, 0.7 + 0.7 * patient.sulcus)
    bent = template + np.stack([1.6 * waves(rng, template, 34.0, 8) for _ in range(3)])
    clefts = union(furrows, gap, cisterns(bent, patient.sulcus))
    return Spaces(clefts, depth - np.float32(1.1 * patient.sulcus), ventricles(template, patient.ventricle))
