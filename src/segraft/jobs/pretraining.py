"""Pre-training a base, supervised."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from segraft.adapters import parameter_table
from segraft.data.cohort import Cohort
from segraft.data.preparation import Preparation
from segraft.jobs.bases import build_from, named_as_loaded
from segraft.jobs.cases import choose
from segraft.jobs.preparing import require_same_channels
from segraft.jobs.run_folder import RunFolder, versions
from segraft.jobs.training_set import training_set
from segraft.networks import load_checkpoint, save_base
from segraft.networks.bases import FILE_NAME
from segraft.networks.encoder_files import with_sizes
from segraft.training.distributed import Team
from segraft.training.fit import Fit, check_device, check_precision, fit
from segraft.training.recomputation import regions
from segraft.training.settings import TrainingSettings


@dataclass(frozen=True)
class Pretrained:
    """Result of `pretrain`."""

    path: Path
    fingerprint: str
    labels: dict[int, str]
    cases: tuple[str, ...]
    parameters: int
    training: Fit
    notes: tuple[str, ...]


def pretrain(
    data: str | Path,
    out: str | Path,
    *,
    network: str = "unet3d",
    network_arguments: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    labels: Sequence[str] = (),
    cases: int | Sequence[str] | None = None,
    preparation: Preparation | Mapping[str, Any] | None = None,
    settings: TrainingSettings | None = None,
    patient_pattern: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Pretrained:
    """Train all weights of a network on a cohort and write `out/base.safetensors`.

    Args:
        data: `dataset.json`, or its folder.
        out: folder to write to.
        network: a key of `segraft.networks.NETWORKS`, or `package.module:Class`.
        network_arguments: further keyword arguments of the network.
        weights: to start from, of any kind that `segraft.networks.load_checkpoint` reads; None starts from random
            weights, as does what such weights do not hold.
        labels: numbers or names; none means all of the cohort.
        cases: patients to draw, or the ids of the cases to take; None means all.
        preparation: of the scans, whole or only the fields that differ from the defaults, `intensity` perhaps by the
            channel (see `by_channel`); the patch size is chosen from the data where it is not given.
        settings: of the training.
        patient_pattern: regular expression whose first group, searched in a case's id, is the patient.
        resume: go on after the last finished epoch, exactly.
        overwrite: replace a base that is there.
        console: for progress; None is silent.

    Where several processes train together (`settings.devices`, `settings.nodes`), the first one writes, and all return
    the same. They need to see the same files.

    Raises:
        SegraftError: bad input of any kind; nothing is written then.
    """
    settings = settings or TrainingSettings()
    check_device(settings.device)
    check_precision(settings.device, settings.precision)
    team = Team.join(settings)
    console = console if team.first else None
    folder = RunFolder(Path(out), FILE_NAME, resume=resume, overwrite=overwrite, writes=team.first)
    cohort = Cohort.read(data, patient_pattern=patient_pattern)
    asked = cohort.select_labels(labels)
    arguments = {"in_channels": len(cohort.channels), "out_channels": len(asked), **(network_arguments or {})}
    require_same_channels(arguments["in_channels"], cohort.channels, f"the network {network}", str(cohort.path))
    notes: tuple[str, ...] = ()
    if weights is not None:
        arguments, notes = with_sizes(network, arguments, weights)
    torch.manual_seed(settings.seed)
    net = build_from(network, arguments)
    if weights is not None:
        loaded = load_checkpoint(net, weights, labels=tuple(asked.values()))
        notes += loaded.notes(tuple(asked.values()))
        network, arguments = named_as_loaded(net, network, arguments, loaded)
    regions(net, settings.recompute)  # a wrong name is told before scans are read
    chosen = choose(cohort, cases, seed=settings.seed, purpose="to pre-train on")
    given = training_set(
        cohort,
        chosen.cases,
        asked,
        net=net,
        preparation=preparation,
        inherited=None,
        settings=settings,
        console=console,
    )
    request = {"network": network, "arguments": arguments, "settings": settings.model_dump(mode="json"), **given.task}
    with folder.training(request):
        training = fit(
            net,
            given.source,
            settings,
            checkpoint=folder.checkpoint,
            resume=resume,
            title="pre-training",
            console=console,
        )
        record = given.task | {
            **({"channels": list(cohort.channels)} if any(cohort.channels) else {}),  # a single one has a name too
            "settings": settings.model_dump(mode="json"),
            "training": asdict(training),
            "versions": versions(),
        }
        base = team.first_does(lambda: save_base(net, folder.path, network=network, arguments=arguments, record=record))
    return Pretrained(
        base.path,
        base.fingerprint,
        asked,
        tuple(case.id for case in chosen.cases),
        parameter_table(net).total,
        training,
        (*notes, *chosen.notes),
    )
