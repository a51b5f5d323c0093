"""From a scan as it was taken to what a network sees, and from the network's grid back to the scan's."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import CropForeground, NormalizeIntensity, Orientation, ScaleIntensityRange, Spacing
from monai.transforms.utils_pytorch_numpy_unification import percentile
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from segraft.data.channels import Scan, described
from segraft.data.checks import check_image, load_case
from segraft.data.cohort import Case
from segraft.data.labels import Labels
from segraft.data.levelling import levelling_of
from segraft.data.nifti import same_grid
from segraft.data.resampling import resample
from segraft.data.scan_preparation import ScanPreparation
from segraft.errors import SegraftError

_AXES = (("L", "R"), ("P", "A"), ("I", "S"))
OWN_AXES = "own"
"""In place of an orientation: each scan's own."""


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


class ZScore(_Settings):
    """Each volume gets mean 0 and standard deviation 1; nothing is clipped.

    Attributes:
        nonzero: of what is not 0 alone, which stays as it is: the air around a head whose skull was taken off.
    """

    kind: Literal["z_score"] = "z_score"
    nonzero: bool = False


Intensity = Annotated[Window | Percentiles | ZScore, Field(discriminator="kind")]
_Intensities = Annotated[
    Annotated[Intensity, Tag("all")] | Annotated[tuple[Intensity, ...], Tag("each")],
    Discriminator(lambda value: "each" if isinstance(value, list | tuple) else "all"),
]


_LATER = {"channel_grids": "refuse", "average": "probability", "weights": "gaussian"}
"""Fields that came later, with their defaults."""


class Preparation(_Settings):
    """How scans are prepared, in this order: levelled, turned, resampled, scaled, cropped; then cut into patches.

    Attributes:
        head: the scan is a head CT: level it, remove the neck, crop or pad in-plane to `HEAD_SIZE` (`level_head`).
            What is added is air, which moves percentiles: give a window.
        orientation: where the three axes point, as in NIfTI ("RAS": to the right, to the front, up); "own" leaves each
            scan's as they are, and then patches are not mirrored by themselves, as left and right may be anywhere.
        spacing: voxel size in mm along those axes; None keeps each scan's own.
        channel_grids: what to do where channels of a scan lie on another grid than its first: refuse them, or resample
            them to that (linearly; beyond their own edges with their lowest value).
        intensity: what becomes 0 and what becomes 1 (or mean 0 and standard deviation 1), for all channels or one for
            each. Percentiles and means are each channel's.
        crop_foreground: crop to the box of what is above 0 after scaling, in any channel.
        patch: voxels along those axes that a network sees at once; a last size of 1 means 2D slices.
        overlap: of neighbouring patches along each axis, as a share of their size, when a whole scan is segmented.
        average: what is averaged where patches overlap.
        weights: of patches there: larger towards their centres, or the same throughout.
    """

    CHANGEABLE: ClassVar[frozenset[str] | None] = None

    head: bool = False
    orientation: str = "RAS"
    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    channel_grids: Literal["refuse", "resample"] = "refuse"
    intensity: _Intensities = Percentiles()
    crop_foreground: bool = False
    patch: tuple[PositiveInt, PositiveInt, PositiveInt] = (96, 96, 96)
    overlap: float = Field(default=0.5, ge=0, lt=1)
    average: Literal["probability", "logit"] = "probability"
    weights: Literal["gaussian", "constant"] = "gaussian"

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, values_of: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So that records, and trainings to go on with, are those from before these fields were there."""
        values: dict[str, Any] = values_of(self)
        return {name: value for name, value in values.items() if (name, value) not in _LATER.items()}

    @field_validator("orientation")
    @classmethod
    def _each_axis_once(cls, orientation: str) -> str:
        if orientation == OWN_AXES:
            return orientation
        axes = sorted(place for code in orientation for place, pair in enumerate(_AXES) if code in pair)
        if len(orientation) != 3 or axes != [0, 1, 2]:
            raise ValueError(f"{orientation!r} must hold one letter each of L/R, P/A and I/S, such as RAS")
        return orientation

    @model_validator(mode="after")
    def _head_is_turned(self) -> "Preparation":
        if self.head and self.orientation == OWN_AXES:
            raise ValueError("a head is levelled and turned: give an orientation such as RAS")
        return self

    def intensities(self, channels: int) -> tuple[Window | Percentiles | ZScore, ...]:
        """Of each channel.

        Raises:
            SegraftError: there are settings for another number of channels.
        """
        if not isinstance(self.intensity, tuple):
            return (self.intensity,) * channels
        if len(self.intensity) != channels:
            raise SegraftError(
                f"{len(self.intensity)} intensity settings were given for {channels} channels: give one for each, or "
                "one for all."
            )
        return self.intensity

    @property
    def windows(self) -> str:
        """Where these lie."""
        return "dense"

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """They are not mirrored."""
        return ()

    @property
    def flip_axes(self) -> tuple[int, ...]:
        """Left-right alone, the body's one near symmetry."""
        return tuple(axis for axis, code in enumerate(self.orientation) if code in "LR")

    def without_mirroring(self) -> Self:
        """The same, as patches are not mirrored where scans are segmented."""
        return self

    def prepare(self, scan: Scan) -> MetaTensor:
        """As `prepare_scan`."""
        return _prepared(scan, self)

    def to_scan(self, scores: torch.Tensor, affine: NDArray[np.float64], image: nib.Nifti1Image) -> torch.Tensor:
        """As `to_input_grid`."""
        return to_input_grid(scores, affine, image)


