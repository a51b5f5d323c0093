"""Adapting a base to a new task from a few labelled scans."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from segraft import adapters
from segraft.adapters import AdapterSpec, ParameterTable, parameter_table
from segraft.data.cohort import Cohort
from segraft.data.scan_preparation import ScanPreparation
from segraft.jobs.base_source import BaseSource
from segraft.jobs.cases import choose, read_cohort
from segraft.jobs.locating import ADAPTER_FILE
from segraft.jobs.params import for_channels
from segraft.jobs.run_folder import RunFolder, versions
from segraft.jobs.starting import draw_start
from segraft.jobs.training_set import training_set
from segraft.networks.bases import FILE_NAME
from segraft.training.distributed import Team
from segraft.training.fit import Fit, check_device, check_precision, fit
from segraft.training.recomputation import regions
from segraft.training.settings import TrainingSettings, check_settings
from segraft.training.strategies import require_parts


def adapting_settings(**said: Any) -> TrainingSettings:
    """Settings of an adaptation, whose defaults are others than those of `TrainingSettings`.

    The learning rate is 0.003, and the training stops when it has converged, but not with the schedule `onecycle`,
    whose rate would be cut off near its highest.

    Raises:
        SegraftError: a value that does not fit.
    """
    stops = said.get("schedule") != "onecycle"
    return check_settings(**{"learning_rate": 3e-3, "stop_when_converged": stops, **said})


@dataclass(frozen=True)
class Adapted:
    """Result of `adapt`."""

    path: Path
    labels: dict[int, str]
    cases: tuple[str, ...]
    parameters: ParameterTable
    bytes: int
    training: Fit
    notes: tuple[str, ...]


def adapt(
    base: BaseSource | str | Path,
    data: str | Path,
    out: str | Path,
    *,
    spec: AdapterSpec | None = None,
    labels: Sequence[str] = (),
    shots: int | Sequence[str] | None = None,
    preparation: ScanPreparation | Mapping[str, Any] | None = None,
    settings: TrainingSettings | None = None,
    patient_pattern: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Adapted:
    """Graft an adapter onto a base, train it on a few cases and write `out/adapter.safetensors`.

    Args:
        base: the base.
        data: `dataset.json`, or its folder.
        out: folder to write to.
        spec: what to graft; None means `AdapterSpec("dora_c")`.
        labels: numbers or names; none means all of the cohort.
        shots: patients to draw, of those that did not train the base where there are enough; or the ids of the cases
            to take; None means all, of which those that trained the base with labels are left out.
        preparation: of the scans, whole or only the fields that differ from the base's; `intensity` may be
            given by the channel (see `by_channel`).
        settings: of the training; None means those of `adapting_settings`.
        patient_pattern: regular expression whose first group, searched in a case's id, is the patient.
        resume: go on after the last finished epoch, exactly.
        overwrite: replace an adapter that is there.
        console: for progress; None is silent.

    Where several processes train together (`settings.devices`, `settings.nodes`), the first one writes, and all return
    the same. They need to see the same files.

    Raises:
        SegraftError: bad input of any kind; nothing is written then.
    """
    settings, spec = settings or adapting_settings(), spec or AdapterSpec("dora_c")
    source = base if isinstance(base, BaseSource) else BaseSource(base)
    check_device(settings.device)
    check_precision(settings.device, settings.precision)
    team = Team.join(settings)
    console = console if team.first else None
    folder = RunFolder(Path(out), ADAPTER_FILE, resume=resume, overwrite=overwrite, writes=team.first)
    cohort = Cohort.read(data, patient_pattern=patient_pattern)
    asked = cohort.select_labels(labels)
    loaded = source.load(asked, cohort)
    net, described = loaded.net, loaded.described
    cohort = read_cohort(data, patient_pattern, loaded.served)
    spec = for_channels(spec, net)
    require_parts(net, spec.train)
    adapters.graft(net, spec, seed=settings.seed)
    loaded.require_training(tuple(asked.values()), cohort.channels)
    draw_start(loaded, settings.seed)
    regions(net, settings.recompute)  # a wrong name is told before scans are read
    # Scans whose labels nobody has read yet train as well as others: only a draw prefers those that are new.
    avoid = None if shots is None and loaded.served.unlabelled else loaded.served
    chosen = choose(cohort, shots, seed=settings.seed, avoid=avoid, purpose="to adapt to", console=console)
    given = training_set(
        cohort,
        chosen.cases,
        asked,
        net=net,
        preparation=preparation,
        inherited=loaded.preparation,
        settings=settings,
        console=console,
    )
    base_record = described | {"fingerprint": adapters.fingerprint(net)}
    base_record["path"] = relative_to(Path(described["path"]), folder.path)
    request = {"base": base_record, "spec": spec.to_dict(), "settings": settings.model_dump(mode="json"), **given.task}
    with folder.training(request):
        training = fit(
            net, given.source, settings, checkpoint=folder.checkpoint, resume=resume, title="adapting", console=console
        )
        adapters.prune(net)  # directions that are not in use are not in the file, nor counted
        counted = parameter_table(net)
        record = given.task | {
            "base": base_record,
            "settings": settings.model_dump(mode="json"),
            "training": asdict(training),
            "trainable_parameters": counted.trainable,
            "versions": versions(),
        }
        size = team.first_does(lambda: _saved(net, folder.result, record))
    return Adapted(
        folder.result,
        asked,
        tuple(case.id for case in chosen.cases),
        counted,
        size,
        training,
        (*loaded.notes, *chosen.notes),
    )


def _saved(net: nn.Module, path: Path, record: Mapping[str, Any]) -> int:
    """Write the adapter; its bytes."""
    adapters.save(net, path, record=record)
    return path.stat().st_size


def relative_to(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`, so that both can be moved together; absolute where they share no root."""
    path = path / FILE_NAME if path.is_dir() else path
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # other drive
        return path.resolve().as_posix()
