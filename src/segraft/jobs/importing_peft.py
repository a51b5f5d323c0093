"""Making an adapter file of an adapter that Hugging Face PEFT saved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segraft import adapters
from segraft.adapters import ParameterTable, parameter_table
from segraft.data.labels import Labels
from segraft.data.preparation import Preparation
from segraft.data.scan_preparation import recorded_preparation
from segraft.errors import SegraftError
from segraft.exchange.opening import open_base, scheme_of
from segraft.exchange.peft_folder import PeftFolder, read_peft
from segraft.exchange.peft_import import graft_peft
from segraft.jobs.adapting import LoadedBase, relative_to
from segraft.jobs.cases import Served
from segraft.jobs.locating import ADAPTER_FILE
from segraft.jobs.model import build_from_start, task_record
from segraft.jobs.preparing import check_network, checked
from segraft.jobs.run_folder import versions
from segraft.networks import load_base, load_checkpoint, read_base
from segraft.networks.encoder_files import require_segmenting


@dataclass(frozen=True)
class ImportedAdapter:
    """Result of `import_peft`."""

    path: Path
    labels: dict[int, str]
    parameters: ParameterTable
    notes: tuple[str, ...]


def import_peft(
    folder: str | Path,
    out: str | Path,
    *,
    base: str | Path,
    labels: Sequence[str] = (),
    preparation: Preparation | Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ImportedAdapter:
    """Write an adapter file that computes on `base` what PEFT computes on it with `folder`.

    Args:
        folder: that PEFT's `save_pretrained` wrote.
        out: file to write, or the folder for `adapter.safetensors`.
        base: the base that the adapter was trained on: a base file, its folder, or a network of another tool.
        labels: names of the outputs, in order, where they are others than the base's.
        preparation: of the scans, whole or only the fields that differ from the base's.
        overwrite: replace a file that is there.

    Raises:
        SegraftError: the adapter has no counterpart in Segraft or does not fit the base, or it is not known what the
            outputs are or how scans are prepared; nothing is written then.
    """
    folder, out = Path(folder), Path(out)
    path = out if out.suffix == ".safetensors" else out / ADAPTER_FILE
    if path.exists() and not overwrite:
        raise SegraftError(f"{path} exists: choose another --out, or pass --overwrite.")
    read = read_peft(folder)
    loaded, task = _base(base)
    wanted = read.record.get("base", {}).get("fingerprint")
    ours = adapters.fingerprint(loaded.net)
    if wanted is not None and wanted != ours:
        raise SegraftError(
            f"{folder} was written for a base with fingerprint {str(wanted)[:16]}, and {base} has {ours[:16]}: use the "
            "base that it was trained on."
        )
    task |= {name: value for name, value in read.record.items() if name != "base"}
    record = _task(task, labels, preparation, loaded, base)
    graft_peft(loaded.net, read)
    loaded.require_training(tuple(record["labels"].values()))
    described = loaded.described | {"path": relative_to(Path(loaded.described["path"]), path.parent)}
    record |= {
        "base": described | {"fingerprint": ours},
        "imported": {"from": "peft", "version": str(read.config.get("peft_version", "unknown"))},
        "trainable_parameters": parameter_table(loaded.net).trainable,
        "versions": versions(),
    }
    adapters.save(loaded.net, path, record=record)
    names = {int(value): name for value, name in record["labels"].items()}
    return ImportedAdapter(path, names, parameter_table(loaded.net), (*loaded.notes, *_notes(read, wanted)))


def _base(base: str | Path) -> tuple[LoadedBase, dict[str, Any]]:
    """The base, and what it says of its task."""
    if scheme_of(base):
        opened = open_base(base)
        names = tuple(opened.labels.values())
        arguments = {**opened.arguments, "out_channels": len(names)}
        net = build_from_start(opened.network, arguments)
        loaded = load_checkpoint(net, opened.weights, labels=names, names=opened.outputs)
        described = {"network": opened.network, "arguments": arguments, "path": str(opened.weights)}
        described |= {} if loaded.outputs is None else loaded.outputs.record()
        task = task_record(opened.labels, opened.preparation or Preparation(), opened.channels)
        if opened.preparation is None:
            del task["preparation"]
        notes = (*opened.unlike, *opened.notes, *loaded.notes(names))
        return LoadedBase(net, described, opened.preparation, Served(), frozenset(), loaded.untrained, notes), task
    info = read_base(base)
    require_segmenting(info.path, info.record)
    net, info = load_base(info.path)
    described = {"network": info.network, "arguments": info.arguments, "path": str(info.path)}
    untrained = info.record.get("untrained", {})
    task = {name: info.record[name] for name in ("labels", "regions", "channels", "preparation") if name in info.record}
    new = frozenset(untrained.get("outputs", ()))
    return LoadedBase(net, described, None, Served(), new, tuple(untrained.get("parts", ())), ()), task


def _task(
    known: Mapping[str, Any],
    labels: Sequence[str],
    preparation: Preparation | Mapping[str, Any] | None,
    loaded: LoadedBase,
    base: str | Path,
) -> dict[str, Any]:
    """Labels, channels and preparation, for the adapter's record.

    Raises:
        SegraftError: one of them is not known, or does not fit the network.
    """
    task = dict(known)
    if labels:
        task.pop("regions", None)
        task["labels"] = {str(number): name for number, name in enumerate(labels, start=1)}
    if not task.get("labels"):
        raise SegraftError(f"{base} does not say what its outputs are: name them, in order, with --labels.")
    if isinstance(preparation, Preparation):
        task["preparation"] = preparation.model_dump(mode="json")
    elif preparation:
        task["preparation"] = checked({**task.get("preparation", {}), **preparation}).model_dump(mode="json")
    if "preparation" not in task:
        raise SegraftError(
            f"{base} does not say how scans are prepared for it, and PEFT has no place for that: say it (--patch, "
            "--spacing, --window, …)."
        )
    settled = recorded_preparation(task["preparation"], Path(base))
    names = Labels({int(value): name for value, name in task["labels"].items()})
    check_network(loaded.net, settled.patch, len(names), loaded.described["arguments"].get("in_channels", 1))
    return task


def _notes(read: PeftFolder, wanted: object) -> list[str]:
    notes = []
    if wanted is None:
        notes.append(
            "PEFT does not keep which weights its base had: that this is the base it was trained on is taken on trust."
        )
    if read.config.get("lora_dropout"):
        notes.append(f"dropout {read.config['lora_dropout']:g}, which counts in training alone, is not kept.")
    return notes
