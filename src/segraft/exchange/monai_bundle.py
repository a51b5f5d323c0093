"""Opening a MONAI bundle: its network and weights as a base, its transforms as a preparation, as far as they go."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from segraft.data.preparation import Preparation
from segraft.errors import SegraftError
from segraft.exchange.bundle_config import Config, config_file, read_config
from segraft.exchange.bundle_network import described, network_of, with_exchangeable_outputs
from segraft.exchange.bundle_outputs import labels_of
from segraft.exchange.bundle_patches import read_patches
from segraft.exchange.bundle_postprocessing import activation_of
from segraft.exchange.bundle_preparation import Unlike, read_transforms
from segraft.exchange.bundle_weights import weights_of
from segraft.exchange.opening import Opened, require_no_fold

CONFIGS = ("inference", "evaluate", "train")
PREPROCESSING = ("preprocessing", "validate#preprocessing", "pre_transforms")
INFERER = ("inferer", "validate#inferer")
POSTPROCESSING = ("postprocessing", "validate#postprocessing", "post_transforms")
"""Where a configuration may have each."""


def open_bundle(path: Path, fold: str | None = None) -> Opened:
    """Read a bundle's folder; none of its code is run.

    Args:
        path: the folder that has `configs` and `models`.
        fold: must be None.

    Raises:
        SegraftError: no bundle, or one whose network cannot be built from what its files say.
    """
    require_no_fold(fold, f"monai:{path}")
    if not path.is_dir():
        cure = "unpack it first" if path.suffix == ".zip" else "give the folder that has configs and models"
        raise SegraftError(f"{path} is no folder of a MONAI bundle: {cure}.")
    where = config_file(path / "configs", CONFIGS)
    about = config_file(path / "configs", ("metadata",))
    if where is None:
        raise SegraftError(f"{path} has no configs/inference.json (nor .yaml): give the folder of a MONAI bundle.")
    config = read_config(where, {"bundle_root": str(path)})
    metadata = read_config(about).values if about else {}
    network = network_of(config, metadata)
    count = network.arguments["out_channels"]
    activation = activation_of(config, _place(config, POSTPROCESSING), count)
    names = _names(metadata, "outputs", "pred", count)
    labels, background, told = labels_of(names, count, activation, config)
    channels = _channels(metadata, network.arguments["in_channels"])
    preparation, said = _preparation(config, len(channels))
    unlike = activation.unlike
    settled = with_exchangeable_outputs(network)
    return Opened(
        network=settled.path,
        arguments={name: value for name, value in settled.arguments.items() if name != "out_channels"},
        weights=weights_of(path, config),
        labels=labels,
        background=background,
        channels=channels,
        preparation=preparation,
        notes=(*settled.notes, *told, *said, *activation.notes),
        unlike=tuple(f"{config.path} makes masks in a way that Segraft has not got ({each})." for each in unlike),
    )


def _place(config: Config, places: Sequence[str]) -> str | None:
    return next((place for place in places if config.has(place)), None)


def _names(metadata: Mapping[str, Any], side: str, name: str, count: int) -> tuple[str, ...]:
    """Of channels, in order; empty where the metadata does not name each."""
    defined = described(metadata, side, name).get("channel_def")
    if not isinstance(defined, Mapping):
        return ()
    by_place = {str(place): str(text) for place, text in defined.items()}
    names = tuple(by_place.get(str(place), "") for place in range(count))
    return names if all(names) and len(by_place) == count else ()


def _channels(metadata: Mapping[str, Any], count: int) -> tuple[str, ...]:
    from segraft.data.channels import numbered

    if count == 1:
        return ("",)
    return _names(metadata, "inputs", "image", count) or numbered(count)


def _preparation(config: Config, channels: int) -> tuple[Preparation | None, tuple[str, ...]]:
    """How scans are prepared and cut into patches, where Segraft does the same; and what differs."""
    place = _place(config, INFERER)
    try:
        fields = _transforms(config, channels)
        patch, notes = read_patches(config.followed(config.raw(place)) if place else None, config)
        return Preparation(**fields, **patch), notes
    except ValidationError as error:
        first = error.errors()[0]
        told = f"{'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}"
    except Unlike as error:
        told = str(error)
    note = (
        f"{config.path} prepares or segments scans in a way that Segraft has not got ({told}): say how they are "
        "prepared where it is adapted (--spacing, --window, --patch, …)."
    )
    return None, (note,)


def _transforms(config: Config, channels: int) -> dict[str, Any]:
    place = _place(config, PREPROCESSING)
    composed = config.followed(config.raw(place)) if place else None
    listed = config.followed(composed.get("transforms")) if isinstance(composed, Mapping) else None
    if not isinstance(listed, list):
        raise Unlike("it has no preprocessing that is a Compose of transforms")
    given, key = [], None
    for each in map(config.followed, listed):
        if not isinstance(each, Mapping):
            raise Unlike(str(each))
        try:
            if config.disabled(each):
                continue
            given.append({name: config.resolve(value) for name, value in each.items() if name not in _FREE})
        except SegraftError as error:
            raise Unlike(f"{each.get('_target_')}: {error}") from error
        if key is None and "LoadImage" in str(each.get("_target_")):
            keys = given[-1].get("keys")
            key = keys if isinstance(keys, str) else keys[0] if isinstance(keys, list) and keys else None
    return read_transforms(given, channels, str(key or "image"))


_FREE = ("dtype", "device", "reader", "data_type")
"""Arguments that do not count, and are often computed."""
