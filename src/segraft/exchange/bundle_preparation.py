"""How MONAI's transforms prepare scans, as a `Preparation`, and a `Preparation` as MONAI's transforms."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from segraft.data.preparation import OWN_AXES, Intensity, Percentiles, Preparation, Window, ZScore
from segraft.errors import SegraftError

INVERTIBLE = ("Orientationd", "Spacingd", "CropForegroundd")
"""Transforms after which a mask has to be brought back to its scan's grid."""

AXES = [["L", "R"], ["P", "A"], ["I", "S"]]
Arguments = Mapping[str, Any]


class Unlike(Exception):  # noqa: N818  never leaves this file
    """A transform does what no preparation does; the message says what."""


@dataclass
class Found:
    """What the transforms so far make of a scan.

    Attributes:
        fields: of a `Preparation`.
        done: names of what was done, in order.
        channels: of the image.
        key: under which the image stands.
    """

    channels: int
    key: str = "image"
    fields: dict[str, Any] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def step(self, name: str, *, before: Sequence[str]) -> None:
        """Count a step, which must not come twice, nor after any of those that Segraft does later."""
        late = [other for other in before if other in self.done]
        if name in self.done or late:
            raise Unlike(f"it comes after {late[0]}" if late else "it comes twice")
        self.done.append(name)


def _orientation(found: Found, given: Arguments) -> None:
    only(given, axcodes=None, labels=(None, AXES), as_closest_canonical=(False,))
    codes = given.get("axcodes")
    # resampled first, a scan has other sizes where its axes are oblique or its size is no multiple
    found.step("the orientation", before=("the spacing", "the intensity", "the crop"))
    found.fields["orientation"] = "".join(map(str, codes)) if isinstance(codes, list) else codes


def _spacing(found: Found, given: Arguments) -> None:
    only(
        given,
        pixdim=None,
        mode=("bilinear", ["bilinear"]),
        padding_mode=("border", ["border"]),
        diagonal=(False,),
        align_corners=(False, [False]),
        dtype=None,
        recompute_affine=(False,),
        scale_extent=(False,),
    )
    sizes = given.get("pixdim")
    sizes = [sizes] * 3 if isinstance(sizes, int | float) else sizes
    if not isinstance(sizes, list) or len(sizes) != 3 or not all(map(_is_size, sizes)):
        raise Unlike(f"pixdim is {sizes}")
    found.step("the spacing", before=("the intensity", "the crop"))
    found.fields["spacing"] = tuple(map(float, sizes))


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _window(found: Found, given: Arguments) -> None:
    only(given, a_min=None, a_max=None, b_min=(0,), b_max=(1,), clip=(True,), dtype=None)
    _require(given, "b_min", "b_max", "clip")
    found.step("the intensity", before=("the crop",))
    found.fields["intensity"] = Window(low=given["a_min"], high=given["a_max"])


def _percentiles(found: Found, given: Arguments) -> None:
    only(
        given,
        lower=None,
        upper=None,
        b_min=(0,),
        b_max=(1,),
        clip=(True,),
        relative=(False,),
        channel_wise=(True,) if found.channels > 1 else (True, False),
        dtype=None,
    )
    _require(given, "b_min", "b_max", "clip", *(["channel_wise"] if found.channels > 1 else []))
    found.step("the intensity", before=("the crop",))
    found.fields["intensity"] = Percentiles(lower=given["lower"], upper=given["upper"])


def _range(found: Found, given: Arguments) -> None:
    each = found.channels > 1
    only(given, minv=(0,), maxv=(1,), factor=(None,), channel_wise=(True,) if each else (True, False), dtype=None)
    _require(given, *(["channel_wise"] if each else []))
    found.step("the intensity", before=("the crop",))
    found.fields["intensity"] = Percentiles(lower=0, upper=100)


def _z_score(found: Found, given: Arguments) -> None:
    each = found.channels > 1
    only(
        given,
        nonzero=(True, False),
        channel_wise=(True,) if each else (True, False),
        subtrahend=(None,),
        divisor=(None,),
        dtype=None,
    )
    _require(given, *(["channel_wise"] if each else []))
    found.step("the intensity", before=("the crop",))
    found.fields["intensity"] = ZScore(nonzero=bool(given.get("nonzero", False)))


def _crop(found: Found, given: Arguments) -> None:
    only(
        given,
        source_key=(found.key,),
        margin=(0,),
        allow_smaller=(True, False),
        k_divisible=(1,),
        start_coord_key=None,
        end_coord_key=None,
        channel_indices=(None,),
        mode=None,
    )
    _require(given, "source_key")
    found.step("the crop", before=())
    if "the intensity" not in found.done:
        raise Unlike("it comes before the intensity")
    found.fields["crop_foreground"] = True


def _nothing(_found: Found, _given: Arguments) -> None:
    """Reading, and what changes types and devices alone."""