def prepare_image(path: str | Path, preparation: ScanPreparation) -> MetaTensor:
    """Read a scan of one channel (a NIfTI file, or a folder of one DICOM series) and prepare it.

    Returns:
        [1, X, Y, Z] float32, in 0…1 but with `ZScore`; `.affine` ([4, 4] float64) takes its voxels to mm.

    Raises:
        SegraftError: what `check_image` or, for heads, `level_head` refuses, or a scan in which the intensity setting
            leaves no contrast.
    """
    scan = Scan(f"the image {path}", ("",), (Path(path),), (check_image(path),))
    return prepare_scan(scan, preparation)


def prepare_case(case: Case, preparation: ScanPreparation, labels: Collection[int]) -> dict[str, torch.Tensor]:
    """Read and prepare a case with its label.

    Args:
        case: a case with a label.
        preparation: how.
        labels: the labels asked for.

    Returns:
        "image": [C, X, Y, Z] MetaTensor as of `prepare_scan`; "label": [L, X, Y, Z] float32, one plane of 0
        and 1 per label or region, in the order of `labels`.

    Raises:
        SegraftError: what `prepare_scan` or `load_case` refuses.
    """
    asked = Labels.of(labels)
    image, positions = prepare_positions(case, preparation, asked)
    planes = torch.from_numpy(asked.membership())[:, positions.long()]
    return {"image": image, "label": planes.float()}


def prepare_positions(case: Case, preparation: ScanPreparation, labels: Labels) -> tuple[MetaTensor, torch.Tensor]:
    """As `prepare_case`, but the label as one uint8 volume [X, Y, Z] of places in `labels.membership()`.

    That is k where `labels.values_covered[k - 1]` is, and 0 elsewhere.
    """
    values = labels.values_covered
    if len(values) > np.iinfo(np.uint8).max:
        raise SegraftError(f"{len(values)} labels were asked for: ask for at most {np.iinfo(np.uint8).max}.")
    scan, label = load_case(case, labels)
    image = prepare_scan(scan, preparation)
    data = np.asanyarray(label.dataobj)
    positions = np.zeros(data.shape, dtype=np.float32)
    for place, value in enumerate(values, start=1):
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


def prepare_scan(scan: Scan, preparation: ScanPreparation) -> MetaTensor:
    """Prepare a scan in memory.

    Returns:
        [C, X, Y, Z] float32, in 0…1 but with `ZScore`; NaN throughout in channels that are missing. `.affine`
        ([4, 4] float64) takes voxels to mm.

    Raises:
        SegraftError: channels on several grids, unless they are to be resampled; a head of several channels; what
            `level_head` refuses; a channel in which the intensity setting leaves no contrast.
    """
    return preparation.prepare(scan)


