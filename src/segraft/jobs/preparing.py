"""Settling how scans are prepared: what the user says, else what the base was trained with, else what fits the data."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import nn

from segraft.data.cohort import Case
from segraft.data.nifti import load_nifti
from segraft.data.preparation import Preparation
from segraft.errors import SegraftError
from segraft.networks.registry import size_multiple, spatial_dims

LARGEST_3D, LARGEST_2D = 96, 512


def settle_preparation(
    given: Preparation | Mapping[str, Any] | None,
    inherited: Preparation | None,
    net: nn.Module,
    cases: Sequence[Case],
) -> Preparation:
    """The preparation to use.

    Args:
        given: the user's: whole, or only the fields that are to differ from the base's (or from the defaults).
        inherited: what the base was trained with.
        net: for its dimensions and the sizes it takes.
        cases: for the patch size where neither says one: their median size, at most 96 voxels along each axis in 3D
            and 512 in 2D, rounded up to what the network takes.

    Raises:
        SegraftError: a value that does not fit.
    """
    if isinstance(given, Preparation):
        return given
    fields = {**(inherited.model_dump(mode="json") if inherited else {}), **(given or {})}
    try:
        settled = Preparation(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise SegraftError(f"preparation {name} = {first['input']!r}: {first['msg']}.") from error
    return settled if "patch" in fields else settled.model_copy(update={"patch": _patch(settled, net, cases)})


def _patch(preparation: Preparation, net: nn.Module, cases: Sequence[Case]) -> tuple[int, int, int]:
    from monai.data.utils import to_affine_nd
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    sizes = []
    for case in cases[:50]:
        scan = load_nifti(case.image)
        affine = to_affine_nd(3, scan.affine)
        order = ornt_transform(axcodes2ornt(tuple(preparation.orientation)), io_orientation(affine))[:, 0].astype(int)
        mm = np.linalg.norm(affine[:3, :3], axis=0)[order]
        scale = np.ones(3) if preparation.spacing is None else mm / np.asarray(preparation.spacing)
        sizes.append(np.asarray(scan.shape)[order] * scale)
    median = np.median(sizes, axis=0)
    flat = spatial_dims(net) == 2
    multiple, largest = size_multiple(net), LARGEST_2D if flat else LARGEST_3D
    x, y, z = (int(min(np.ceil(size / multiple) * multiple, max(largest, multiple))) for size in median)
    return (x, y, 1) if flat else (x, y, z)
