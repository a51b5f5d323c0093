"""Opening a MONAI bundle: its network and weights as a base, its transforms as a preparation, as far as they go."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segraft.data.preparation import Preparation
from segraft.errors import SegraftError
from segraft.exchange.bundle_config import Config, config_file, read_config
from segraft.exchange.bundle_network import described, network_of, with_exchangeable_outputs
from segraft.exchange.bundle_outputs import PROBABILITIES, SCORES, Activation, activation_of, labels_of
from segraft.exchange.bundle_preparation import Unlike, read_transforms
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
    activation = activation_of(config, _place(config, POSTPROCESSING))
    names = _names(metadata, "outputs", "pred", count)
    labels, background, told = labels_of(names, count, activation, config)
    channels = _channels(metadata, network.arguments["in_channels"])
    preparation, said = _preparation(config, len(channels), activation)
    settled = with_exchangeable_outputs(network)
    return Opened(
        network=settled.path,
        arguments={name: value for name, value in settled.arguments.items() if name != "out_channels"},
        weights=_weights(path, config),
        labels=labels,
        background=background,
        channels=channels,
        preparation=preparation,
        notes=(*settled.notes, *told, *said),
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


def _preparation(config: Config, channels: int, activation: Activation) -> tuple[Preparation | None, tuple[str, ...]]:
    """How scans are prepared and cut into patches, where Segraft does the same; and what differs."""
    try:
        fields = _transforms(config, channels)
    except Unlike as error:
        note = (
            f"{config.path} prepares scans in a way that Segraft has not got ({error}): say how they are prepared "
            "(--spacing, --window, …)."
        )
        return None, (note,)
    try:
        patch, notes = _patches(config)
    except Unlike as error:
        return None, (f"{config.path} segments scans in a way that Segraft has not got ({error}): give --patch.",)
    differ = [*notes, *activation.notes]
    return Preparation(**fields, **patch), tuple(differ)


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
            given.append({name: config.resolve(value) for name, value in each.items() if name not in _FREE})
        except SegraftError as error:
            raise Unlike(f"{each.get('_target_')}: {error}") from error
        if key is None and "LoadImage" in str(each.get("_target_")):
            keys = given[-1].get("keys")
            key = keys if isinstance(keys, str) else keys[0] if isinstance(keys, list) and keys else None
    return read_transforms(given, channels, str(key or "image"))


_FREE = ("dtype", "device", "reader", "data_type")
"""Arguments that do not count, and are often computed."""


def _patches(config: Config) -> tuple[dict[str, Any], list[str]]:
    place = _place(config, INFERER)
    inferer = config.followed(config.raw(place)) if place else None
    name = str(inferer.get("_target_", "")).rpartition(".")[2] if isinstance(inferer, Mapping) else "no inferer"
    if not isinstance(inferer, Mapping) or name not in ("SlidingWindowInferer", "SliceInferer"):
        raise Unlike(name or "no inferer")
    wanted = ("roi_size", "overlap", "mode", "padding_mode", "spatial_dim")
    try:
        given = {each: config.resolve(inferer[each]) for each in wanted if each in inferer}
    except SegraftError as error:
        raise Unlike(str(error)) from error
    size = given.get("roi_size")
    flat = name == "SliceInferer"
    size = [size] * (2 if flat else 3) if isinstance(size, int) else size
    if flat and given.get("spatial_dim", 0) != 2:
        raise Unlike("slices across another axis than the last")
    if not isinstance(size, list) or len(size) != (2 if flat else 3) or not all(_positive(each) for each in size):
        raise Unlike(f"roi_size is {size}")
    overlap = given.get("overlap", 0.25)
    if isinstance(overlap, list):
        if len(set(overlap)) != 1:
            raise Unlike(f"overlap is {overlap}")
        overlap = overlap[0]
    weights = given.get("mode", "constant")
    if weights not in ("gaussian", "constant"):
        raise Unlike(f"mode is {weights}")
    notes = []
    if given.get("padding_mode", "constant") != "constant":
        notes.append("scans smaller than the patch are filled up with zeros here, by MONAI's run with their border.")
    average = "probability" if config.raw(SCORES) == PROBABILITIES else "logit"
    patch = (*size, *([1] if flat else []))
    return {"patch": patch, "overlap": overlap, "average": average, "weights": weights}, notes


def _positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _weights(path: Path, config: Config) -> Path:
    """The state dict: where the configuration loads it from, else `models/model.pt`."""
    named = [each for each in _load_paths(config.values, config) if each.is_file()]
    usual = path / "models" / "model.pt"
    if named or usual.is_file():
        found = named[0] if named else usual
        if not found.resolve().is_relative_to(path.resolve()):
            raise SegraftError(
                f"{config.path} loads weights from outside of the bundle ({found}): copy them to {usual}."
            )
        return found
    if any((path / "models").glob("*.ts")):
        raise SegraftError(
            f"{path} has its weights as TorchScript alone (models/*.ts), which has no layers to graft on: save the "
            "state dict of the network as models/model.pt."
        )
    raise SegraftError(f"{path} has no models/model.pt: download the bundle's large files, or copy the weights there.")


def _load_paths(values: Any, config: Config) -> list[Path]:
    """Paths that checkpoint loaders name, as far as they can be told without running anything."""
    if isinstance(values, Mapping):
        if str(values.get("_target_", "")).endswith("CheckpointLoader") and "load_path" in values:
            try:
                return [Path(str(config.resolve(values["load_path"])))]
            except SegraftError:
                return []
        values = list(values.values())
    return [found for value in values for found in _load_paths(value, config)] if isinstance(values, list) else []