def _prepared(scan: Scan, preparation: Preparation) -> MetaTensor:
    first, intensities = scan.first, preparation.intensities(len(scan.channels))
    there = {place: channel for place, channel in enumerate(scan.channels) if channel is not None}
    together = [place for place, channel in there.items() if same_grid(channel, first)]
    apart = [place for place in there if place not in together]
    if apart and preparation.channel_grids == "refuse":
        raise SegraftError(
            f"{scan.told(apart[0])} lies on another grid than {scan.told(together[0])} ({described(there[apart[0]])}; "
            f"{described(first)}): resample it, or have it done (--channel-grids resample)."
        )
    images = [there[place] for place in together]
    if preparation.head:
        if len(scan.channels) > 1:
            raise SegraftError(f"{scan.who} has several channels, and only a head CT is levelled: leave --head out.")
        images = [_levelled(first, scan.path)]
    data = [torch.from_numpy(image.get_fdata(dtype=np.float32, caching="unchanged")) for image in images]
    # with its channels from the start: MONAI counts the spatial axes once, here
    stacked = data[0][None] if len(data) == 1 else torch.stack(data)
    image = MetaTensor(stacked, affine=torch.as_tensor(images[0].affine, dtype=torch.float64))
    if preparation.orientation != OWN_AXES:
        image = Orientation(preparation.orientation, labels=_AXES)(image)
    if preparation.spacing is not None:
        image = Spacing(preparation.spacing, mode="bilinear", padding_mode="border", dtype=torch.float32)(image)
    planes = {place: image[at : at + 1] for at, place in enumerate(together)}
    planes |= {place: _onto(there[place], image) for place in apart}
    scaled = [_scaled(planes[place], scan.told(place), intensities[place]) for place in there]
    if len(scaled) > 1:
        image = MetaTensor(torch.cat([plane.as_tensor() for plane in scaled]), affine=image.affine)
    else:
        image = scaled[0]
    if preparation.crop_foreground:
        image = CropForeground(allow_smaller=True)(image)
    if not scan.missing:
        return image
    whole = torch.full((len(scan.channels), *image.shape[1:]), torch.nan)
    whole[list(there)] = image.as_tensor()
    return MetaTensor(whole, affine=image.affine)


def _levelled(scan: nib.Nifti1Image, path: Path) -> nib.Nifti1Image:
    try:
        return levelling_of(scan).grid.sample(scan)
    except SegraftError as error:
        raise SegraftError(f"the image {path} cannot be levelled: {error}") from error


def _onto(channel: nib.Nifti1Image, image: MetaTensor) -> MetaTensor:
    """A channel on the grid of a prepared image, in one interpolation."""
    values = torch.from_numpy(channel.get_fdata(dtype=np.float32, caching="unchanged"))
    lowest = values.min()  # beyond its own edges there is nothing, which need not be 0
    moved = resample((values - lowest)[None], channel.affine, image.shape[1:], _numpy(image.affine), mode="bilinear")
    return MetaTensor(moved + lowest, affine=image.affine)


def _scaled(image: MetaTensor, told: str, intensity: Window | Percentiles | ZScore) -> MetaTensor:
    if not isinstance(intensity, ZScore):
        low, high = _range(image, told, intensity)
        return ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)(image)
    plain = image.as_tensor()
    counted = plain[plain != 0] if intensity.nonzero else plain
    if not counted.numel() or float(counted.min()) == float(counted.max()):
        raise SegraftError(f"{told} has one value beside 0, so nothing to scale by: choose a window, or percentiles.")
    return NormalizeIntensity(nonzero=intensity.nonzero)(image.clone())  # which writes into what it is given


def _range(image: MetaTensor, told: str, intensity: Window | Percentiles) -> tuple[float, float]:
    """The intensities that become 0 and 1."""
    if isinstance(intensity, Window):
        if float(image.max()) <= intensity.low or float(image.min()) >= intensity.high:
            raise SegraftError(
                f"{told} lies wholly outside the intensity window {intensity.low:g} to "
                f"{intensity.high:g}: choose a window that fits it, or percentiles."
            )
        return intensity.low, intensity.high
    plain = image.as_tensor()
    low, high = float(percentile(plain, intensity.lower)), float(percentile(plain, intensity.upper))
    if low >= high:
        raise SegraftError(
            f"{told} has the value {low:g} at both percentiles {intensity.lower:g} and "
            f"{intensity.upper:g}: choose wider percentiles, or a window."
        )
    return low, high


def _numpy(affine: torch.Tensor | NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(torch.as_tensor(affine).detach().cpu(), dtype=np.float64)
