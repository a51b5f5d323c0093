"""Making an adapter file of an adapter that Hugging Face PEFT saved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segraft import adapters
from segraft._version import __version__
from segraft.adapters import AdapterHeader, AdapterSpec, ParameterTable, parameter_table
from segraft.data.channels import numbered
from segraft.data.cohort import Cohort
from segraft.data.preparation import Preparation
from segraft.data.scan_preparation import recorded_preparation
from segraft.errors import SegraftError
from segraft.exchange.opening import open_base, scheme_of
from segraft.exchange.peft_folder import PeftFolder, read_peft
from segraft.exchange.peft_format import RECORD
from segraft.exchange.peft_import import graft_peft
from segraft.exchange.peft_settings import RecordedBase
from segraft.jobs.adapting import relative_to
from segraft.jobs.base_source import BaseSource, LoadedBase
from segraft.jobs.bases import base_file_of, load_base_of
from segraft.jobs.locating import ADAPTER_FILE, holds_base
from segraft.jobs.preparing import check_network, checked
from segraft.jobs.run_folder import versions
from segraft.jobs.task import task_record
from segraft.networks import read_base
from segraft.networks.bases import FILE_NAME
from segraft.networks.heads import Outputs, find_head


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
    read = read_peft(folder)
    if path.exists() and not overwrite:
        raise SegraftError(f"{path} exists: choose another --out, or pass --overwrite.")
    loaded, task = _base(base, read)
    _keep(path, folder, loaded)
    wanted = None if read.record.base is None else read.record.base.fingerprint
    ours = adapters.fingerprint(loaded.net)
    if wanted is not None and wanted != ours:
        raise SegraftError(
            f"{folder} was written for a base with fingerprint {wanted[:16]}, and {base} has {ours[:16]}: use the "
            "base that it was trained on."
        )
    if read.record.labels:
        task.pop("regions", None)
    task |= read.record.task()
    record = _task(task, labels, preparation, loaded, base, folder)
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


def _keep(path: Path, folder: Path, loaded: LoadedBase) -> None:
    """Refuse to write over a base, or over what is imported.

    Raises:
        SegraftError: naming it.
    """
    kept = (Path(loaded.described["path"]), *folder.iterdir())
    if path.exists() and (holds_base(path) or any(each.exists() and path.samefile(each) for each in kept)):
        raise SegraftError(f"{path} is a base, or of what is imported, and would be gone: choose another --out.")


def _base(base: str | Path, read: PeftFolder) -> tuple[LoadedBase, dict[str, Any]]:
    """The base as the adapter knows it, and what it says of its task.

    Segraft's own folders say how that is made of the base: with other outputs or channels, or as weights of a network.
    """
    recorded = read.record.base
    if recorded is not None and not _is_as_recorded(base, recorded):
        return _rebuilt(base, read, recorded), {}
    if scheme_of(base):
        opened = open_base(base)
        task = task_record(opened.labels, opened.preparation or Preparation(), opened.channels)
        if opened.preparation is None:
            del task["preparation"]
        return BaseSource(base).load(opened.labels, _images(Path(str(base)), opened.channels)), task
    info = read_base(base)
    task = {name: info.record[name] for name in ("labels", "regions", "channels", "preparation") if name in info.record}
    takes, count = info.arguments["in_channels"], info.arguments["out_channels"]
    channels = tuple(task.get("channels") or (numbered(takes) if takes > 1 else ("",)))
    named = {int(value): str(name) for value, name in task.get("labels", {}).items()}
    outputs = named if len(named) == count else {place: f"output {place}" for place in range(1, count + 1)}
    return BaseSource(base).load(outputs, _images(info.path, channels)), task


def _is_as_recorded(base: str | Path, recorded: RecordedBase) -> bool:
    """Whether a base file is the adapter's base as it is; also where there is none, which reading it will tell."""
    if scheme_of(base):
        return False
    path = Path(base) / FILE_NAME if Path(base).is_dir() else Path(base)
    return not path.is_file() or (holds_base(path) and read_base(path).fingerprint == recorded.fingerprint)


def _rebuilt(base: str | Path, read: PeftFolder, recorded: RecordedBase) -> LoadedBase:
    """The base as whoever reads the adapter file will make it again."""
    described = recorded.described() | {"path": str(base)}
    header = AdapterHeader(
        read.path / RECORD, AdapterSpec("none"), recorded.fingerprint, {"base": described}, __version__, {}, {}
    )
    described["path"] = str(base_file_of(header, base))
    try:
        net, served = load_base_of(header, described["path"])
    except (IndexError, KeyError) as error:
        raise SegraftError(
            f"{header.path} takes outputs or channels of the base that {base} has not: is it the base that the adapter "
            "was trained on?"
        ) from error
    outputs = Outputs.of(described)
    new = frozenset(() if outputs is None else outputs.new)
    return LoadedBase(net, described, None, served, new, (), ())


def _images(path: Path, channels: Sequence[str]) -> Cohort:
    """Stands for the images that the adapter is for: those of the base."""
    return Cohort("", path, {}, tuple(channels), ())


def _task(
    known: Mapping[str, Any],
    labels: Sequence[str],
    preparation: Preparation | Mapping[str, Any] | None,
    loaded: LoadedBase,
    base: str | Path,
    folder: Path,
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
    channels = _channels(loaded.described)
    if len(task.get("channels") or ("",) * channels) != channels:
        raise SegraftError(
            f"{folder / RECORD} names {len(task['channels'])} channels ({', '.join(task['channels'])}), and {base} "
            f"takes {channels}: is it the base that the adapter was trained on?"
        )
    head = find_head(loaded.net)
    if head is not None and not labels and head.outputs != len(task["labels"]):
        raise SegraftError(
            f"{folder / RECORD} names {len(task['labels'])} labels, and {base} has {head.outputs} outputs: is it the "
            "base that the adapter was trained on?"
        )
    check_network(loaded.net, settled.patch, len(task["labels"]), channels)
    return task


def _channels(described: Mapping[str, Any]) -> int:
    """How many channels the images have: those of the base, unless its inputs were exchanged."""
    inputs = described.get("inputs")
    return int(described["arguments"].get("in_channels", 1)) if inputs is None else len(inputs["channels"])


def _notes(read: PeftFolder, wanted: object) -> list[str]:
    notes = []
    if wanted is None:
        notes.append(
            "PEFT does not keep which weights its base had: that this is the base it was trained on is taken on trust."
        )
    if read.config.get("lora_dropout"):
        notes.append(f"dropout {read.config['lora_dropout']:g}, which counts in training alone, is not kept.")
    return notes