READERS: dict[str, Callable[[Found, Arguments], None]] = {
    "Orientation": _orientation,
    "Spacing": _spacing,
    "ScaleIntensityRange": _window,
    "ScaleIntensityRangePercentiles": _percentiles,
    "ScaleIntensity": _range,
    "NormalizeIntensity": _z_score,
    "CropForeground": _crop,
    **dict.fromkeys(
        ("LoadImage", "EnsureChannelFirst", "AddChannel", "AsChannelFirst", "EnsureType", "ToTensor", "ToDevice"),
        _nothing,
    ),
}
"""MONAI's transform -> what it means for a preparation. To read another one, add one entry."""

_COMMON = {"_target_", "keys", "allow_missing_keys", "lazy", "_desc_", "_disabled_", "_requires_"}


def read_transforms(transforms: Sequence[Arguments], channels: int, key: str) -> dict[str, Any]:
    """The fields of the preparation that these transforms are.

    Args:
        transforms: of a `Compose`, in order, each with its `_target_`.
        channels: of the image.
        key: under which the image stands.

    Raises:
        Unlike: naming the one that no preparation does.
    """
    found = Found(channels, key)
    for given in transforms:
        name = str(given.get("_target_", "")).rpartition(".")[2]
        plain = name.removesuffix("Dict").removesuffix("d").removesuffix("D")
        keys = given.get("keys", key)
        keys = [keys] if isinstance(keys, str) else keys
        if not isinstance(keys, list):
            raise Unlike(f"{name}: keys is {keys}")
        if given.get("_disabled_") is True or key not in keys:
            continue
        reader = READERS.get(plain)
        if reader is None:
            raise Unlike(name or str(given))
        try:
            reader(found, {argument: value for argument, value in given.items() if argument not in _COMMON})
        except Unlike as error:
            raise Unlike(f"{name}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise Unlike(f"{name}: {' '.join(str(error).split())}") from error
    if "the intensity" not in found.done:
        raise Unlike("intensities are left as they are")
    return {"orientation": OWN_AXES, **found.fields}


def write_transforms(preparation: Preparation, channels: int) -> list[dict[str, Any]]:
    """The transforms of MONAI that prepare scans alike.

    Raises:
        SegraftError: MONAI has none for one of the steps.
    """
    if preparation.head:
        raise SegraftError("heads are levelled before they are segmented, which MONAI has no transform for.")
    intensities = preparation.intensities(channels)
    if len(set(intensities)) > 1:
        raise SegraftError("channels have intensity settings of their own, which MONAI has no transform for.")
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "reader": "NibabelReader", "image_only": True},
        {"_target_": "EnsureChannelFirstd"},
    ]
    if preparation.orientation != OWN_AXES:
        steps.append({"_target_": "Orientationd", "axcodes": preparation.orientation, "labels": AXES})
    if preparation.spacing is not None:
        sizes = list(preparation.spacing)
        steps.append({"_target_": "Spacingd", "pixdim": sizes, "mode": "bilinear", "padding_mode": "border"})
    steps.append(WRITERS[intensities[0].kind](intensities[0]))
    if preparation.crop_foreground:
        steps.append({"_target_": "CropForegroundd", "source_key": "image", "allow_smaller": True})
    return [{"_target_": step.pop("_target_"), "keys": "image", **step} for step in steps]


def _write_window(intensity: Any) -> dict[str, Any]:
    limits = {"a_min": intensity.low, "a_max": intensity.high}
    return {"_target_": "ScaleIntensityRanged", **limits, "b_min": 0.0, "b_max": 1.0, "clip": True}


def _write_percentiles(intensity: Any) -> dict[str, Any]:
    limits = {"lower": intensity.lower, "upper": intensity.upper, "b_min": 0.0, "b_max": 1.0}
    return {"_target_": "ScaleIntensityRangePercentilesd", **limits, "clip": True, "channel_wise": True}


def _write_z_score(intensity: Any) -> dict[str, Any]:
    return {"_target_": "NormalizeIntensityd", "nonzero": intensity.nonzero, "channel_wise": True}


WRITERS: dict[str, Callable[[Intensity], dict[str, Any]]] = {
    "window": _write_window,
    "percentiles": _write_percentiles,
    "z_score": _write_z_score,
}
"""Kind of an intensity setting -> MONAI's transform."""


def only(given: Arguments, **allowed: Sequence[Any] | None) -> None:
    """Refuse arguments that are not known, and values of those that have few; None allows any."""
    for name, value in given.items():
        values = allowed.get(name, ())
        if values is not None and value not in values:
            raise Unlike(f"{name} is {value}")


def _require(given: Arguments, *names: str) -> None:
    """Refuse arguments left out whose default is another value."""
    for name in names:
        if name not in given:
            raise Unlike(f"{name} is not given")
