"""Synthetic brains with a tumour in four MR contrasts, skull-stripped, where real scans may not go.

The parts of a tumour lie within one another, and no contrast shows all of them: oedema only shows in T2 and FLAIR, the
border between oedema and core only in T1 and T1c, and what of the core enhances only in T1c.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from segraft.data import phantom_anatomy as anatomy
from segraft.data.phantom import Triple, grid
from segraft.data.phantom_anatomy import Floats, Patient, Spaces
from segraft.data.phantom_painting import CORTEX_MM, blend
from segraft.errors import SegraftError

CHANNELS = ("T1", "T1c", "T2", "FLAIR")
EDEMA, CORE, ENHANCING = 1, 2, 3
"""Label values, as the Decathlon's brain tumours have them: each voxel has that of the innermost part."""

SHAPE = (48, 48, 32)
SPACING_MM: Triple = (3.0, 3.6, 3.8)
FIELD_OF_VIEW_MM = (135.0, 165.0, 115.0)
"""The least extent of a scan, which holds a brain."""

FEWEST_VOXELS, TRIES = 16, 100
AS_IT_WAS = np.nan
"""The signal of what changes nothing in a contrast."""

SIGNALS: dict[str, tuple[float, float, float, float]] = {
    "white matter": (1.00, 1.00, 0.42, 0.50),
    "grey matter": (0.72, 0.74, 0.58, 0.64),
    "cerebellum": (0.84, 0.86, 0.50, 0.57),
    "fluid": (0.26, 0.27, 1.00, 0.15),
    "dura": (0.45, 1.30, 0.32, 0.36),
    "plexus": (0.45, 1.25, 0.85, 0.45),
    "gliosis": (AS_IT_WAS, AS_IT_WAS, 0.68, 0.88),
    "edema": (AS_IT_WAS, AS_IT_WAS, 0.82, 0.96),
    "core": (0.46, 0.47, AS_IT_WAS, AS_IT_WAS),
    "enhancing": (AS_IT_WAS, 1.40, AS_IT_WAS, AS_IT_WAS),
}
"""Tissue -> signal in each of `CHANNELS`, where white matter has 1 in T1."""


class Tumour(NamedTuple):
    """Clearances (mm, [N]), each within the one before."""

    edema: Floats
    core: Floats
    enhancing: Floats


