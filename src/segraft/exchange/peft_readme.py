"""What lies beside an adapter in PEFT's format: how to load it, its base where that is no file of its own, its task."""

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from segraft.adapters import fingerprint
from segraft.errors import SegraftError
from segraft.exchange.formats import Finished
from segraft.exchange.peft_format import CONFIG, FACTOR_A, RECORD, WEIGHTS
from segraft.networks import NETWORKS, read_base, save_base
from segraft.networks.bases import CHANNELS
from segraft.networks.checkpoints import read_tensors
from segraft.networks.heads import Outputs
from segraft.networks.registry import constructor

BASE = "base_model.safetensors"

TASK = ("labels", "regions", "channels", "preparation")
"""Of an adapter's record, what whoever uses it needs; not the cases that trained it."""

TEMPLATE = """# {method} adapter for {labels}

An adapter of Segraft {version} in the format of [PEFT](https://github.com/huggingface/peft): {parts}.

```python
{code}
```

- The base has {parameters} parameters, and its weights the fingerprint `{fingerprint}`
  (`segraft.adapters.fingerprint(base)`). On other weights the adapter is wrong, and PEFT does not check it.
- The network takes images [batch, {channels}, X, Y{z}] and gives logits, one channel per label, in this order:
  {labels}. The probability of a label is the sigmoid of its logit.
- `segraft.json` says how scans are prepared (spacing, intensities, patch); PEFT does not read it.
"""


def write_base(finished: Finished, base: nn.Module, folder: Path) -> str | None:
    """The base for the adapter's labels and channels, unless the file of the base is that already; its name.

    It is a base file of Segraft's, whose tensors are the plain state dict.
    """
    if _is_plain(finished):
        return None
    network, arguments = _built_as(finished, base)
    outputs = Outputs.of(finished.header.record["base"])
    record = _task(finished)
    if outputs is not None and outputs.new:
        record["untrained"] = {"outputs": list(outputs.new), "parts": []}
    written = save_base(base, folder, network=network, arguments=arguments, record=record)
    written.path.rename(folder / BASE)
    return BASE


def _built_as(finished: Finished, base: nn.Module) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the network, for the adapter's labels and channels, which may be others than the base's."""
    from segraft.networks.swin import merges_as_before, named_as_before

    channels = {"in_channels": len(finished.channels), "out_channels": len(finished.labels)}
    arguments = {**finished.arguments, **channels}
    return (
        named_as_before(base, finished.network, arguments) if merges_as_before(base) else (finished.network, arguments)
    )


def _task(finished: Finished) -> dict[str, Any]:
    record = finished.header.record
    return {name: record[name] for name in TASK if name in record}


def _is_plain(finished: Finished) -> bool:
    """Whether the base's file holds the state dict of the base as the adapter knows it."""
    try:
        return read_base(finished.base).fingerprint == finished.header.fingerprint
    except SegraftError:
        return False


def write_record(finished: Finished, folder: Path) -> None:
    """`segraft.json`."""
    described = finished.header.record["base"]
    written = {
        "base": {name: described[name] for name in described if name != "path"}
        | {"fingerprint": finished.header.fingerprint},
        **_task(finished),
    }
    (folder / RECORD).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def write_readme(finished: Finished, base: nn.Module, folder: Path, *, beside: str | None) -> None:
    """`README.md`, with the code that loads both."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = read_tensors(folder / WEIGHTS)
    factors, saved = sum(key.endswith(FACTOR_A) for key in tensors), len(config["modules_to_save"] or ())
    dora = ", with magnitudes (DoRA)" if config["use_dora"] else ""
    parts = [f"LoRA on {_counted(factors, 'layer')}{dora}"] if factors else []
    parts += [f"{_counted(saved, 'module')} saved whole"] if saved else []
    text = TEMPLATE.format(
        method=finished.header.spec.method,
        labels=", ".join(finished.labels.values()),
        version=finished.header.version,
        parts="; ".join(parts),
        code=_code(finished, base, folder, beside),
        parameters=f"{sum(value.numel() for value in base.parameters()):,}",
        fingerprint=fingerprint(base),
        channels=len(finished.channels),
        z="" if finished.preparation.patch[2] == 1 else ", Z",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _code(finished: Finished, base: nn.Module, folder: Path, beside: str | None) -> str:
    """Python that builds the base, loads its weights and puts the adapter on it, run in the folder."""
    weights = beside or _seen_from(folder, finished.base)
    module, name, arguments = _class_of(finished, base)
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return "\n".join(
        (
            f"from {module} import {name}",
            "from peft import PeftModel",
            "from safetensors.torch import load_file",
            "",
            f"base = {name}({given})",
            f"base.load_state_dict(load_file({weights!r}))",
            "net = PeftModel.from_pretrained(base, '.').eval()  # in this folder",
        )
    )


def _seen_from(folder: Path, path: Path) -> str:
    """A path as seen from a folder, or one beside it; absolute on another drive."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()


def _class_of(finished: Finished, base: nn.Module) -> tuple[str, str, dict[str, Any]]:
    """Where the class of the network is, its name, and the arguments that it is built with."""
    network, arguments = _built_as(finished, base)
    channels = {name: arguments.pop(name) for name in CHANNELS}
    factory, given = constructor(network, **channels, arguments=arguments)
    entry = NETWORKS.get(network)
    path = network if entry is None else entry.factory
    module, _, name = path.partition(":") if isinstance(path, str) else (factory.__module__, "", factory.__qualname__)
    return module, name, given
