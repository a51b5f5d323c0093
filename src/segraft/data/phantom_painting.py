"""What each place of a synthetic head measures in Hounsfield units."""

import numpy as np

from segraft.data.phantom_anatomy import (
    Floats,
    Patient,
    Shell,
    Spaces,
    base_bones,
    common,
    ellipsoid,
    tube,
    union,
    waves,
)

AIR_HU, FAT_HU, MUSCLE_HU, GLOBE_HU = -1000.0, -80.0, 45.0, 15.0
WHITE_HU, GREY_HU, CSF_HU, DURA_HU = 27.0, 37.0, 5.0, 50.0
DIPLOE_HU, TABLE_HU, BASE_HU = 720.0, 1250.0, 950.0
CORTEX_MM = 3.6


def blend(image: Floats, clearance: Floats, value: Floats | float, edge: float) -> None:
    """Paint `value` (HU) into `image` where `clearance` (mm) is negative, fading over `edge` mm across the rim."""
    image += np.clip(0.5 - clearance / np.float32(edge), 0, 1) * (value - image)


def outside(patient: Patient, points: Floats, shell: Shell, edge: float, rng: np.random.Generator) -> Floats:
    """Air, head rest, skin, face and skull at head positions `points` (mm, [3, N]): HU, [N]."""
    image = np.full(points.shape[1], AIR_HU, np.float32)
    rest = np.maximum(np.abs(shell.below_skin + 7) - 1.5, points[1] + 35)
    blend(image, rest, -150.0, edge)
    blend(image, -shell.below_skin, MUSCLE_HU, edge)
    blend(image, np.abs(shell.below_skin - 3.5) - 0.7, FAT_HU, edge)

    mirrored = np.stack([np.abs(points[0]), points[1], points[2]])
    for centre, half_axes, value in (
        ((31, 69, -38), (18, 20, 17), FAT_HU),
        ((31, 76, -38), (11.5, 11.5, 11.5), GLOBE_HU),
        ((0, 66, -42), (11, 15, 13), AIR_HU),
    ):
        inside_skin = np.maximum(ellipsoid(mirrored, centre, half_axes), 2 - shell.below_skin)
        blend(image, inside_skin, value, edge)

    # Bone fades outwards of the inner table only, so that what lies against it keeps its own intensity.
    thickness = patient.skull * (1 + np.float32(0.12) * waves(rng, points, 60.0, 6))
    above = -shell.depth
    bone = np.clip(above / np.float32(edge), 0, 1) * np.clip(0.5 + (thickness - above) / np.float32(edge), 0, 1)
    from_middle = np.abs(2 * above / thickness - 1)
    hardness = np.clip((from_middle - 0.3) / 0.4, 0, 1)
    image += bone * (DIPLOE_HU + (TABLE_HU - DIPLOE_HU) * hardness - image)
    return image


def contents(template: Floats, fluid: Spaces, depth: Floats, edge: float) -> Floats:
    """Brain, fluid and dura at average-head positions `template` (mm, [3, N]): HU, [N].

    Args:
        template: positions in the cranial cavity.
        fluid: its fluid spaces at these positions.
        depth: distance in mm below the inner table.
        edge: the width in mm over which two tissues mix.
    """
    x, y, z = template
    mirrored = np.stack([np.abs(x), y, z])
    image = np.full(x.shape, WHITE_HU, np.float32)
    blend(image, np.minimum(fluid.clefts, fluid.film) - np.float32(CORTEX_MM), GREY_HU, edge)
    caudate = tube(mirrored, [(12, 24, 6), (15, 10, 14)], 4.5)
    lentiform = ellipsoid(mirrored, (25, 4, 2), (6.0, 16.0, 11.0))
    thalamus = ellipsoid(mirrored, (10, -14, 5), (8.0, 13.0, 10.0))
    blend(image, union(caudate, lentiform, thalamus), GREY_HU, edge)
    cerebellum = ellipsoid(mirrored, (20, -48, -36), (26.0, 24.0, 15.0))
    blend(image, cerebellum, 33.0, 3 * edge)

    wet = union(fluid.clefts, fluid.film, fluid.ventricles)
    blend(image, wet, CSF_HU, edge)
    falx = common(np.abs(x) - 0.6, depth - 38, -14 - 0.3 * y - z)
    sinus = np.maximum(np.abs(x) + depth - 5.0, -5 - z)
    blend(image, np.minimum(falx, sinus), DURA_HU, edge)
    pineal = ellipsoid(template, (0, -31, 2), (2.0, 2.5, 4.0))
    plexus = tube(mirrored, [(23, -35, 9), (24, -40, 6)], 2.2)
    blend(image, pineal, 140.0, edge)
    blend(image, plexus, 60.0, edge)
    return image


def shade(image: Floats, patient: Patient, template: Floats, depth: Floats, edge: float) -> None:
    """Add what the skull does to `image` (HU, in place): base bone, hardened beam near it, dark band between."""
    image += np.float32(patient.shading) * np.exp(-depth / np.float32(7))
    between = np.maximum(np.abs(template[2] + 40) - 4, np.abs(template[1] + 20) - 7)
    blend(image, between, image - np.float32(1.5 * patient.shading), 6.0)
    blend(image, base_bones(template) + np.float32(edge / 2), BASE_HU, edge)
