"""From a scan as it was taken to what a network sees, and from the network's grid back to the scan's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import CropForeground, Orientation, ScaleIntensityRange, Spacing
from monai.transforms.utils_pytorch_numpy_unification import percentile
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from segraft.data.checks import check_image, load_case
from segraft.data.cohort import Case
from segraft.data.levelling import levelling_of
from segraft.data.resampling import resample
from segraft.errors import SegraftError

_AXES = (("L", "R"), ("P", "A"), ("I", "S"))


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Window(_Settings):
    """Intensities from `low` to `high` (HU in CT) become 0…1; what is beyond is clipped."""

    kind: Literal["window"] = "window"
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> "Window":
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class Percentiles(_Settings):
    """Each volume's own percentiles `lower` and `upper` become 0 and 1; what is beyond is clipped."""

    kind: Literal["percentiles"] = "percentiles"
    lower: float = Field(default=0.5, ge=0, le=100)
    upper: float = Field(default=99.5, ge=0, le=100)

    @model_validator(mode="after")
    def _ordered(self) -> "Percentiles":
        if self.lower >= self.upper:
            raise ValueError(f"lower ({self.lower:g}) must be below upper ({self.upper:g})")
        return self


class Preparation(_Settings):
    """How scans are prepared, in this order: levelled, turned, resampled, scaled, cropped; then cut into patches.

    Attributes:
        head: the scan is a head CT: level it, remove the neck, crop or pad in-plane to `HEAD_SIZE` (`level_head`).
            What is added is air, which moves percentiles: give a window.
        orientation: where the three axes point, as in NIfTI ("RAS": to the right, to the front, up).
        spacing: voxel size in mm along those axes; None keeps each scan's own.
        intensity: what becomes 0 and what becomes 1.
        crop_foreground: crop to the box of what is above 0 after scaling.
        patch: voxels along those axes that a network sees at once; a last size of 1 means 2D slices.
        overlap: of neighbouring patches along each axis, as a share of their size, when a whole scan is segmented.
    """

    head: bool = False
    orientation: str = "RAS"
    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    intensity: Annotated[Window | Percentiles, Field(discriminator="kind")] = Percentiles()
    crop_foreground: bool = False
    patch: tuple[PositiveInt, PositiveInt, PositiveInt] = (96, 96, 96)
    overlap: float = Field(default=0.5, ge=0, lt=1)

    @classmethod
    def from_record(cls, record: Mapping[str, Any], path: str | Path) -> "Preparation":
        """The preparation that the file at `path` has recorded.

        Raises:
            SegraftError: the record is none of a preparation, or of a later version.
        """
        try:
            return cls(**record)
        except (ValidationError, TypeError) as error:
            raise SegraftError(
                f"{path} does not say how its scans were prepared in a way that this version knows: update segraft, or "
                "make the file again."
            ) from error

    @field_validator("orientation")
    @classmethod
    def _each_axis_once(cls, orientation: str) -> str:
        axes = sorted(place for code in orientation for place, pair in enumerate(_AXES) if code in pair)
        if len(orientation) != 3 or axes != [0, 1, 2]:
            raise ValueError(f"{orientation!r} must hold one letter each of L/R, P/A and I/S, such as RAS")
        return orientation


def prepare_image(path: str | Path, preparation: Preparation) -> MetaTensor:
    """Read a scan (a NIfTI file, or a folder of one DICOM series) and prepare it.

    Returns:
        [1, X, Y, Z] float32 in 0…1; `.affine` ([4, 4] float64) takes its voxels to mm.

    Raises:
        SegraftError: what `check_image` or, for heads, `level_head` refuses, or a scan in which the intensity setting
            leaves no contrast.
    """
    return prepare_scan(check_image(path), Path(path), preparation)


def prepare_case(case: Case, preparation: Preparation, labels: Sequence[int]) -> dict[str, torch.Tensor]:
    """Read and prepare a case with its label.

    Args:
        case: a case with a label.
        preparation: how.
        labels: the label values asked for.

    Returns:
        "image": [1, X, Y, Z] MetaTensor as of `prepare_image`; "label": [L, X, Y, Z] float32, one plane of 0
        and 1 per label, in the order of `labels`.

    Raises:
        SegraftError: what `prepare_image` or `load_case` refuses.
    """
    image, positions = prepare_positions(case, preparation, labels)
    planes = positions == torch.arange(1, len(labels) + 1)[:, None, None, None]
    return {"image": image, "label": planes.float()}


