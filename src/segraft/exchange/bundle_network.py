"""The network of a MONAI bundle, as its configuration describes it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from segraft.errors import SegraftError
from segraft.exchange.bundle_config import Config
from segraft.exchange.bundle_entries import HEAD_ENTRY, INNER_ENTRY, SEQUENCE
from segraft.networks.heads import find_head
from segraft.networks.outputs import PATH as ON_TOP
from segraft.networks.outputs import exchangeable
from segraft.networks.registry import outline
from segraft.networks.trusted import require_trusted

NETWORK = ("network_def", "network", "net", "model")
"""Where a configuration may have it."""

OUTPUTS = ("out_channels", "num_classes")
"""Arguments that say how many outputs a network has."""

SPECIAL = ("_target_", "_desc_", "_requires_", "_disabled_", "_mode_")
REMOVED = {"SwinUNETR": ("img_size",)}
"""Arguments of networks of MONAI that it no longer takes, and that changed nothing but a check of sizes."""

CHANGED = (1, 5)
"""MONAI's version from which SwinUNETR computes otherwise (see `segraft.networks.swin`)."""


@dataclass(frozen=True)
class BundleNetwork:
    """A network for `build`.

    Attributes:
        path: of its class.
        arguments: of it, with both channels.
        notes: what the user should know of it.
    """

    path: str
    arguments: dict[str, Any]
    notes: tuple[str, ...] = ()


def described(metadata: Mapping[str, Any], side: str, name: str) -> Mapping[str, Any]:
    """How the network's input or output is described; of several the one of this name, else the first."""
    formats = metadata.get("network_data_format")
    known = formats.get(side) if isinstance(formats, Mapping) else None
    if not isinstance(known, Mapping) or not known:
        return {}
    found = known.get(name, next(iter(known.values())))
    return found if isinstance(found, Mapping) else {}


def network_of(config: Config, metadata: Mapping[str, Any]) -> BundleNetwork:
    """The network that a configuration describes.

    Raises:
        SegraftError: it cannot be told without running something, or is not one that a file may name.
    """
    if config.raw("network_def") == SEQUENCE:
        return _with_outputs_on_top(config, metadata)
    return _described_by(_definition(config), config, metadata)


def _with_outputs_on_top(config: Config, metadata: Mapping[str, Any]) -> BundleNetwork:
    """As Segraft writes it: a network, and a 1×1 convolution from its outputs to the task's."""
    part, head = (config.followed(config.raw(place)) for place in (INNER_ENTRY, HEAD_ENTRY))
    if not isinstance(part, Mapping) or "_target_" not in part or not isinstance(head, Mapping):
        raise SegraftError(f"{config.path} has no {INNER_ENTRY} and {HEAD_ENTRY} of its network: export it again.")
    inner = _described_by(part, config, metadata)
    channels = {name: inner.arguments[name] for name in ("in_channels", "out_channels")}
    sizes = [config.resolve(head.get(name)) for name in ("in_channels", "out_channels", "kernel_size")]
    count = sizes[1]
    if sizes != [channels["out_channels"], count, 1] or type(count) is not int or count < 1:
        raise SegraftError(
            f"{config.path} has a {HEAD_ENTRY} that is no 1×1 convolution of the outputs of its {INNER_ENTRY}: export "
            "it again."
        )
    rest = {name: value for name, value in inner.arguments.items() if name not in channels}
    arguments = {"network": inner.path, "outputs": channels["out_channels"], "arguments": rest}
    return BundleNetwork(ON_TOP, {**channels, "out_channels": count, **arguments}, inner.notes)


