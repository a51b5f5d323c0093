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
from segraft.data.preparation import Preparation
from segraft.errors import SegraftError
from segraft.jobs.cases import Served, choose, read_cohort
from segraft.jobs.locating import ADAPTER_FILE
from segraft.jobs.model import build_from
from segraft.jobs.run_folder import RunFolder, versions
from segraft.jobs.training_set import training_set
from segraft.networks import load_base, load_weights
from segraft.networks.bases import FILE_NAME
from segraft.training.distributed import Team
from segraft.training.fit import Fit, check_device, check_precision, fit
from segraft.training.recomputation import regions
from segraft.training.settings import TrainingSettings
from segraft.training.strategies import require_parts

ADAPTING: dict[str, Any] = {"learning_rate": 3e-3, "stop_when_converged": True}
"""Settings in which adapting differs from the defaults of `TrainingSettings`, unless the user says otherwise."""


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


@dataclass(frozen=True)
class BaseSource:
    """Where a base comes from: a base file of ours, or a network with weights from elsewhere.

    Attributes:
        base: folder or file of `segraft pretrain`; or a network (name or `package.module:Class`) with `weights`.
        weights: of such a network, `.safetensors` or a checkpoint of tensors.
        arguments: keyword arguments of such a network.
    """

    base: str | Path
    weights: str | Path | None = None
    arguments: Mapping[str, Any] | None = None

    def load(self, labels: int) -> tuple[nn.Module, dict[str, Any], Preparation | None, Served]:
        """The network, its description, the preparation it was trained with, and the images that trained it.

        Args:
            labels: how many the new task has.

        Raises:
            SegraftError: it does not exist, does not fit, or has another number of outputs.
        """
        if self.weights is None:
            if self.arguments:
                raise SegraftError(
                    f"network arguments go with weights from elsewhere; the base {self.base} has its own: leave "
                    "--network-args out, or add --weights."
                )
            net, info = load_base(self.base)
            described = {"network": info.network, "arguments": info.arguments, "path": str(info.path)}
            recorded = info.record.get("preparation")
            preparation = None if recorded is None else Preparation.from_record(recorded, info.path)
            outputs = info.arguments["out_channels"]
            if outputs != labels:
                names = ", ".join(info.record.get("labels", {}).values()) or "of unknown labels"
                raise SegraftError(
                    f"the base {info.path} has {outputs} outputs ({names}), but {labels} labels were asked for: ask "
                    f"for {outputs} with --labels."
                )
            return net, described, preparation, Served.of(info.record)
        arguments = {"in_channels": 1, "out_channels": labels, **(self.arguments or {})}
        net = build_from(str(self.base), arguments)
        load_weights(net, self.weights)
        described = {"network": str(self.base), "arguments": arguments, "path": str(self.weights)}
        return net, described, None, Served()


def adapt(
    base: BaseSource | str | Path,
    data: str | Path,
    out: str | Path,
    *,
    spec: AdapterSpec | None = None,
    labels: Sequence[str] = (),
    shots: int | Sequence[str] | None = None,
    preparation: Preparation | Mapping[str, Any] | None = None,
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
            to take; None means all.
        preparation: of the scans, whole or only the fields that differ from the base's.
        settings: of the training; None means the defaults, changed as `ADAPTING` says.
        patient_pattern: regular expression whose first group, searched in a case's id, is the patient.
        resume: go on after the last finished epoch, exactly.
        overwrite: replace an adapter that is there.
        console: for progress; None is silent.

    Where several processes train together (`settings.devices`, `settings.nodes`), the first one writes, and all return
    the same. They need to see the same files.

    Raises:
        SegraftError: bad input of any kind; nothing is written then.
    """
    settings, spec = settings or TrainingSettings(**ADAPTING), spec or AdapterSpec("dora_c")
    source = base if isinstance(base, BaseSource) else BaseSource(base)
    check_device(settings.device)
    check_precision(settings.device, settings.precision)
    team = Team.join(settings)
    console = console if team.first else None
    folder = RunFolder(Path(out), ADAPTER_FILE, resume=resume, overwrite=overwrite, writes=team.first)
    cohort = Cohort.read(data, patient_pattern=patient_pattern)
    asked = cohort.select_labels(labels)
    net, described, inherited, pretrained_on = source.load(len(asked))
    cohort = read_cohort(data, patient_pattern, pretrained_on)
    require_parts(net, spec.train)
    adapters.graft(net, spec, seed=settings.seed)
    regions(net, settings.recompute)  # a wrong name is told before scans are read
    chosen = choose(cohort, shots, seed=settings.seed, avoid=pretrained_on, purpose="to adapt to", console=console)
    given = training_set(
        cohort,
        chosen.cases,
        asked,
        net=net,
        preparation=preparation,
        inherited=inherited,
        settings=settings,
        console=console,
    )
    base_record = described | {"fingerprint": adapters.fingerprint(net)}
    base_record["path"] = _relative(Path(described["path"]), folder.path)
    request = {"base": base_record, "spec": spec.to_dict(), "settings": settings.model_dump(mode="json"), **given.task}
    with folder.training(request):
        training = fit(
            net, given.source, settings, checkpoint=folder.checkpoint, resume=resume, title="adapting", console=console
        )
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
        chosen.notes,
    )


def _saved(net: nn.Module, path: Path, record: Mapping[str, Any]) -> int:
    """Write the adapter; its bytes."""
    adapters.save(net, path, record=record)
    return path.stat().st_size


def _relative(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`, so that both can be moved together; absolute where they share no root."""
    path = path / FILE_NAME if path.is_dir() else path
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # other drive
        return path.resolve().as_posix()
