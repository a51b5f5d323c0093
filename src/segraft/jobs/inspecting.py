"""What a file of Segraft is, in words and numbers."""

import math
from pathlib import Path
from typing import Any

from segraft.adapters import PRESETS, AdapterHeader
from segraft.jobs.locating import header_of


def describe(path: str | Path) -> dict[str, Any]:
    """JSON values that say what an adapter file or a base file is.

    Raises:
        SegraftError: it is neither, or not readable.
    """
    header = header_of(Path(path))
    if isinstance(header, AdapterHeader):
        known = {
            "kind": "adapter",
            "version": header.version,
            "spec": header.spec.to_dict(),
            "formula": PRESETS[header.spec.method].formula,
            "paper": PRESETS[header.spec.method].source,
            "base fingerprint": header.fingerprint,
            "tensors": len(header.tensors),
            "ranks": {key: list(pair) for key, pair in header.ranks.items()},
            "parameters": sum(math.prod(shape) for shape in header.tensors.values()),
        }
    else:
        known = {
            "kind": "base",
            "network": header.network,
            "arguments": header.arguments,
            "fingerprint": header.fingerprint,
        }
    return {"path": str(header.path), "bytes": header.path.stat().st_size, **known, **header.record}