def _described_by(definition: Mapping[str, Any], config: Config, metadata: Mapping[str, Any]) -> BundleNetwork:
    _require_plain(definition, config)
    target = str(definition["_target_"])
    arguments = {name: config.resolve(value) for name, value in definition.items() if name not in SPECIAL}
    path, short = _class_path(target), target.rpartition(".")[2]
    old = _before(metadata.get("monai_version"), CHANGED) or "img_size" in arguments
    gone = [name for name in REMOVED.get(short, ()) if arguments.pop(name, None) is not None]
    notes = [f"{name} of {short} is left out, as MONAI no longer takes it." for name in gone]
    if short == "SwinUNETR" and old:
        from segraft.networks.swin import PATH

        path = PATH
        notes.append("its tokens are joined as by MONAI before 1.5, with which the bundle was made.")
    if arguments.get("deep_supervision"):
        raise SegraftError(
            f"{config.path} builds {short} with deep_supervision, whose outputs are several: save it without, and its "
            "weights without those heads."
        )
    channels = _channels(config, short, arguments, metadata)
    require_trusted(path, arguments, config.path)
    return BundleNetwork(path, {**arguments, **channels}, tuple(notes))


def _definition(config: Config) -> Mapping[str, Any]:
    found = [config.followed(config.raw(place)) for place in NETWORK if config.has(place)]
    definition = next((each for each in found if isinstance(each, Mapping) and "_target_" in each), None)
    if definition is None:
        computed = next((each for each in found if isinstance(each, str)), None)
        what = f"computes its network ({computed!r})" if computed else f"has none of {', '.join(NETWORK)}"
        raise SegraftError(f"{config.path} {what}: describe it there as network_def, by its _target_ and arguments.")
    return definition


def _require_plain(definition: Mapping[str, Any], config: Config) -> None:
    for name, value in definition.items():
        if _has_target(config.followed(value), config):
            raise SegraftError(
                f"{config.path} builds the argument {name} of {definition['_target_']} by a class of its own, and only "
                "networks of plain arguments are read: give its weights with a class of yours (--base "
                "package.module:Class --weights)."
            )


def _channels(config: Config, name: str, arguments: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, int]:
    """`in_channels` and `out_channels`, for `build`."""
    outputs = next((arguments[key] for key in OUTPUTS if key in arguments), None)
    inputs = arguments.get("in_channels", described(metadata, "inputs", "image").get("num_channels"))
    counts = {"in_channels": (inputs, "channels it takes"), "out_channels": (outputs, "outputs it has")}
    for key, (count, what) in counts.items():
        if not isinstance(count, int) or count < 1:
            raise SegraftError(f"{config.path} does not say of {name} how many {what}: give it {key}.")
    return {key: int(count) for key, (count, _) in counts.items()}


def _has_target(value: Any, config: Config) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(_has_target(config.followed(inner), config) for inner in value.values())
    return isinstance(value, list) and any(_has_target(config.followed(inner), config) for inner in value)


def _class_path(target: str) -> str:
    """For `build`, which calls nothing but classes of networks; a bare name is one of MONAI's."""
    module, _, name = target.rpartition(".")
    return f"{module or 'monai.networks.nets'}:{name}"


def _before(version: Any, than: tuple[int, int]) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < than


def with_exchangeable_outputs(network: BundleNetwork) -> BundleNetwork:
    """The network, within one whose outputs can be exchanged where its own cannot."""
    arguments = dict(network.arguments)
    rest = {name: value for name, value in arguments.items() if name not in ("in_channels", "out_channels")}
    built = outline(
        network.path, in_channels=arguments["in_channels"], out_channels=arguments["out_channels"], arguments=rest
    )
    head = find_head(built)
    if head is not None and exchangeable(network.path, arguments, head.keys):
        return network
    inner = {"network": network.path, "outputs": arguments["out_channels"], "arguments": rest}
    name = type(built).__name__
    note = f"outputs of {name} cannot be exchanged by themselves, so a 1×1 convolution on top of them is the task's."
    channels = {key: arguments[key] for key in ("in_channels", "out_channels")}
    return BundleNetwork(ON_TOP, {**channels, **inner}, (*network.notes, note))
