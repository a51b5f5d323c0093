"""Base files: the pre-trained network that adapters are grafted onto.

A base is one safetensors file whose header says how to build the network and how its images were prepared.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from segraft._version import __version__
from segraft.adapters import fingerprint
from segraft.atomic import replacing
from segraft.errors import SegraftError
from segraft.networks.checkpoints import load_weights
from segraft.networks.records import record_problem
from segraft.networks.registry import build
from segraft.networks.trusted import require_trusted

FILE_NAME = "base.safetensors"
FORMAT = 1
CHANNELS = ("in_channels", "out_channels")


@dataclass(frozen=True)
class Base:
    """What a base file says about itself.

    Attributes:
        path: of the file.
        network: name or dotted path, for `build`.
        arguments: for `build`, with the channels.
        fingerprint: of the weights.
        record: whatever was saved with it: labels, preparation, training.
    """

    path: Path
    network: str
    arguments: dict[str, Any]
    fingerprint: str
    record: dict[str, Any]


def save_base(
    net: nn.Module,
    folder: str | os.PathLike[str],
    *,
    network: str,
    arguments: Mapping[str, Any],
    record: Mapping[str, Any] | None = None,
) -> Base:
    """Write `base.safetensors` into `folder`.

    Args:
        net: a plain network (nothing grafted on it).
        folder: made where it does not exist.
        network: name or dotted path.
        arguments: all keyword arguments that `build` needs to make the network again, with `in_channels` and
            `out_channels`.
        record: JSON values to keep with it.

    Raises:
        SegraftError: the channels are not among the arguments, or the file cannot be written.
    """
    from safetensors.torch import save as to_bytes

    path = Path(folder) / FILE_NAME
    if any(name not in arguments for name in CHANNELS):
        raise SegraftError(f"{path} is not written: give in_channels and out_channels among the network's arguments.")
    base = Base(path, network, dict(arguments), fingerprint(net), dict(record or {}))
    header = {
        "format": FORMAT,
        "version": __version__,
        "network": network,
        "arguments": base.arguments,
        "fingerprint": base.fingerprint,
        "record": base.record,
    }
    # Copies, as tensors that share memory (aliased modules) cannot be written.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}
    with replacing(path) as aside:
        aside.write_bytes(to_bytes(tensors, metadata={"segraft_base": json.dumps(header, allow_nan=False)}))
    return base


def read_base(path: str | os.PathLike[str]) -> Base:
    """What a base file (or the folder that holds it) says about itself.

    Raises:
        SegraftError: it does not exist, is not readable, or is no base file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise SegraftError(f"{path} does not exist: give the folder that `segraft pretrain` wrote, or its {FILE_NAME}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["segraft_base"])
        return _base(path, header)
    except SegraftError:
        raise
    except (SafetensorError, OSError) as error:
        raise SegraftError(f"{path} is not a readable safetensors file ({error}): is it complete?") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise SegraftError(
            f"{path} is no base file: its header does not hold what `segraft pretrain` writes."
        ) from error


def _base(path: Path, header: Mapping[str, Any]) -> Base:
    if header["format"] > FORMAT:
        raise SegraftError(f"{path} was written by segraft {header['version']}: update segraft to read it.")
    described = {name: header[name] for name in ("network", "arguments", "fingerprint")}
    problem = record_problem(header["record"]) or record_problem({"base": described})
    if problem is not None:
        raise SegraftError(f"{path} cannot be used: {problem}, as segraft writes it.")
    arguments = {name: header["arguments"][name] for name in CHANNELS} | header["arguments"]
    return Base(path, header["network"], arguments, header["fingerprint"], header["record"])


def load_base(path: str | os.PathLike[str]) -> tuple[nn.Module, Base]:
    """Build the network of a base file and load its weights.

    Raises:
        SegraftError: as `read_base`; the network is not one that a file may name, or cannot be built; the weights do
            not fit, or are not those whose fingerprint the file shows.
    """
    base = read_base(path)
    require_trusted(base.network, base.arguments, base.path)
    arguments = dict(base.arguments)
    channels = {name: arguments.pop(name) for name in CHANNELS}
    net = build(base.network, **channels, arguments=arguments)
    load_weights(net, base.path)
    found = fingerprint(net)
    if found != base.fingerprint:
        raise SegraftError(
            f"{base.path} says its weights have fingerprint {base.fingerprint[:16]}, they have {found[:16]}: "
            "the file was changed after it was written."
        )
    return net, base
