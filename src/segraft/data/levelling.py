"""Levellings of heads that were found before: each takes a second or more, and a study asks for it in every run."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import nibabel as nib
import numpy as np

from segraft.atomic import replacing
from segraft.data.head import Grid, Levelling, level_head

FORMAT = 1
"""Of what is kept: raised when `level_head` comes to find something else."""

_FOLDER: ContextVar[Path | None] = ContextVar("segraft_levellings", default=None)


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Within the `with` block, keep every levelling in a folder, and take it from there."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def levelling_of(image: nib.Nifti1Image) -> Levelling:
    """As `level_head`, of a head in HU; found once where levellings are kept.

    Raises:
        SegraftError: what `level_head` refuses.
    """
    folder = _FOLDER.get()
    if folder is None:
        return level_head(image)
    path = folder / f"{_digest(image)}.json"
    if path.is_file():
        return _read(path)
    found = level_head(image)
    with replacing(path) as aside:
        aside.write_text(json.dumps(_values(found)), encoding="utf-8")
    return found


def _digest(image: nib.Nifti1Image) -> str:
    voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    digest = hashlib.sha256(repr((FORMAT, voxels.shape, np.asarray(image.affine, np.float64).tolist())).encode())
    digest.update(np.ascontiguousarray(voxels).data)
    return digest.hexdigest()[:32]


def _values(found: Levelling) -> dict[str, object]:
    grids = {
        name: {"shape": list(grid.shape), "affine": grid.affine.tolist()}
        for name, grid in (("turned", found.turned), ("grid", found.grid))
    }
    return {"yaw": found.yaw, "roll": found.roll, "neck_slices": found.neck_slices, **grids}


def _read(path: Path) -> Levelling:
    values = json.loads(path.read_text(encoding="utf-8"))
    turned, grid = (
        Grid(tuple(values[name]["shape"]), np.array(values[name]["affine"], dtype=np.float64))
        for name in ("turned", "grid")
    )
    return Levelling(values["yaw"], values["roll"], turned, grid, values["neck_slices"])
