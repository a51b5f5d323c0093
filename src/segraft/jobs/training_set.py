"""What a training is given of a cohort: checked cases, prepared, as patches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import nn

from segraft.data.checks import check_cases
from segraft.data.cohort import Case, Cohort
from segraft.data.labels import Labels
from segraft.data.patches import PatchSource
from segraft.data.scan_preparation import ScanPreparation
from segraft.jobs.intensities import by_channel
from segraft.jobs.preparing import check_network, settle_preparation, takes_missing_channels
from segraft.jobs.task import task_record
from segraft.jobs.watching import watched
from segraft.training.settings import TrainingSettings


@dataclass(frozen=True)
class TrainingSet:
    """Patches to train on, and what the trained file's record says of them.

    Attributes:
        source: of the patches.
        task: labels, preparation, data set, and the digest of every case's image.
    """

    source: PatchSource
    task: dict[str, Any]


def training_set(
    cohort: Cohort,
    cases: Sequence[Case],
    labels: Labels,
    *,
    net: nn.Module,
    preparation: ScanPreparation | Mapping[str, Any] | None,
    inherited: ScanPreparation | None,
    settings: TrainingSettings,
    console: Console | None,
) -> TrainingSet:
    """Check and prepare cases for a network.

    Args:
        cohort: the cases are of.
        cases: to train on.
        labels: in the order of the network's outputs.
        net: to be trained.
        preparation: as the user wants it; see `settle_preparation`.
        inherited: as the base was trained.
        settings: of the training.
        console: for progress; None is silent.

    Raises:
        SegraftError: what `check_cases`, `settle_preparation` or `check_network` refuses.
    """
    complete = not takes_missing_channels(net)
    check_cases(cases, cohort, labels, complete=complete, watch=watched("checking scans", console))
    preparation = by_channel(preparation, inherited, cohort.channels, str(cohort.path))
    settled = settle_preparation(preparation, inherited, net, cases)
    if not settings.flip:
        settled = settled.without_mirroring()
    check_network(net, settled.patch, len(labels), len(cohort.channels))
    source = PatchSource(
        cases,
        settled,
        labels,
        seed=settings.seed,
        patches_per_volume=settings.patches,
        foreground_fraction=settings.foreground,
        augmentation=settings.augmentation,
        flip_axes=None if settings.flip else (),
        watch=watched("preparing scans", console),
    )
    digests = {case.id: case.digest() for case in watched("fingerprinting scans", console)(cases)}
    task = task_record(labels, settled, cohort.channels) | {
        "dataset": cohort.name,
        "patient_pattern": cohort.patient_pattern,
        "cases": digests,
    }
    return TrainingSet(source, task)
