"""How a MONAI bundle's inferer cuts scans into patches, as fields of a `Preparation`."""

import math
from collections.abc import Mapping
from typing import Any

from segraft.errors import SegraftError
from segraft.exchange.bundle_config import Config
from segraft.exchange.bundle_entries import PROBABILITIES, SCORES
from segraft.exchange.bundle_preparation import Unlike, only

LARGEST = 2**30
"""Voxels of a patch, more than which no network takes."""

_FREE = dict.fromkeys(
    (
        *("sw_batch_size", "sw_device", "device", "progress", "cache_roi_weight_map", "cpu_thresh"),
        *("buffer_steps", "buffer_dim"),
    )
)
"""Arguments that say where and how fast, not what; they are often computed."""

_CHECKED: dict[str, Any] = {
    "roi_size": None,
    "overlap": None,
    "mode": ("gaussian", "constant"),
    "padding_mode": None,
    "sigma_scale": (0.125, [0.125] * 2, [0.125] * 3),
    "cval": (0,),
    "with_coord": (False,),
}
"""Others, and which of their values are done alike; None: looked at below."""

INFERERS: dict[str, tuple[int, dict[str, Any]]] = {
    "SlidingWindowInferer": (3, _CHECKED),
    "SliceInferer": (2, _CHECKED | {"spatial_dim": (2,)}),
}
"""MONAI's inferer -> the axes of its patches, and its arguments."""


def read_patches(inferer: Any, config: Config) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of the preparation that an inferer is, and notes on what differs.

    Raises:
        Unlike: naming what Segraft does not do.
    """
    name = str(inferer.get("_target_", "")).rpartition(".")[2] if isinstance(inferer, Mapping) else ""
    if name not in INFERERS:
        raise Unlike(name or "no inferer")
    axes, arguments = INFERERS[name]
    try:
        if config.disabled(inferer):
            raise Unlike(f"{name} is disabled")
        given = {
            each: config.resolve(value)
            for each, value in inferer.items()
            if each not in _FREE and not each.startswith("_")
        }
    except SegraftError as error:
        raise Unlike(f"{name}: {error}") from error
    try:
        only({"spatial_dim": 0, **given} if axes == 2 else given, **arguments)
        size, overlap = _size(given.get("roi_size"), axes), _overlap(given.get("overlap", 0.25))
    except Unlike as error:
        raise Unlike(f"{name}: {error}") from error
    notes = []
    if given.get("padding_mode", "constant") != "constant":
        notes.append("scans smaller than the patch are filled up with zeros here, by MONAI's run with their border.")
    average = "probability" if config.raw(SCORES) == PROBABILITIES else "logit"
    patch = (*size, *([1] if axes == 2 else []))
    fields = {"patch": patch, "overlap": overlap, "average": average, "weights": given.get("mode", "constant")}
    return fields, tuple(notes)


def _size(size: Any, axes: int) -> list[int]:
    sizes = [size] * axes if isinstance(size, int) else size
    whole = isinstance(sizes, list) and all(type(each) is int and each > 0 for each in sizes)  # bool is no size
    if not whole or len(sizes) != axes or math.prod(sizes) > LARGEST:
        raise Unlike(f"roi_size is {size}")
    return list(sizes)


def _overlap(overlap: Any) -> float:
    each = overlap if isinstance(overlap, list) and overlap else [overlap]
    if any(type(one) not in (int, float) or not 0 <= one < 1 or one != each[0] for one in each):
        raise Unlike(f"overlap is {overlap}")
    return float(each[0])