def brain(
    rng: np.random.Generator, *, shape: tuple[int, int, int] = SHAPE, spacing: Triple = SPACING_MM
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """Draw one brain with a tumour.

    Args:
        rng: source of everything random; the same state gives the same voxels.
        shape: voxels along right, anterior and superior.
        spacing: voxel size in mm.

    Returns:
        Image [*shape, 4], its channels those of `CHANNELS`, 0 outside the brain; and the map of label values. Both are
        in RAS axes with the brain in the middle.

    Raises:
        SegraftError: the field of view is too small for a brain, or the voxels are too large for a tumour's parts.
    """
    check_grid(shape, spacing)
    patient = Patient.draw(rng)
    points = patient.place(grid(shape, spacing))
    edge = float(np.clip((spacing[0] + spacing[1]) / 2, 0.5, 2.5))  # mm over which tissues mix in a voxel
    depth = anatomy.shell(patient, points, rng).depth
    inside = np.flatnonzero(depth > 0)
    points, depth = points[:, inside], depth[inside]
    template = patient.template(points) + np.stack([1.3 * anatomy.waves(rng, points, 85.0, 6) for _ in range(3)])
    fluid = anatomy.spaces(patient, template, depth, rng)
    tumour = _tumour(points, depth, fluid, rng, spacing)
    signal = _painted(points, template, depth, fluid, tumour, edge, rng)

    image = np.zeros((len(CHANNELS), math.prod(shape)), np.float32)
    image[:, inside] = _scanned(signal, points, rng)
    labels = np.zeros(math.prod(shape), np.uint8)
    labels[inside] = _labelled(tumour)
    return (
        np.moveaxis(np.rint(image).clip(0, 32767).astype(np.int16).reshape(-1, *shape), 0, -1),
        labels.reshape(shape),
    )


def _tumour(points: Floats, depth: Floats, fluid: Spaces, rng: np.random.Generator, spacing: Triple) -> Tumour:
    """One in either half of the brain, all of whose parts are seen on this grid."""
    for _ in range(TRIES):
        found = _drawn(points, depth, fluid, rng)
        if np.bincount(_labelled(found), minlength=4)[1:].min() >= FEWEST_VOXELS:
            return found
    raise SegraftError(
        f"A phantom brain on voxels of {spacing} mm has no tumour whose parts have {FEWEST_VOXELS} voxels each: "
        "use a smaller voxel spacing for the phantom."
    )


def _drawn(points: Floats, depth: Floats, fluid: Spaces, rng: np.random.Generator) -> Tumour:
    """A lumpy core that enhances along its rim, in oedema that reaches farther to one side, but into no ventricle."""
    centre = np.array([rng.choice((-1, 1)) * rng.uniform(20, 40), rng.uniform(-42, 36), rng.uniform(-8, 30)])
    offset = points - centre.astype(np.float32)[:, None]
    away = np.sqrt(((offset / rng.uniform(0.85, 1.2, 3).astype(np.float32)[:, None]) ** 2).sum(0))
    radius = rng.uniform(11, 21)
    covered = 2 - depth  # it stays below the brain's surface
    core = anatomy.common(away - radius + 2 * anatomy.waves(rng, points, 24.0), covered)
    spread = rng.standard_normal(3)
    spread *= rng.uniform(3, 7) / np.linalg.norm(spread)
    farther = offset - spread.astype(np.float32)[:, None]
    reach = radius + rng.uniform(6, 14)
    edema = np.sqrt((farther**2).sum(0)) - reach + 4 * anatomy.waves(rng, points, 30.0)
    edema = anatomy.union(anatomy.common(edema, covered, -fluid.ventricles), core)
    rim = radius * rng.uniform(0.35, 0.6) * (1 + 0.3 * anatomy.waves(rng, points, 20.0))
    return Tumour(edema, core, anatomy.common(core, -rim - core))


def _labelled(tumour: Tumour) -> npt.NDArray[np.uint8]:
    """The value of the innermost part at each place, 0 outside the tumour."""
    labels = np.zeros(tumour.edema.shape, np.uint8)
    for value, clearance in zip((EDEMA, CORE, ENHANCING), tumour, strict=True):
        labels[clearance < 0] = value
    return labels


def _painted(
    points: Floats,
    template: Floats,
    depth: Floats,
    fluid: Spaces,
    tumour: Tumour,
    edge: float,
    rng: np.random.Generator,
) -> Floats:
    """Signal of every place of the brain in each contrast, [4, N]; each scan has tissues a little of its own."""
    signals = {name: np.array(each, np.float32) * rng.normal(1, 0.04, 4) for name, each in SIGNALS.items()}
    mirrored = np.stack([np.abs(template[0]), template[1], template[2]])
    nuclei = anatomy.union(
        anatomy.tube(mirrored, [(12, 24, 6), (15, 10, 14)], 4.5),
        anatomy.ellipsoid(mirrored, (25, 4, 2), (6.0, 16.0, 11.0)),
        anatomy.ellipsoid(mirrored, (10, -14, 5), (8.0, 13.0, 10.0)),
    )
    cortex = anatomy.union(fluid.clefts, fluid.film) - np.float32(CORTEX_MM)
    wet = anatomy.union(fluid.clefts, fluid.film, fluid.ventricles)
    falx = anatomy.common(np.abs(template[0]) - 0.8, depth - 38, -14 - 0.3 * template[1] - template[2])
    sinus = anatomy.common(np.abs(template[0]) + depth - 5, -5 - template[2])
    # Caps of the ventricles and spots in the white matter, as ageing leaves: bright in FLAIR, yet no tumour.
    gliosis = fluid.ventricles - np.float32(1.5) + 3 * anatomy.waves(rng, points, 25.0)
    places = (
        ("grey matter", cortex, edge),
        ("grey matter", nuclei, edge),
        ("cerebellum", anatomy.ellipsoid(mirrored, (20, -48, -36), (26.0, 24.0, 15.0)), 3 * edge),
        ("gliosis", anatomy.common(gliosis, -cortex), edge),
        ("fluid", wet, edge),
        ("dura", np.minimum(falx, sinus), edge),
        ("plexus", anatomy.tube(mirrored, [(23, -35, 9), (24, -40, 6)], 2.2), edge),
        ("edema", tumour.edema, edge),
        ("core", tumour.core, edge),
        ("enhancing", tumour.enhancing, edge),
    )
    image = np.repeat(signals["white matter"][:, None], points.shape[1], axis=1).astype(np.float32)
    for tissue, clearance, width in places:
        for channel, value in zip(image, signals[tissue], strict=True):
            if not np.isnan(value):
                blend(channel, clearance, value, width)
    return image


def _scanned(signal: Floats, points: Floats, rng: np.random.Generator) -> Floats:
    """What a scanner makes of it: uneven coils, noise of a magnitude image, and a gain of each scan and contrast."""
    measured = np.empty_like(signal)
    for channel, clean in zip(measured, signal, strict=True):
        uneven = clean * np.exp(np.float32(0.08) * anatomy.waves(rng, points, 160.0))
        real, imaginary = rng.normal(0, rng.uniform(0.02, 0.04), (2, clean.size))
        channel[:] = np.hypot(uneven + real, imaginary) * math.exp(rng.normal(math.log(600), 0.35))
    return measured


def check_grid(shape: tuple[int, int, int], spacing: Triple) -> None:
    """Refuse a grid that holds no brain.

    Raises:
        SegraftError: naming the least extent.
    """
    extent = tuple(n * s for n, s in zip(shape, spacing, strict=True))
    if not min(spacing) > 0 or any(not e >= least for e, least in zip(extent, FIELD_OF_VIEW_MM, strict=True)):
        raise SegraftError(
            f"A phantom scan of {shape} voxels of {spacing} mm is too small for a brain: "
            f"let shape times spacing be at least {FIELD_OF_VIEW_MM} mm."
        )
