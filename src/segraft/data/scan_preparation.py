"""What every way of preparing scans offers, and reading back which one a file has recorded."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray
from pydantic import ValidationError

from segraft.data.channels import Scan
from segraft.errors import SegraftError


class ScanPreparation(Protocol):
    """Settings of how scans are prepared and their results brought back; pydantic models, which files keep.

    Attributes:
        CHANGEABLE: fields that a user may change of a base's; None: all.
        patch: voxels along the prepared axes that a network sees at once; a last size of 1 means 2D slices.
        overlap: of neighbouring patches, when a whole scan is segmented.
        average: what is averaged over them, a key of `segraft.inference.AVERAGING`.
        weights: of patches there, `gaussian` or `constant`.
        windows: where they lie, a key of `segraft.inference.WINDOWS`.
        mirror_axes: along which they are mirrored then.
        flip_axes: along which training mirrors patches.
    """

    CHANGEABLE: ClassVar[frozenset[str] | None]

    @property
    def patch(self) -> tuple[int, int, int]:
        """See above."""
        ...

    @property
    def overlap(self) -> float:
        """See above."""
        ...

    @property
    def average(self) -> str:
        """See above."""
        ...

    @property
    def weights(self) -> str:
        """See above."""
        ...

    @property
    def windows(self) -> str:
        """See above."""
        ...

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """See above."""
        ...

    @property
    def flip_axes(self) -> tuple[int, ...]:
        """See above."""
        ...

    def prepare(self, scan: Scan) -> MetaTensor:
        """[C, X, Y, Z] float32 of a scan; NaN throughout in channels that are missing. `.affine` takes voxels to mm."""
        ...

    def to_scan(self, scores: torch.Tensor, affine: NDArray[np.float64], image: nib.Nifti1Image) -> torch.Tensor:
        """Scores [L, X, Y, Z] of a scan that `prepare` gave this affine, on the scan's own grid."""
        ...

    def without_mirroring(self) -> Self:
        """For labels that have a side."""
        ...

    def model_dump(self, *, mode: str = "python") -> dict[str, Any]:
        """Values for a record."""
        ...


KINDS: dict[str, str] = {
    "": "segraft.data.preparation:Preparation",
    "nnunet": "segraft.data.nnunet_preparation:NNUNetPreparation",
}
"""What a record has under "kind" (nothing: ours) -> the settings. To add a way of preparing, add one entry."""


def recorded_preparation(record: Mapping[str, Any], path: str | Path) -> ScanPreparation:
    """The preparation that the file at `path` has recorded.

    Raises:
        SegraftError: the record is none of a preparation, or of a later version.
    """
    try:
        module, _, name = KINDS[record.get("kind", "")].partition(":")
        found: ScanPreparation = getattr(import_module(module), name)(**record)
    except (ValidationError, TypeError, KeyError, AttributeError) as error:
        raise SegraftError(
            f"{path} does not say how its scans were prepared in a way that this version knows: update segraft, or "
            "make the file again."
        ) from error
    return found
