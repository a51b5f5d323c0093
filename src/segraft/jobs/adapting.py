"""Adapting a base to a new task from a few labelled scans."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from segraft import adapters
from segraft.adapters import AdapterSpec, ParameterTable, parameter_table
from segraft.data.cohort import Cohort
from segraft.data.scan_preparation import ScanPreparation, recorded_preparation
from segraft.errors import SegraftError
from segraft.exchange.opening import open_base, require_no_fold, scheme_of
from segraft.jobs.cases import Served, choose, read_cohort
from segraft.jobs.locating import ADAPTER_FILE
from segraft.jobs.model import build_from_start, with_outputs
from segraft.jobs.params import for_channels
from segraft.jobs.preparing import require_same_channels, require_same_order
from segraft.jobs.run_folder import RunFolder, versions
from segraft.jobs.starting import draw_start
from segraft.jobs.training_set import training_set
from segraft.networks import Base, load_base, load_checkpoint, read_base
from segraft.networks.bases import FILE_NAME
from segraft.networks.checkpoints import output_notes
from segraft.networks.encoder_files import require_segmenting, with_sizes
from segraft.networks.heads import Outputs, match_outputs, require_head, untrained_outputs
from segraft.networks.starting import own_prefixes, trained_by, untrained_notes
from segraft.networks.trusted import trust_asked
from segraft.structures import same_name
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


@dataclass(frozen=True)
class BaseSource:
    """Where a base comes from: a base file of ours, or a network with weights from elsewhere.

    Attributes:
        base: folder or file of `segraft pretrain`; a network of another tool (`nnunet:path`); or a network (name or
            `package.module:Class`) with `weights`.
        weights: of such a network, of any kind that `segraft.networks.load_checkpoint` reads.
        arguments: keyword arguments of such a network.
        labels: what the outputs of such weights stand for, in order, or one word of `segraft.networks.layouts`
            (`btcv`); none: as the weights' kind says, where it does.
        fold: of a network of another tool that has several.
    """

    base: str | Path
    weights: str | Path | None = None
    arguments: Mapping[str, Any] | None = None
    labels: Sequence[str] = ()
    fold: str | None = None

    def load(self, labels: Mapping[int, str], cohort: Cohort) -> "LoadedBase":
        """The network, with one output for each of the new task's labels, for images of the cohort's channels.

        A label takes the output of its name. Where no name is the same and there are as many, outputs map by position;
        else the labels that the base does not have get outputs that start new, which the adapter must train.

        Args:
            labels: value -> name.
            cohort: of the images.

        Raises:
            SegraftError: it does not exist, does not fit, takes other channels, or its outputs cannot be exchanged.
        """
        asked = tuple(labels.values())
        if scheme_of(self.base):
            if self.weights is not None:
                raise SegraftError(f"the base {self.base} has its own weights: leave --weights out.")
            return self._of_another_tool(asked, cohort)
        require_no_fold(self.fold, self.base)
        if self.weights is None:
            return self._of_ours(asked, cohort)
        return self._from_elsewhere(asked, self.weights, cohort)

    def _of_another_tool(self, labels: tuple[str, ...], cohort: Cohort) -> "LoadedBase":
        self._refuse_what_it_has()
        opened = open_base(self.base, fold=self.fold)
        require_same_channels(len(opened.channels), cohort.channels, f"the base {self.base}", str(cohort.path))
        require_same_order(opened.channels, cohort.channels, str(self.base), str(cohort.path))
        arguments = {**opened.arguments, "out_channels": len(labels)}
        loaded = self._with_weights(opened.network, arguments, opened.weights, labels, opened.outputs)
        return replace(loaded, preparation=opened.preparation, notes=(*opened.notes, *loaded.notes))

    def _refuse_what_it_has(self) -> None:
        for given, option in ((self.arguments, "--network-args"), (self.labels, "--base-labels")):
            if given:
                raise SegraftError(
                    f"network arguments and names of outputs go with weights from elsewhere; the base {self.base} has "
                    f"its own: leave {option} out, or add --weights."
                )

    def _of_ours(self, labels: tuple[str, ...], cohort: Cohort) -> "LoadedBase":
        self._refuse_what_it_has()
        info = read_base(self.base)
        require_segmenting(info.path, info.record)
        net, info = load_base(info.path)
        takes = info.arguments["in_channels"]
        require_same_channels(takes, cohort.channels, f"the base {info.path}", str(cohort.path))
        require_same_order(tuple(info.record.get("channels", ())), cohort.channels, str(info.path), str(cohort.path))
        described = {"network": info.network, "arguments": info.arguments, "path": str(info.path)}
        recorded = info.record.get("preparation")
        preparation = None if recorded is None else recorded_preparation(recorded, info.path)
        names, count = _names(info), info.arguments["out_channels"]
        outputs = match_outputs(labels, names, count)
        if outputs is not None:
            described |= outputs.record()
            net = with_outputs(net, info, outputs)
        untrained = info.record.get("untrained", {})
        rows = range(count) if outputs is None else outputs.rows
        new = {place for place, row in enumerate(rows) if row is None or row in untrained.get("outputs", ())}
        notes = untrained_notes(untrained.get("parts", ()))
        return LoadedBase(
            net,
            described,
            preparation,
            Served.of(info.record),
            frozenset(new),
            tuple(untrained.get("parts", ())),
            (*notes, *self._by_position(outputs, labels, names), *output_notes(outputs, labels)),
            bool(untrained.get("random")),
        )

    def _by_position(self, outputs: Outputs | None, labels: Sequence[str], names: Sequence[str]) -> list[str]:
        """That outputs go on under other names."""
        other = [f"{old} as {new}" for old, new in zip(names, labels, strict=False) if same_name(old) != same_name(new)]
        return (
            [f"outputs of {self.base} that go on under other names: {', '.join(other)}."]
            if other and outputs is None
            else []
        )

    def _from_elsewhere(self, labels: tuple[str, ...], weights: str | Path, cohort: Cohort) -> "LoadedBase":
        channels = cohort.channels
        arguments = {"in_channels": len(channels), "out_channels": len(labels), **(self.arguments or {})}
        require_same_channels(arguments["in_channels"], channels, f"the network {self.base}", str(cohort.path))
        trust_asked(str(self.base))
        arguments, notes = with_sizes(str(self.base), arguments, weights)
        loaded = self._with_weights(str(self.base), arguments, weights, labels, self.labels)
        return replace(loaded, notes=(*notes, *loaded.notes))

    def _with_weights(
        self,
        network: str,
        arguments: Mapping[str, Any],
        weights: str | Path,
        labels: tuple[str, ...],
        names: Sequence[str],
    ) -> "LoadedBase":
        net = build_from_start(network, arguments)
        loaded = load_checkpoint(net, weights, labels=labels, names=names)
        described = {"network": network, "arguments": dict(arguments), "path": str(weights)}
        new: tuple[int, ...] = ()
        if loaded.outputs is not None:
            described |= loaded.outputs.record()
            new = loaded.outputs.new
        served = Served.by_weights(weights)
        return LoadedBase(net, described, None, served, frozenset(new), loaded.untrained, loaded.notes(labels))


@dataclass(frozen=True)
class LoadedBase:
    """A base, ready to be adapted.

    Attributes:
        net: plain, with one output for each label.
        described: how to build it again, for the adapter's record.
        preparation: that it was trained with, where that is known.
        served: the images that trained it.
        new: places of the labels whose outputs start at random.
        untrained: further parts and layers of the network that do.
        notes: what the user should know of it.
        random: all of it starts at random.
    """

    net: nn.Module
    described: dict[str, Any]
    preparation: ScanPreparation | None
    served: Served
    new: frozenset[int]
    untrained: tuple[str, ...]
    notes: tuple[str, ...]
    random: bool = False

    def require_training(self, labels: Sequence[str]) -> None:
        """Refuse, after grafting, an adapter that leaves as it is what starts at random.

        Raises:
            SegraftError: naming the part, or the labels of the outputs.
        """
        trained = [name for name, value in self.net.named_parameters() if value.requires_grad]
        for part in self.untrained:
            if not any(name.startswith(own_prefixes(self.net, part, self.untrained)) for name in trained):
                raise SegraftError(
                    f"{self.described['path']} has no trained {part}, so it starts at random, but the adapter leaves "
                    f"it frozen: train it, with --train {trained_by(part, self.untrained)}."
                )
        if not self.new:
            return
        still = untrained_outputs(self.net, require_head(self.net, len(labels)), self.new)
        if still:
            raise SegraftError(
                f"{self.described['path']} has no trained output for {', '.join(labels[place] for place in still)}, so "
                "it starts at random, but the adapter leaves the head frozen: train it, with --train head or --train "
                "decoder (or, where the outputs of weights are of unknown labels, name them with --base-labels)."
            )


def _names(info: Base) -> tuple[str, ...]:
    """Names of a base's outputs; none where its record does not name each."""
    names = tuple(str(name) for name in info.record.get("labels", {}).values())
    return names if len(names) == info.arguments["out_channels"] else ()


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
    loaded.require_training(tuple(asked.values()))
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
