"""The base of an adapter: where it is, and how it is built again, with the outputs and channels that the task takes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segraft import adapters
from segraft.adapters import AdapterHeader
from segraft.errors import SegraftError
from segraft.exchange.opening import open_base, scheme_of
from segraft.jobs.cases import Served
from segraft.jobs.locating import holds_base
from segraft.networks import Base, Loaded, build, load_base, load_checkpoint, read_base
from segraft.networks.bases import FILE_NAME
from segraft.networks.encoder_files import holds_encoder
from segraft.networks.heads import START_SEED, Outputs, take_outputs
from segraft.networks.inputs import Inputs, input_weights, take_inputs
from segraft.networks.registry import outline
from segraft.networks.trusted import require_trusted


def load_base_of(header: AdapterHeader, base: str | os.PathLike[str] | None) -> tuple[nn.Module, Served]:
    """The base that an adapter was trained on, and the images that trained the base.

    Raises:
        SegraftError: the adapter file does not say what it is, the base is not found, or its network is not one that
            a file may name.
    """
    where, described = base_file_of(header, base), header.record["base"]
    outputs, inputs = Outputs.of(described), Inputs.of(described)
    if _is_base_itself(where, described):
        net, info = load_base(where)
        net = with_outputs(net, info, outputs)
        arguments = info.arguments | ({} if outputs is None else {"out_channels": len(outputs.rows)})
        return with_inputs(net, info.network, arguments, inputs)[0], Served.of(info.record)
    require_trusted(described["network"], described["arguments"], header.path)
    net = build_from_start(described["network"], described["arguments"])
    try:
        load_checkpoint(net, where, outputs=outputs)
    except SegraftError as error:
        raise SegraftError(
            f"{header.path} was trained on a base with fingerprint {header.fingerprint[:16]}, and {where} is no such "
            f"base: {error}"
        ) from error
    net, _ = with_inputs(net, described["network"], described["arguments"], inputs)
    return net.eval(), Served.by_weights(where)


def require_base_of(header: AdapterHeader, path: Path) -> None:
    """Refuse a file that is not the base that an adapter was trained on.

    Where the adapter took the base as it is, the headers tell; else the base is built as the adapter's record says.

    Args:
        header: of the adapter.
        path: of a base file.

    Raises:
        SegraftError: it is another, or cannot be built; the adapter does not say what its base is.
    """
    described = header.record["base"] if base_file_of(header, path) else {}
    if Outputs.of(described) is None and Inputs.of(described) is None and _is_base_itself(path, described):
        found = read_base(path).fingerprint
    else:
        found = adapters.fingerprint(load_base_of(header, path)[0])
    if found != header.fingerprint:
        raise adapters.BaseMismatchError(
            f"the adapter was trained on a base with fingerprint {header.fingerprint[:16]}, and that of {path} is "
            f"{found[:16]}: get the base that it was trained on."
        )


def _is_base_itself(path: Path, described: Mapping[str, Any]) -> bool:
    """Whether a file is the base that an adapter's record describes, and not weights that another network was given."""
    if path.name != FILE_NAME and not holds_base(path):
        return False
    info = read_base(path)
    built = (described["network"], described["arguments"])
    return not holds_encoder(info.record) and (info.network, info.arguments) == built


def base_file_of(header: AdapterHeader, base: str | os.PathLike[str] | None, *, option: str = "--base") -> Path:
    """The file that the weights of an adapter's base are in.

    Args:
        header: of the adapter.
        base: where it is, if not where the adapter's record says.
        option: of the command by which a user says so, for the message.

    Raises:
        SegraftError: the adapter file does not say what its base is, or it is not found.
    """
    described = header.record.get("base")
    if not isinstance(described, dict) or not {"network", "arguments", "path"} <= set(described):
        raise SegraftError(
            f"{header.path} does not name its base network: it was saved from Python without a record, so load it "
            "there with segraft.load."
        )
    if base is not None and scheme_of(str(base)):
        return open_base(str(base)).weights
    where = Path(base) if base is not None else (header.path.parent / described["path"])
    if where.is_dir():
        where /= FILE_NAME
    if not where.is_file():
        raise SegraftError(f"the base of {header.path} is not at {where}: say where it is with {option}.")
    return where


def build_from(network: str, arguments: Mapping[str, Any]) -> nn.Module:
    """`build` with the channels among the arguments."""
    rest = dict(arguments)
    channels = {name: rest.pop(name) for name in ("in_channels", "out_channels")}
    return build(network, **channels, arguments=rest)


def build_from_start(network: str, arguments: Mapping[str, Any], *, seed: int = START_SEED) -> nn.Module:
    """The same with random weights that are the same each time, and leave the global generator as it was.

    What weights from elsewhere do not hold stays at this start, and an adapter knows its base by a fingerprint of all:
    a base always starts from `START_SEED`.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # of the CPU alone, where networks are built
    try:
        return build_from(network, arguments)
    finally:
        torch.set_rng_state(before)


def with_outputs(net: nn.Module, info: Base, outputs: Outputs | None) -> nn.Module:
    """The network of a base file with the outputs that a task takes of it.

    Raises:
        SegraftError: its outputs cannot be exchanged.
    """
    if outputs is None:
        return net
    rebuilt = build_from_start(info.network, info.arguments | {"out_channels": len(outputs.rows)})
    return take_outputs(net, info.arguments["out_channels"], rebuilt, outputs)


def with_inputs(
    net: nn.Module, network: str, arguments: Mapping[str, Any], inputs: Inputs | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """The network of a base for the channels of a task's images, and the keys of the weights that see them.

    Args:
        net: plain, with all its weights.
        network: by which it was built.
        arguments: likewise.
        inputs: channels that it shall take; None: its own, and then there are no keys.

    Raises:
        SegraftError: its channels cannot be exchanged.
    """
    if inputs is None:
        return net, ()
    if hasattr(net, "image_channels"):
        raise SegraftError(
            f"{type(net).__name__} encodes its channels one by one, and is built for as many as there are: leave "
            "--inputs out, and give it the weights of a network for one channel."
        )
    rest, count = dict(arguments), len(inputs.rows)
    takes, outputs = rest.pop("in_channels"), rest.pop("out_channels")
    rebuilt = build_from_start(network, {**arguments, "in_channels": count})
    if takes == count:
        other = outline(network, in_channels=takes + 1, out_channels=outputs, arguments=rest)
        keys = input_weights(net, other, (takes, takes + 1))
    else:
        keys = input_weights(net, rebuilt, (takes, count))
    if any(name.startswith("swinViT") for name, _ in net.named_children()):
        from segraft.networks.swin import merge_as_before, merges_as_before

        if merges_as_before(net):  # as the weights that were loaded told
            merge_as_before(rebuilt)
    return take_inputs(net, rebuilt, keys, inputs), keys


def image_channels(described: Mapping[str, Any]) -> int:
    """How many channels the images of an adapter have, by the record of its base."""
    inputs = Inputs.of(described)
    return int(described["arguments"].get("in_channels", 1)) if inputs is None else len(inputs.rows)


def named_as_loaded(
    net: nn.Module, network: str, arguments: Mapping[str, Any], loaded: Loaded
) -> tuple[str, dict[str, Any]]:
    """By which name and arguments a network is built again that computes as `net` does after weights were loaded.

    Raises:
        SegraftError: it cannot be built so.
    """
    if not loaded.original_merging:
        return network, dict(arguments)
    from segraft.networks.swin import named_as_before

    return named_as_before(net, network, arguments)
