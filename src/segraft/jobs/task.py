"""The task of a file: what its network segments, and on what images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segraft.data.channels import numbered
from segraft.data.labels import Labels
from segraft.data.scan_preparation import ScanPreparation, recorded_preparation
from segraft.errors import SegraftError


def task_record(labels: Labels, preparation: ScanPreparation, channels: Sequence[str] = ("",)) -> dict[str, Any]:
    """The part of a file's record that says what the network segments, and on what images."""
    record: dict[str, Any] = {
        "labels": {str(value): name for value, name in labels.items()},
        "preparation": preparation.model_dump(mode="json"),
    }
    if labels.regions:
        record["regions"] = {str(value): list(covers) for value, covers in labels.regions.items()}
    if len(channels) > 1:
        record["channels"] = list(channels)
    return record


def untrained_words(record: Mapping[str, Any]) -> list[str]:
    """What of a base was never trained, in words."""
    names, untrained = list(record.get("labels", {}).values()), record["untrained"]
    outputs = [names[place] for place in untrained.get("outputs", ()) if place < len(names)]
    return [*untrained.get("parts", ()), *([f"the outputs {', '.join(outputs)}"] if outputs else [])]


@dataclass(frozen=True)
class Task:
    """What a file's record says that its network segments, and on what images."""

    labels: Labels
    preparation: ScanPreparation
    channels: tuple[str, ...]


def task_of(path: Path, record: Mapping[str, Any], channels: int) -> Task:
    """The task that a file has recorded.

    Args:
        path: of the file.
        record: of it.
        channels: of the images.

    Raises:
        SegraftError: it does not say what it segments, or how scans are prepared.
    """
    try:
        covers = {int(value): tuple(map(int, values)) for value, values in record.get("regions", {}).items()}
        labels = Labels({int(value): str(name) for value, name in record["labels"].items()}, covers)
        if "imported" in record and "preparation" not in record:
            raise SegraftError(
                f"{path} holds weights from elsewhere and does not say how scans are prepared for them: adapt it, or "
                "import it again with how they are (--spacing, --window, …)."
            )
        recorded = record["preparation"]
    except (KeyError, TypeError, AttributeError) as error:
        raise SegraftError(
            f"{path} does not say what its network segments or how its scans were prepared: it was not written by "
            "`segraft pretrain` or `segraft adapt`."
        ) from error
    preparation = recorded_preparation(recorded, path)
    names = tuple(record.get("channels") or (numbered(channels) if channels > 1 else ("",)))
    return Task(labels, preparation, names)
