"""Adapter files: one task in one safetensors file, with everything needed to know what it is.

Tensors are keyed `layer.edit.factor`; the header holds one JSON object under `segraft`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segraft._version import __version__
from segraft.adapters.graft import RECORD, Net, activate, graft, grafted_layers, record_of, ungraft
from segraft.adapters.grafted import grafts_of
from segraft.adapters.rank_control import gated_edits
from segraft.adapters.selection import base_parameters, modules_by_name
from segraft.adapters.spec import AdapterSpec
from segraft.atomic import replacing
from segraft.errors import SegraftError

FORMAT = 1
_KINDS = {"base": str, "record": dict, "version": str}


@dataclass(frozen=True)
class AdapterHeader:
    """What an adapter file says about itself.

    Attributes:
        path: of the file.
        spec: what was grafted.
        fingerprint: of the base it was trained on.
        record: whatever was saved with it: base network, labels, preparation, training.
        version: of Segraft, when it was written.
        tensors: key -> shape.
        ranks: of gated updates, key -> (directions in the file, which are those in use; directions at the start).
    """

    path: Path
    spec: AdapterSpec
    fingerprint: str
    record: dict[str, Any]
    version: str
    tensors: dict[str, tuple[int, ...]]
    ranks: dict[str, tuple[int, int]]


class BaseMismatchError(SegraftError):
    """The adapter belongs to another base."""


def fingerprint(net: nn.Module) -> str:
    """SHA-256 (64 hex digits) of the base: name, type, shape and bytes of every tensor in its state dict.

    What is grafted on does not change it.
    """
    digest = hashlib.sha256()
    tensors = {full: value.detach() for full, _, _, value in base_parameters(net)}
    for module, names in modules_by_name(net).items():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{names[0]}.{name}"] = buffer.detach()
    for name in sorted(tensors):
        value = tensors[name].cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(
    net: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write one adapter to one file. Of gated updates only the directions in use are written.

    Args:
        net: a grafted network.
        path: of the file to write.
        name: of the adapter; None means the active one.
        record: JSON values to keep with it.

    Raises:
        SegraftError: it is not clear which adapter is meant; the base itself was made trainable (its changes would
            be lost); the path cannot be written.
    """
    from safetensors.torch import save as to_bytes

    name = _the_one(net, name)
    touched = [full for full, _, _, value in base_parameters(net) if value.requires_grad]
    if touched:
        raise SegraftError(
            f"the base parameter {touched[0]!r} is trainable, and an adapter file does not hold the base: "
            "name it in the spec's `train` instead."
        )
    header = {
        "format": FORMAT,
        "version": __version__,
        "spec": record_of(net).specs[name].to_dict(),
        "base": fingerprint(net),
        "record": dict(record or {}),
    }
    gated = gated_edits(net, name)
    if gated:
        header["ranks"] = {key: edit.initial_rank for key, edit in gated.items()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in _in_use(net, name).items()}
    with replacing(path) as aside:
        aside.write_bytes(to_bytes(tensors, metadata={"segraft": json.dumps(header, allow_nan=False)}))
    return Path(path)


def adapter_tensors(net: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter, by the keys of its file; not copies."""
    return {
        f"{layer_name}.{key}" if layer_name else key: value
        for layer_name, layer in grafted_layers(net)
        if name in grafts_of(layer)
        for key, value in grafts_of(layer)[name].state_dict(keep_vars=True).items()
    }


def _in_use(net: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter, without the directions that a gate of zero takes out of use."""
    tensors = adapter_tensors(net, name)
    for key, edit in gated_edits(net, name).items():
        tensors |= {f"{key}.{factor}": value for factor, value in edit.of_directions(edit.in_use()).items()}
    return tensors


def read_header(path: str | os.PathLike[str]) -> AdapterHeader:
    """What an adapter file says about itself, without reading its tensors.

    Raises:
        SegraftError: the file is missing, is not an adapter file, or was written by a newer version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise SegraftError(f"{path} does not exist: give the path of an adapter file (.safetensors).")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return _header(path, json.loads(metadata["segraft"]), tensors)
    except (SafetensorError, OSError) as error:
        raise SegraftError(f"{path} is not a readable safetensors file ({error}): is it complete?") from error
    except SegraftError as error:
        raise SegraftError(f"{path} cannot be used: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SegraftError(f"{path} is no adapter file: its header does not hold what segraft writes.") from error


def _header(path: Path, header: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> AdapterHeader:
    if header["format"] > FORMAT:
        raise SegraftError(f"it was written by segraft {header['version']}: update segraft to read it.")
    if not all(isinstance(header[name], kind) for name, kind in _KINDS.items()):
        raise TypeError
    spec = AdapterSpec.from_dict(header["spec"])
    ranks = {key: (tensors[f"{key}.v"][0], int(start)) for key, start in header.get("ranks", {}).items()}
    return AdapterHeader(path, spec, header["base"], header["record"], header["version"], tensors, ranks)


def load(net: Net, path: str | os.PathLike[str], name: str = "default") -> Net:
    """Graft the adapter of a file onto the base it was trained on, and make it the active one.

    Raises:
        BaseMismatchError: the network's weights are not those the adapter was trained on; both fingerprints are shown.
        SegraftError: as `read_header`; or the file's tensors do not fit the network.
    """
    from safetensors.torch import load_file

    header = read_header(path)
    ours = fingerprint(net)
    if ours != header.fingerprint:
        raise BaseMismatchError(
            f"{header.path} was trained on a base with fingerprint {header.fingerprint[:16]}, this network's is "
            f"{ours[:16]}: use the base that it was trained on."
        )
    loaded = load_file(header.path)
    before = net.__dict__.get(RECORD)
    active, trainable = () if before is None else before.active, {p: p.requires_grad for p in net.parameters()}
    try:
        graft(net, header.spec, name)
    except SegraftError as error:
        raise SegraftError(f"{header.path} does not fit this network: {error}") from error
    for key, edit in gated_edits(net, name).items():
        used, edit.initial_rank = header.ranks.get(key, (edit.rank, edit.rank))
        edit.keep(torch.arange(min(used, edit.rank)))
    tensors = adapter_tensors(net, name)
    problem = _difference(_forms(tensors), _forms(loaded))
    if problem:
        ungraft(net, name)
        if before is not None and before.specs:
            activate(net, active)
            for parameter, flag in trainable.items():
                parameter.requires_grad_(flag)
        raise SegraftError(f"{header.path} does not fit this network: {problem}.")
    with torch.no_grad():
        for key, value in tensors.items():
            value.copy_(loaded[key])
    return net


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    return {key: (value.is_floating_point(), value.is_complex(), *value.shape) for key, value in tensors.items()}


def _difference(wanted: Mapping[str, tuple[object, ...]], found: Mapping[str, tuple[object, ...]]) -> str:
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    reshaped = [key for key in wanted if key in found and wanted[key] != found[key]]
    texts = [
        f"{len(keys)} tensors {what}, such as {keys[0]}"
        for what, keys in (
            ("are missing", missing),
            ("are unexpected", unexpected),
            ("have another shape or type", reshaped),
        )
        if keys
    ]
    return "; ".join(texts)


def _the_one(net: nn.Module, name: str | None) -> str:
    record = record_of(net)
    if name is None:
        if len(record.active) != 1:
            raise SegraftError(f"say which adapter to save: this network has {', '.join(record.specs)}.")
        return record.active[0]
    if name not in record.specs:
        raise SegraftError(f"no adapter is named {name!r}: this network has {', '.join(record.specs)}.")
    return name