def prepare_positions(case: Case, preparation: Preparation, labels: Sequence[int]) -> tuple[MetaTensor, torch.Tensor]:
    """As `prepare_case`, but the label as one uint8 volume [X, Y, Z]: k where `labels[k - 1]` is, 0 elsewhere."""
    if len(labels) > np.iinfo(np.uint8).max:
        raise SegraftError(f"{len(labels)} labels were asked for: ask for at most {np.iinfo(np.uint8).max}.")
    scan, label = load_case(case, labels)
    image = prepare_scan(scan, case.image, preparation)
    data = np.asanyarray(label.dataobj)
    positions = np.zeros(data.shape, dtype=np.float32)
    for place, value in enumerate(labels, start=1):
        positions[data == value] = place
    moved = resample(
        torch.from_numpy(positions)[None], label.affine, image.shape[1:], _numpy(image.affine), mode="nearest"
    )
    return image, moved[0].to(torch.uint8)


def to_input_grid(
    probability: torch.Tensor, prepared_affine: torch.Tensor | NDArray[np.float64], image: nib.Nifti1Image
) -> torch.Tensor:
    """Bring probabilities from the prepared grid back to the scan's own.

    Linear interpolation; values come back bit for bit where the grids differ by flips, permutations and crops
    alone. 0 outside what was prepared.

    Args:
        probability: [L, X, Y, Z].
        prepared_affine: `.affine` of the prepared image.
        image: the scan as read.

    Returns:
        [L, *image.shape] float32, on the device of `probability`.
    """
    plain = probability.as_tensor() if isinstance(probability, MetaTensor) else probability
    return resample(plain, _numpy(prepared_affine), image.shape, image.affine, mode="bilinear")


def prepare_scan(scan: nib.Nifti1Image, path: Path, preparation: Preparation) -> MetaTensor:
    """As `prepare_image`, of a scan in memory; `path` is for messages."""
    if preparation.head:
        scan = _levelled(scan, path)
    data = torch.from_numpy(scan.get_fdata(dtype=np.float32, caching="unchanged"))
    # with its channel from the start: MONAI counts the spatial axes once, here
    image = MetaTensor(data[None], affine=torch.as_tensor(scan.affine, dtype=torch.float64))
    image = Orientation(preparation.orientation, labels=_AXES)(image)
    if preparation.spacing is not None:
        image = Spacing(preparation.spacing, mode="bilinear", padding_mode="border", dtype=torch.float32)(image)
    low, high = _range(image, path, preparation.intensity)
    image = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)(image)
    if preparation.crop_foreground:
        image = CropForeground(allow_smaller=True)(image)
    return image


def _levelled(scan: nib.Nifti1Image, path: Path) -> nib.Nifti1Image:
    try:
        return levelling_of(scan).grid.sample(scan)
    except SegraftError as error:
        raise SegraftError(f"the image {path} cannot be levelled: {error}") from error


def _range(image: MetaTensor, path: Path, intensity: Window | Percentiles) -> tuple[float, float]:
    """The intensities that become 0 and 1."""
    if isinstance(intensity, Window):
        if float(image.max()) <= intensity.low or float(image.min()) >= intensity.high:
            raise SegraftError(
                f"the image {path} lies wholly outside the intensity window {intensity.low:g} to "
                f"{intensity.high:g}: choose a window that fits it, or percentiles."
            )
        return intensity.low, intensity.high
    plain = image.as_tensor()
    low, high = float(percentile(plain, intensity.lower)), float(percentile(plain, intensity.upper))
    if low >= high:
        raise SegraftError(
            f"the image {path} has the value {low:g} at both percentiles {intensity.lower:g} and "
            f"{intensity.upper:g}: choose wider percentiles, or a window."
        )
    return low, high


def _numpy(affine: torch.Tensor | NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(torch.as_tensor(affine).detach().cpu(), dtype=np.float64)
