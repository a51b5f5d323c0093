"""Preparing scans as nnU-Net v2 does, with its own functions (Isensee et al. 2021), and bringing results back."""

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, Self

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from segraft.data.channels import Scan, described
from segraft.data.nifti import same_grid
from segraft.errors import SegraftError

_RESAMPLING: dict[str, str] = {
    "resample_data_or_seg_to_shape": "default_resampling",
    "resample_torch_fornnunet": "resample_torch",
    "no_resampling_hack": "no_resampling",
}
"""nnU-Net's resampling functions -> the module each is in. A file may name no other."""

_SAME = 1e-4  # relative difference of voxel sizes in a header and by its affine

Array = NDArray[Any]
Axis = Annotated[int, Field(ge=0, le=2)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Normalization(_Settings):
    """Of one channel.

    Attributes:
        scheme: nnU-Net's class.
        masked: only what is not zero around the body counts and is changed.
        statistics: of the foreground of its training data, such as `mean` and `percentile_99_5`.
    """

    scheme: Literal[
        "CTNormalization",
        "ZScoreNormalization",
        "NoNormalization",
        "RescaleTo01Normalization",
        "RGBTo01Normalization",
    ]
    masked: bool = False
    statistics: dict[str, float] = Field(default_factory=dict)

    def run(self, channel: Array, nonzero: Array) -> Array:
        """A channel [X, Y, Z] scaled; `nonzero` is negative outside the body."""
        schemes = _theirs("nnunetv2.preprocessing.normalization.default_normalization_schemes")
        scaled: Array = getattr(schemes, self.scheme)(self.masked, self.statistics).run(channel, nonzero)
        return scaled


class Resampling(_Settings):
    """One of nnU-Net's functions, with its arguments."""

    function: Literal["resample_data_or_seg_to_shape", "resample_torch_fornnunet", "no_resampling_hack"]
    arguments: dict[str, bool | int | float | str | None] = Field(default_factory=dict)

    def run(self, data: Array, shape: Array, spacing: Sequence[float], to_spacing: Sequence[float]) -> Array:
        """Data [C, X, Y, Z] on a grid of another shape whose outermost voxels end where they did."""
        module = _theirs(f"nnunetv2.preprocessing.resampling.{_RESAMPLING[self.function]}")
        resample = partial(getattr(module, self.function), **self.arguments)
        return np.asarray(resample(data, shape, spacing, to_spacing))


class NNUNetPreparation(_Settings):
    """How a configuration of nnU-Net prepares scans: axes, crop to what is not zero, normalisation, resampling.

    Axes are nnU-Net's: those of the file (or of RAS) from the last to the first, transposed. In 2D the first of them,
    across the slices, comes last here.

    Attributes:
        kind: tells these settings in a file.
        reorient: turn scans to RAS before; None keeps the file's own axes.
        transpose: the plans' `transpose_forward`.
        spacing: in mm, of nnU-Net's axes; two of them for 2D slices, whose distance is kept.
        normalization: of each channel.
        resample_image: to that spacing.
        resample_scores: and back.
        patch: as of any preparation, along the axes here.
        overlap: of neighbouring patches along each axis, as a share of their size.
        mirror_axes: along which the network was trained to be mirrored.
    """

    CHANGEABLE: ClassVar[frozenset[str] | None] = frozenset({"patch", "overlap"})

    kind: Literal["nnunet"] = "nnunet"
    reorient: Literal["RAS"] | None = None
    transpose: tuple[int, int, int] = (0, 1, 2)
    spacing: tuple[PositiveFloat, ...] = Field(min_length=2, max_length=3)
    normalization: tuple[Normalization, ...] = Field(min_length=1)
    resample_image: Resampling
    resample_scores: Resampling
    patch: tuple[PositiveInt, PositiveInt, PositiveInt]
    overlap: float = Field(default=0.5, ge=0, lt=1)
    mirror_axes: tuple[Axis, ...] = ()

    @property
    def average(self) -> str:
        """As nnU-Net does."""
        return "bare logit"

    @property
    def weights(self) -> str:
        """As nnU-Net does."""
        return "gaussian"

    @property
    def windows(self) -> str:
        """As nnU-Net does."""
        return "even"

    @property
    def flip_axes(self) -> tuple[int, ...]:
        """As nnU-Net trained."""
        return self.mirror_axes

    def without_mirroring(self) -> Self:
        """For labels that have a side."""
        return self.model_copy(update={"mirror_axes": ()})

    def prepare(self, scan: Scan) -> MetaTensor:
        """Prepare a scan in memory.

        Returns:
            [C, X, Y, Z] float32; `.affine` takes voxels to mm.

        Raises:
            SegraftError: another number of channels, one that is missing, or channels on several grids; no nnU-Net.
        """
        channels = self._channels(scan)
        turned, affine = self._turned(np.stack(channels), scan.first)
        cropping = _theirs("nnunetv2.preprocessing.cropping.cropping")
        data, nonzero, box = cropping.crop_to_nonzero(turned, None)
        spacing = _spacing(scan.first, affine)
        target = self._target(spacing)
        compute_shape = _theirs("nnunetv2.preprocessing.resampling.default_resampling").compute_new_shape
        shape = compute_shape(data.shape[1:], spacing, target)
        if min(shape) < 1:
            raise SegraftError(
                f"{scan.who} is too thin for nnU-Net's voxels of {target} mm: it would have {shape} of them."
            )
        for place, normalization in enumerate(self.normalization):
            data[place] = normalization.run(data[place], nonzero[0])
        prepared = self.resample_image.run(data, shape, spacing, target)
        scale = np.array(data.shape[1:]) / np.array(prepared.shape[1:])
        start = np.array([first for first, _ in box]) + (scale - 1) / 2
        placed = affine @ nib.affines.from_matvec(np.diag(scale), start)
        order = self._order
        image = np.ascontiguousarray(prepared.transpose(0, *(axis + 1 for axis in order)), dtype=np.float32)
        return MetaTensor(torch.from_numpy(image), affine=torch.from_numpy(placed[:, [*order, 3]]))

    def to_scan(self, scores: torch.Tensor, affine: NDArray[np.float64], image: nib.Nifti1Image) -> torch.Tensor:
        """Resample scores as nnU-Net does; those of what was cropped away are -inf.

        Args:
            scores: [L, X, Y, Z] of a prepared scan.
            affine: [4, 4] of it.
            image: the scan's first channel.

        Returns:
            [L, *image.shape] float32.
        """
        order = self._order
        theirs = scores.cpu().numpy().transpose(0, *(place + 1 for place in np.argsort(order)))
        placed = np.asarray(affine)[:, [*np.argsort(order), 3]]
        empty, turned = self._turned(np.zeros((1, *image.shape), dtype=bool), image)
        between = np.linalg.inv(turned) @ placed
        scale = np.diag(between)[:3]
        shape = np.rint(scale * theirs.shape[1:]).astype(int)
        start = np.rint(between[:3, 3] - (scale - 1) / 2).astype(int)
        spacing = _spacing(image, turned)
        found = self.resample_scores.run(theirs, shape, self._target(spacing), spacing)
        whole = np.full((len(found), *empty.shape[1:]), -np.inf, dtype=np.float32)
        whole[(slice(None), *(slice(first, first + size) for first, size in zip(start, shape, strict=True)))] = found
        return torch.from_numpy(np.ascontiguousarray(self._turned_back(whole, image)))

    @property
    def _order(self) -> tuple[int, int, int]:
        """Of the axes here, the place among nnU-Net's."""
        return (1, 2, 0) if len(self.spacing) == 2 else (0, 1, 2)

    def _target(self, spacing: list[float]) -> list[float]:
        return [spacing[0], *self.spacing] if len(self.spacing) == 2 else list(self.spacing)

    def _channels(self, scan: Scan) -> list[NDArray[np.float32]]:
        if len(scan.channels) != len(self.normalization):
            raise SegraftError(
                f"{scan.who} has {len(scan.channels)} channels, and nnU-Net's plans are for {len(self.normalization)}: "
                "list as many."
            )
        data = []
        for place, channel in enumerate(scan.channels):
            if channel is None:
                raise SegraftError(
                    f"{scan.who} lacks its channel {scan.names[place]}, which nnU-Net's network needs: add the file."
                )
            if not same_grid(channel, scan.first):
                raise SegraftError(
                    f"{scan.told(place)} lies on another grid than {scan.told(0)} ({described(channel)}; "
                    f"{described(scan.first)}): resample it, as nnU-Net needs all channels on one grid."
                )
            data.append(np.asarray(channel.get_fdata(dtype=np.float32, caching="unchanged")))
        return data

    def _turned(self, data: Array, image: nib.Nifti1Image) -> tuple[Array, NDArray[np.float64]]:
        """Data [C, *image.shape] along nnU-Net's axes, and their affine."""
        turn = self._turn(image)
        data = np.stack([apply_orientation(channel, turn) for channel in data])
        affine = np.asarray(image.affine @ inv_ornt_aff(turn, image.shape))
        axes = [2 - axis for axis in self.transpose]
        return data.transpose(0, *(axis + 1 for axis in axes)), affine[:, [*axes, 3]]

    def _turned_back(self, data: Array, image: nib.Nifti1Image) -> Array:
        axes = np.argsort([2 - axis for axis in self.transpose])
        data = data.transpose(0, *(axis + 1 for axis in axes))
        turn = self._turn(image)
        places = turn[:, 0].astype(int)
        back = np.column_stack([np.argsort(places), turn[np.argsort(places), 1]])
        return np.stack([apply_orientation(plane, back) for plane in data])

    def _turn(self, image: nib.Nifti1Image) -> Array:
        found = io_orientation(image.affine)
        wanted = found if self.reorient is None else axcodes2ornt(tuple(self.reorient))
        return np.asarray(ornt_transform(found, wanted))


def _spacing(image: nib.Nifti1Image, affine: NDArray[np.float64]) -> list[float]:
    """Voxel sizes along the axes of an affine of `image`: as its header states them, which nnU-Net reads."""
    sizes, zooms = voxel_sizes(affine), np.asarray(image.header.get_zooms()[:3], dtype=np.float64)
    axes = np.abs(np.linalg.inv(image.affine[:3, :3]) @ affine[:3, :3]).argmax(axis=0)
    stated = zooms[axes]
    return [float(size) for size in (stated if np.allclose(stated, sizes, rtol=_SAME, atol=0) else sizes)]


def _theirs(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise SegraftError(
            f"scans are prepared by nnU-Net's own functions, and a package is not there ({error.name}): pip install "
            "'segraft[nnunet]'."
        ) from error


def preparation_of_plans(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], mirror_axes: tuple[int, ...]
) -> NNUNetPreparation:
    """The preparation of one configuration of nnU-Net's plans.

    Args:
        plans: as in plans.json.
        configuration: one of them, with what it inherits.
        mirror_axes: as the checkpoint allows.

    Raises:
        KeyError, ValueError: they lack something, or name a function that is not nnU-Net's own.
    """
    statistics = plans.get("foreground_intensity_properties_per_channel") or plans.get(
        "foreground_intensity_properties_by_modality", {}
    )
    schemes = zip(configuration["normalization_schemes"], configuration["use_mask_for_norm"], strict=True)
    patch = configuration["patch_size"]
    return NNUNetPreparation(
        reorient="RAS" if plans.get("image_reader_writer", "").endswith("WithReorient") else None,
        transpose=tuple(plans["transpose_forward"]),
        spacing=tuple(configuration["spacing"]),
        normalization=tuple(
            Normalization(scheme=scheme, masked=masked, statistics=statistics.get(str(place), {}))
            for place, (scheme, masked) in enumerate(schemes)
        ),
        resample_image=_resampling(configuration, "data"),
        resample_scores=_resampling(configuration, "probabilities"),
        patch=(*patch, 1) if len(patch) == 2 else tuple(patch),
        mirror_axes=mirror_axes,
    )


def _resampling(configuration: Mapping[str, Any], of: str) -> Resampling:
    arguments = dict(configuration[f"resampling_fn_{of}_kwargs"])
    return Resampling(function=configuration[f"resampling_fn_{of}"], arguments=arguments)
