"""A synthetic cohort of head CTs with intracranial blood, for the demo and for tests where real scans may not go.

Two related tasks, so that a network trained on the one transfers in part to the other: "traumatic" (lens-shaped
and crescent-shaped collections under the skull) and "subarachnoid" (blood in the cisterns, fissures and sulci).
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from segraft.atomic import replacing
from segraft.data import phantom_anatomy as anatomy
from segraft.data import phantom_bleeding as bleeding
from segraft.data import phantom_painting as painting
from segraft.data.phantom_anatomy import Floats, Patient
from segraft.data.strata import STRATA_ML
from segraft.errors import SegraftError

Task = Literal["traumatic", "subarachnoid"]
Triple = tuple[float, float, float]
WriteScan = Callable[[nib.Nifti1Image, Path, str], Path]
"""Writes an image into a folder under a name (without ending) and says where."""

SHAPE = (96, 96, 20)
SPACING_MM = (2.2, 2.2, 7.0)
SMALLEST_ML = 5.0
FIELD_OF_VIEW_MM = (170.0, 205.0, 110.0)
"""The least extent of a scan: wide and long enough for any head, whose top or bottom may be cut as in clinics."""

DESCRIPTION = (
    "Synthetic head CTs drawn by a program: no patients, no anatomy of any person, not for clinical use. "
    "A stand-in to show and test the software; results on it say nothing about results in patients."
)


def head(
    rng: np.random.Generator,
    *,
    task: Task,
    stratum: int,
    shape: tuple[int, int, int] = SHAPE,
    spacing: Triple = SPACING_MM,
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """Draw one synthetic head CT and its haematoma mask.

    Args:
        rng: source of everything random; the same state gives the same voxels.
        task: "traumatic" or "subarachnoid".
        stratum: index into `STRATA_ML` of the annotated volume.
        shape: voxels along right, anterior and superior.
        spacing: voxel size in mm.

    Returns:
        Image in HU and mask (1 = haematoma), both of `shape`, in RAS axes with the head in the middle.

    Raises:
        SegraftError: the task or stratum is unknown, the field of view is too small for a head, or the voxels
            are too large for a volume in the stratum.
    """
    _check(task, stratum, shape, spacing)
    millilitres = math.prod(spacing) / 1000
    voxels = _voxels(rng, stratum, millilitres)
    patient = Patient.draw(rng)
    points = patient.place(grid(shape, spacing))
    edge = float(np.clip((spacing[0] + spacing[1]) / 2, 0.5, 2.5))  # mm over which tissues mix in a voxel

    shell = anatomy.shell(patient, points, rng)
    image = painting.outside(patient, points, shell, edge, rng)
    cavity = np.flatnonzero(shell.depth > 0)
    fill = _traumatic if task == "traumatic" else _subarachnoid
    image[cavity], blood = fill(patient, points[:, cavity], shell.depth[cavity], rng, voxels, millilitres, edge)

    mask = np.zeros(image.shape, np.uint8)
    mask[cavity] = blood
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), (0.6, 0.6, 0))
    scan = image.reshape(shape) + noise * np.float32(patient.noise / noise.std())
    return np.rint(scan).clip(-1024, 3071).astype(np.int16), mask.reshape(shape)


def _traumatic(
    patient: Patient,
    points: Floats,
    depth: Floats,
    rng: np.random.Generator,
    voxels: int,
    millilitres: float,
    edge: float,
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """HU and mask of a cranial cavity with a lens or a crescent of blood that pushes the brain aside."""
    if rng.uniform() < 0.5:
        score = bleeding.lens(points, depth, rng)
    else:
        score = bleeding.crescent(points, depth, voxels * millilitres, rng)
    bones = anatomy.base_bones(patient.template(points))
    mask, inside = bleeding.lowest(np.where(bones > 0, score, bleeding.NOWHERE), voxels)

    middle = points[:, mask].mean(1, keepdims=True)
    nearness = np.exp(-((points - middle) ** 2).sum(0) / np.float32(2 * 70**2))
    push = np.float32(min(14.0, 0.5 * float(depth[mask].max()))) * nearness * np.clip(depth / 25, 0, 1)
    pushed = points + push * middle / np.linalg.norm(middle)
    template = _warped(patient, pushed, rng)
    fluid = anatomy.spaces(patient, template, np.maximum(np.minimum(depth, -inside), 0), rng)
    image = painting.contents(template, fluid, depth, edge)
    painting.blend(image, -inside, rng.uniform(60, 70) + 2 * anatomy.waves(rng, points, 20.0), edge)
    painting.shade(image, patient, patient.template(points), depth, edge)
    return image, mask


def _subarachnoid(
    patient: Patient,
    points: Floats,
    depth: Floats,
    rng: np.random.Generator,
    voxels: int,
    millilitres: float,  # noqa: ARG001 (as `_traumatic`)
    edge: float,
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """HU and mask of a cranial cavity with blood in its clefts."""
    template = _warped(patient, points, rng)
    fluid = anatomy.spaces(patient, template, depth, rng)
    bones = anatomy.base_bones(patient.template(points))
    clefts = np.where(bones > 0, fluid.clefts, bleeding.NOWHERE)
    (mask, inside), swelling = bleeding.subarachnoid(template, clefts, voxels, rng)
    fluid = fluid._replace(clefts=fluid.clefts - np.float32(swelling))
    image = painting.contents(template, fluid, depth, edge)
    rim = np.maximum(fluid.clefts, -inside / 2)
    painting.blend(image, rim, rng.uniform(60, 70) + 4 * anatomy.waves(rng, points, 20.0), edge)
    painting.shade(image, patient, patient.template(points), depth, edge)
    return image, mask


def _warped(patient: Patient, points: Floats, rng: np.random.Generator) -> Floats:
    """Head positions (mm, [3, N]) in the average head, bent a little so that no two brains are alike."""
    return patient.template(points) + np.stack([1.3 * anatomy.waves(rng, points, 85.0, 6) for _ in range(3)])


def grid(shape: tuple[int, int, int], spacing: Triple) -> Floats:
    """Voxel centres in mm from the middle of the scan: [3, N], last axis fastest."""
    axes = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True))
    return np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")]).astype(np.float32)


def _check(task: str, stratum: int, shape: tuple[int, int, int], spacing: Triple) -> None:
    if task not in get_args(Task):
        raise SegraftError(f'A phantom cohort has no task "{task}": choose "traumatic" or "subarachnoid".')
    if not 0 <= stratum < len(STRATA_ML):
        raise SegraftError(f"A phantom head has no volume stratum {stratum}: choose 0 to {len(STRATA_ML) - 1}.")
    extent = tuple(n * s for n, s in zip(shape, spacing, strict=True))
    if not min(spacing) > 0 or any(not e >= least for e, least in zip(extent, FIELD_OF_VIEW_MM, strict=True)):
        raise SegraftError(
            f"A phantom scan of {shape} voxels of {spacing} mm is too small for a head: "
            f"let shape times spacing be at least {FIELD_OF_VIEW_MM} mm."
        )


def _voxels(rng: np.random.Generator, stratum: int, millilitres: float) -> int:
    """A number of voxels of `millilitres` each whose volume lies in the stratum; small volumes are likelier."""
    low, high = STRATA_ML[stratum]
    fewest = max(math.floor(low / millilitres) + 1, math.ceil(SMALLEST_ML / millilitres))
    most = math.floor(high / millilitres)
    if fewest > most:
        raise SegraftError(
            f"No whole number of voxels of {millilitres:g} mL has a volume in ({low}, {high}] mL: "
            "use a smaller voxel spacing for the phantom."
        )
    return int(np.clip(round(math.exp(rng.uniform(math.log(fewest), math.log(most)))), fewest, most))


def write_nifti(image: nib.Nifti1Image, folder: Path, name: str) -> Path:
    """Write `folder`/`name`.nii.gz."""
    path = folder / f"{name}.nii.gz"
    with replacing(path) as aside:
        nib.save(image, aside)
    return path


def write_cohort(
    folder: Path,
    *,
    task: Task,
    patients: int,
    seed: int,
    shape: tuple[int, int, int] = SHAPE,
    spacing: Triple = SPACING_MM,
    write_image: WriteScan = write_nifti,
) -> Path:
    """Write a cohort of synthetic head CTs in the layout of the Medical Segmentation Decathlon.

    Case k has its annotated volume in stratum k mod 4 of `STRATA_ML` and depends on task, seed, k and the grid
    alone, so a larger cohort begins with the smaller one of the same seed.

    Args:
        folder: receives `imagesTr/`, `labelsTr/` and `dataset.json`, which is written last.
        task: "traumatic" or "subarachnoid".
        patients: number of cases, one per patient.
        seed: 0 or more.
        shape: voxels along right, anterior and superior.
        spacing: voxel size in mm.
        write_image: how images are written; labels are NIfTI.

    Returns:
        The path of `dataset.json`.

    Raises:
        SegraftError: as for `head`; fewer than one patient; a negative seed; or `folder` holds the
            `dataset.json` of another data set.
    """
    if patients < 1 or seed < 0:
        raise SegraftError(
            f"A phantom cohort of {patients} patients with seed {seed} cannot be drawn: "
            "ask for at least 1 patient and a seed of 0 or more."
        )
    _check(task, 0, shape, spacing)
    listing = Path(folder) / "dataset.json"
    name = f"PHANTOM {task} haematoma (synthetic stand-in)"
    if listing.exists() and f'"{name}"' not in listing.read_text(encoding="utf-8", errors="replace"):
        raise SegraftError(f"{listing} belongs to another data set: choose another folder for the phantom cohort.")

    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(shape, spacing, strict=True)]
    cases = []
    for k in range(patients):
        rng = np.random.default_rng([seed, get_args(Task).index(task), k])
        image, mask = head(rng, task=task, stratum=k % len(STRATA_ML), shape=shape, spacing=spacing)
        case = {"patient": f"{task}_{k:03d}"}
        parts = (("image", "imagesTr", image, write_image), ("label", "labelsTr", mask, write_nifti))
        for key, part, voxels, write in parts:
            scan = nib.Nifti1Image(voxels, affine)
            scan.header.set_xyzt_units("mm")
            path = write(scan, Path(folder) / part, f"phantom_{task}_{k:03d}")
            case[key] = f"./{path.relative_to(folder).as_posix()}"
        cases.append({key: case[key] for key in ("image", "label", "patient")})

    content = {
        "name": name,
        "description": DESCRIPTION,
        "reference": "Drawn by segraft.data.phantom",
        "licence": "CC0-1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "haematoma"},
        "numTraining": patients,
        "numTest": 0,
        "training": cases,
        "test": [],
    }
    with replacing(listing) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return listing
