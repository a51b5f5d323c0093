"""Where a base comes from, and what of it a task takes."""

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from segraft.data.cohort import Cohort
from segraft.data.scan_preparation import ScanPreparation, recorded_preparation
from segraft.errors import SegraftError
from segraft.exchange.opening import open_base, require_no_fold, scheme_of
from segraft.jobs.bases import build_from_start, with_inputs, with_outputs
from segraft.jobs.cases import Served
from segraft.jobs.inputs import CURE, channels_held, prepared_for, settle_inputs
from segraft.jobs.preparing import require_same_channels
from segraft.networks import Base, load_base, load_checkpoint, read_base
from segraft.networks.checkpoints import output_notes, position_notes
from segraft.networks.encoder_files import require_segmenting, with_sizes
from segraft.networks.heads import match_outputs, require_head, untrained_outputs
from segraft.networks.inputs import Inputs, unseen
from segraft.networks.registry import usual_names
from segraft.networks.starting import own_prefixes, trained_by, untrained_notes
from segraft.networks.trusted import trust_asked
from segraft.structures import same_name


@dataclass(frozen=True)
class BaseSource:
    """Where a base comes from: a base file of ours, or a network with weights from elsewhere.

    Attributes:
        base: folder or file of `segraft pretrain`; a network of another tool (`nnunet:path`); or a network (name or
            `package.module:Class`) with `weights`.
        weights: of such a network, of any kind that `segraft.networks.load_checkpoint` reads.
        arguments: keyword arguments of such a network.
        labels: what the base's outputs stand for, in order, or, of such weights, one word of `segraft.networks.layouts`
            (`btcv`); none: as the base says, or the weights' kind, where it does.
        fold: of a network of another tool that has several.
        new_labels: labels of the task, by number or name, whose outputs start new although the base may have them, or
            `all`.
        inputs: let the first layers take other channels than the base's; how those start that it has not got, a key of
            `segraft.networks.inputs.STARTS`. None: the scans must have as many channels as the base.
        channels: names of the base's channels, in order; none: as the base says, where it does.
    """

    base: str | Path
    weights: str | Path | None = None
    arguments: Mapping[str, Any] | None = None
    labels: Sequence[str] = ()
    fold: str | None = None
    new_labels: Sequence[str] = ()
    inputs: str | None = None
    channels: Sequence[str] = ()

    def load(self, labels: Mapping[int, str], cohort: Cohort) -> "LoadedBase":
        """The network, with one output for each of the new task's labels, for images of the cohort's channels.

        A label takes the output of its name. Where no name is the same and there are as many, outputs map by position;
        else the labels that the base does not have get outputs that start new, which the adapter must train. So do
        those that were asked to. Channels are the base's, unless `inputs` allows others.

        Args:
            labels: value -> name.
            cohort: of the images.

        Raises:
            SegraftError: it does not exist, does not fit, takes other channels, or its outputs cannot be exchanged.
        """
        asked, fresh = tuple(labels.values()), self._fresh(labels)
        if scheme_of(self.base):
            if self.weights is not None:
                raise SegraftError(f"the base {self.base} has its own weights: leave --weights out.")
            return self._of_another_tool(asked, fresh, cohort)
        require_no_fold(self.fold, self.base)
        if self.weights is None:
            return self._of_ours(asked, fresh, cohort)
        return self._from_elsewhere(asked, fresh, self.weights, cohort)

    def _fresh(self, labels: Mapping[int, str]) -> frozenset[int]:
        """Places of the labels that were asked to start new."""
        if [text.casefold() for text in self.new_labels] == ["all"]:
            return frozenset(range(len(labels)))
        known = {same_name(name): place for place, name in enumerate(labels.values())}
        known |= {str(value): place for place, value in enumerate(labels)}
        unknown = [text for text in self.new_labels if same_name(text) not in known]
        if unknown:
            raise SegraftError(
                f"{unknown[0]!r} shall start new, but is none of the labels {', '.join(labels.values())}: name labels "
                "that are asked for, or all."
            )
        return frozenset(known[same_name(text)] for text in self.new_labels)

    def _of_another_tool(self, labels: tuple[str, ...], fresh: AbstractSet[int], cohort: Cohort) -> "LoadedBase":
        self._refuse_what_it_has()
        opened = open_base(self.base, fold=self.fold)
        names = self.channels or opened.channels
        inputs, notes = settle_inputs(len(opened.channels), names, cohort, self.inputs, f"the base {self.base}")
        arguments = {**opened.arguments, "out_channels": len(labels)}
        outputs = self.labels or opened.outputs
        loaded = self._with_weights(opened.network, arguments, opened.weights, labels, outputs, fresh, inputs)
        preparation = prepared_for(opened.preparation, inputs)
        said = (*opened.unlike, *opened.notes, *notes, *loaded.notes)
        return replace(loaded, preparation=preparation, notes=said)

    def _refuse_what_it_has(self) -> None:
        if self.arguments:
            raise SegraftError(
                f"network arguments go with weights from elsewhere; the base {self.base} has its own: leave "
                "--network-args out, or add --weights."
            )

    def _of_ours(self, labels: tuple[str, ...], fresh: AbstractSet[int], cohort: Cohort) -> "LoadedBase":
        self._refuse_what_it_has()
        info = read_base(self.base)
        require_segmenting(info.path, info.record)
        net, info = load_base(info.path)
        channels = self.channels or tuple(info.record.get("channels", ()))
        takes, who = info.arguments["in_channels"], f"the base {info.path}"
        inputs, channel_notes = settle_inputs(takes, channels, cohort, self.inputs, who)
        described = {"network": info.network, "arguments": info.arguments, "path": str(info.path)}
        recorded = info.record.get("preparation")
        preparation = None if recorded is None else recorded_preparation(recorded, info.path)
        names, count = tuple(self.labels) or _names(info), info.arguments["out_channels"]
        outputs = match_outputs(labels, names, count, fresh)
        if outputs is not None:
            described |= outputs.record()
            net = with_outputs(net, info, outputs)
        net, seeing = with_inputs(net, info.network, info.arguments | {"out_channels": len(labels)}, inputs)
        described |= {} if inputs is None else inputs.record()
        untrained = info.record.get("untrained", {})
        rows = range(count) if outputs is None else outputs.rows
        new = {place for place, row in enumerate(rows) if row is None or row in untrained.get("outputs", ())}
        notes = untrained_notes(untrained.get("parts", ()))
        by_position = position_notes(str(self.base), names, labels) if outputs is None else ()
        return LoadedBase(
            net,
            described,
            prepared_for(preparation, inputs),
            Served.of(info.record),
            frozenset(new),
            tuple(untrained.get("parts", ())),
            (*notes, *by_position, *output_notes(outputs, labels, fresh), *channel_notes),
            bool(untrained.get("random")),
            inputs,
            seeing,
        )

    def _from_elsewhere(
        self, labels: tuple[str, ...], fresh: AbstractSet[int], weights: str | Path, cohort: Cohort
    ) -> "LoadedBase":
        trust_asked(str(self.base))
        network, known = str(self.base), {"in_channels": len(self.channels)} if self.channels else {}
        given = {**known, **usual_names(network, self.arguments or {})}
        arguments = {"in_channels": len(cohort.channels), "out_channels": len(labels), **given}
        arguments, size_notes = with_sizes(network, arguments, weights)
        if self.inputs is not None and "in_channels" not in given:
            arguments["in_channels"] = channels_held(network, arguments, weights) or arguments["in_channels"]
        inputs, notes = settle_inputs(
            arguments["in_channels"], self.channels, cohort, self.inputs, f"the network {network}"
        )
        try:
            loaded = self._with_weights(network, arguments, weights, labels, self.labels, fresh, inputs)
        except SegraftError:
            held = None if self.inputs or "in_channels" in given else channels_held(network, arguments, weights)
            if held is not None:  # the likeliest misfit, in plain words
                require_same_channels(held, cohort.channels, str(weights), str(cohort.path), CURE)
            raise
        return replace(loaded, notes=(*size_notes, *loaded.notes, *notes))

    def _with_weights(
        self,
        network: str,
        arguments: Mapping[str, Any],
        weights: str | Path,
        labels: tuple[str, ...],
        names: Sequence[str],
        fresh: AbstractSet[int],
        inputs: Inputs | None,
    ) -> "LoadedBase":
        net = build_from_start(network, arguments)
        loaded = load_checkpoint(net, weights, labels=labels, names=names, fresh=fresh)
        described = {"network": network, "arguments": dict(arguments), "path": str(weights)}
        new: tuple[int, ...] = ()
        if loaded.outputs is not None:
            described |= loaded.outputs.record()
            new = loaded.outputs.new
        net, seeing = with_inputs(net, network, arguments, inputs)
        described |= {} if inputs is None else inputs.record()
        served, notes = Served.by_weights(weights), loaded.notes(labels, fresh)
        base = LoadedBase(net, described, None, served, frozenset(new), loaded.untrained, notes)
        return replace(base, inputs=inputs, seeing=seeing)


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
        inputs: channels that the task's images take of it; None: its own.
        seeing: keys of the weights that see the image, where those changed.
    """

    net: nn.Module
    described: dict[str, Any]
    preparation: ScanPreparation | None
    served: Served
    new: frozenset[int]
    untrained: tuple[str, ...]
    notes: tuple[str, ...]
    random: bool = False
    inputs: Inputs | None = None
    seeing: tuple[str, ...] = ()

    def require_training(self, labels: Sequence[str], channels: Sequence[str] = ()) -> None:
        """Refuse, after grafting, an adapter that leaves as it is what starts at random.

        Raises:
            SegraftError: naming the part, the labels of the outputs, or the channels that would never be seen.
        """
        trained = [name for name, value in self.net.named_parameters() if value.requires_grad]
        for part in self.untrained:
            if not any(name.startswith(own_prefixes(self.net, part, self.untrained)) for name in trained):
                raise SegraftError(
                    f"{self.described['path']} has no trained {part}, so it starts at random, but the adapter leaves "
                    f"it frozen: train it, with --train {trained_by(part, self.untrained)}."
                )
        for key in self.seeing if self.inputs else ():
            blind = unseen(self.net, key, self.inputs.new) if self.inputs else []
            if blind:
                layer = key.rpartition(".")[0]
                raise SegraftError(
                    f"the layer {layer!r} would never see {', '.join(channels[place] for place in blind)}, as its "
                    "weights for that start at zero and the adapter leaves them frozen: train it, with --train "
                    f"'{re.escape(layer)}\\..*', or start with --inputs mean."
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
