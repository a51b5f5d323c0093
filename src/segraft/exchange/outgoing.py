"""What of a file's record leaves the house: the same tensors under a header that says less."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from segraft.atomic import replacing

Record = Mapping[str, Any]
Change = Callable[[Record], dict[str, Any]]

HEADERS = ("segraft", "segraft_base")
"""Keys under which a safetensors file of Segraft keeps its header: an adapter's, a base's."""

SAYS_WHOSE = ("dataset", "patient_pattern")
"""Entries of a record that tell where its cases are from."""

BASE, WEIGHTS = "base.safetensors", "weights"
ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Of files of weights; what else follows a dot may be part of a name."""


def outgoing(path: Path, aside: Path, change: Change) -> Path:
    """A file whose record was changed; the file itself where the change leaves the record as it is.

    The tensors are the same, bit for bit, so the base's fingerprint holds.

    Args:
        path: an adapter file or a base file.
        aside: where the changed one is written.
        change: from the record to that which leaves.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file
    from safetensors.torch import save as to_bytes

    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = dict(file.metadata())
    (key,) = (name for name in HEADERS if name in metadata)
    header = json.loads(metadata[key])
    record = change(header["record"])
    if record == header["record"]:
        return path
    metadata[key] = json.dumps(header | {"record": record}, allow_nan=False)
    with replacing(aside) as written:
        written.write_bytes(to_bytes(load_file(path), metadata=metadata))
    return aside


def beside(record: Record, name: str | None = None) -> dict[str, Any]:
    """The record whose base lies beside the adapter: a path on one's own disk leads nowhere else, and says much.

    Args:
        record: of an adapter; of another file it stays as it is.
        name: of the base's file there; None means the one it has.
    """
    base = record.get("base")
    if not isinstance(base, dict) or "path" not in base:
        return dict(record)
    windows = "\\" in base["path"]
    own = (PureWindowsPath if windows else PurePosixPath)(base["path"]).name
    return dict(record) | {"base": base | {"path": name or own}}


def without_cases(record: Record) -> dict[str, Any]:
    """The record with numbers for the ids of its cases, without names of their data set and of files of weights.

    The digests of their images stay: by them, `evaluate` and `adapt` keep cases apart.
    """
    cases = record.get("cases", {})
    numbered = {str(number): digest for number, digest in enumerate(sorted(cases.values()), start=1)}
    kept = {name: value for name, value in record.items() if name not in SAYS_WHOSE}
    return _without_names(kept) | ({"cases": numbered} if cases else {})


def _without_names(record: Record) -> dict[str, Any]:
    """Without what files of weights were called, which may be a patient's name too."""
    changed = dict(record)
    if "imported" in record:
        changed["imported"] = {name: value for name, value in record["imported"].items() if name != "weights"}
    path = record.get("base", {}).get("path")
    own = "" if path is None else path.replace("\\", "/").rpartition("/")[2]
    if own not in ("", BASE):
        ending = next((ending for ending in ENDINGS if own.endswith(ending)), "")
        changed["base"] = record["base"] | {"path": WEIGHTS + ending}
    return changed


def without_digests(record: Record) -> dict[str, Any]:
    """The same without the digests of the images too, by which whoever has a scan can tell that it served."""
    kept = without_cases(record)
    return {name: value for name, value in kept.items() if name != "cases"}
