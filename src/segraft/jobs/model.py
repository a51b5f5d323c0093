"""A network ready to segment, from an adapter file or a base file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from segraft import adapters
from segraft.adapters import AdapterHeader
from segraft.data.channels import Files, Scan, numbered, plain
from segraft.data.checks import check_scan, require_channels
from segraft.data.cohort import Case
from segraft.data.labels import Labels
from segraft.data.preparation import prepare_scan
from segraft.data.scan_preparation import ScanPreparation, recorded_preparation
from segraft.errors import SegraftError
from segraft.exchange.opening import open_base, require_no_fold, scheme_of
from segraft.inference import AVERAGING, label_map, sliding_scores
from segraft.jobs.cases import Served
from segraft.jobs.locating import file_in, holds_base, read_adapter
from segraft.jobs.preparing import require_same_channels, takes_missing_channels
from segraft.networks import Base, Loaded, build, load_base, load_checkpoint, read_base
from segraft.networks.bases import FILE_NAME
from segraft.networks.encoder_files import holds_encoder, require_segmenting
from segraft.networks.heads import START_SEED, Outputs, PickedOutputs, take_outputs
from segraft.networks.inputs import Inputs, input_weights, take_inputs
from segraft.networks.registry import outline
from segraft.networks.trusted import require_trusted
from segraft.training.fit import check_device, check_precision


@dataclass(frozen=True)
class Segmentation:
    """What a network found in a scan, on the grid of the scan's first channel (as it is stored).

    Attributes:
        mask: label map [X, Y, Z]; where regions overlap, the one that is painted last.
        scan: as it was read.
        regions: where labels are regions: value -> where it is, [X, Y, Z].
    """

    mask: NDArray[np.int64]
    scan: Scan
    regions: dict[int, NDArray[np.bool_]]

    def plane(self, value: int) -> NDArray[np.bool_]:
        """Where a label or region is."""
        return self.regions[value] if self.regions else self.mask == value


@dataclass(frozen=True)
class Model:
    """A plain network with what it needs to segment a scan.

    Attributes:
        net: in evaluation mode, adapters merged where they can be.
        labels: in the order of the network's outputs.
        preparation: of the scans.
        adapted_on: images that trained the adapter.
        pretrained_on: images that trained the base.
        source: the file it came from.
        channels: names of the image's channels, in order; of a single one perhaps empty.
        notes: what the user should know of a network of another tool.
    """

    net: nn.Module
    labels: Labels
    preparation: ScanPreparation
    adapted_on: Served
    pretrained_on: Served
    source: Path
    channels: tuple[str, ...] = ("",)
    notes: tuple[str, ...] = ()

    def case(self, name: str, files: Files) -> Case:
        """A scan of no cohort: a file per channel in the network's order, None where it is missing, or one 4D file."""
        return Case(name, name, tuple(files), None, channels=self.channels if len(self.channels) > 1 else ())

    def read(self, case: Case) -> Scan:
        """The scan of a case, with the channels that the network takes, in its order.

        Channels go by their names, or, where the case or the network has none, by their places.

        Raises:
            SegraftError: the scan is not usable, has other channels, or lacks one that the network needs.
        """
        require_same_channels(len(self.channels), case.channels or ("",) * len(case.images), str(self.source), case.id)
        scan = check_scan(case)
        if len(self.channels) > 1 and numbered(len(self.channels)) not in (scan.names, self.channels):
            theirs, ours = {plain(name): name for name in scan.names}, [plain(name) for name in self.channels]
            if theirs.keys() != set(ours):
                raise SegraftError(
                    f"{self.source} takes the channels {', '.join(self.channels)}, and {scan.who} has "
                    f"{', '.join(scan.names)}: name them as the network does, if they are the same."
                )
            scan = scan.in_order([theirs[name] for name in ours])
        if not takes_missing_channels(self.net):
            require_channels(scan)
        return scan

    def segment(self, case: Case | Path, *, device: str = "cpu", precision: str = "32") -> Segmentation:
        """The labels of a case's scan, or of a scan in one file, on the grid of its first channel.

        Raises:
            SegraftError: what `read` refuses, or the network's output on it is not finite.
        """
        scan = self.read(case if isinstance(case, Case) else self.case(case.name, (case,)))
        image = prepare_scan(scan, self.preparation)
        where = resolve_device(device)
        check_precision(where, precision)
        prepared = self.preparation
        scores = sliding_scores(
            self.net.to(where),
            image.as_tensor(),
            prepared.patch,
            overlap=prepared.overlap,
            average=prepared.average,
            weights=prepared.weights,
            windows=prepared.windows,
            mirror=prepared.mirror_axes,
            device=where,
            precision=precision,
        )
        on_grid = prepared.to_scan(scores, image.affine.numpy(), scan.grid)
        threshold = AVERAGING[prepared.average].threshold
        if not self.labels.regions:
            return Segmentation(label_map(on_grid, tuple(self.labels), threshold).numpy(), scan, {})
        planes = {value: plane.numpy() for value, plane in zip(self.labels, on_grid >= threshold, strict=True)}
        return Segmentation(self.labels.painted(planes), scan, planes)

    def pick(self, labels: Mapping[int, str], places: Sequence[int]) -> "Model":
        """The same model, of which only the outputs at `places` are looked at, for these labels."""
        return replace(self, net=PickedOutputs(self.net, places).eval(), labels=Labels.of(labels))


def resolve_device(device: str) -> str:
    """`auto` becomes the accelerator that is there, else the CPU.

    Raises:
        SegraftError: the device asked for is not there.
    """
    if device != "auto":
        return check_device(device)
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def load_model(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    fold: str | None = None,
    preparation: ScanPreparation | None = None,
) -> Model:
    """Read an adapter file with its base, or a base alone.

    Args:
        path: an adapter file, the folder that `adapt` wrote, a base file, the folder that `pretrain` wrote, or a
            network of another tool (`nnunet:path`).
        base: where the base is, if it is no longer where it was when the adapter was trained.
        fold: of a network of another tool that has several.
        preparation: of the scans, for a base that does not say how they are prepared, as one imported from elsewhere.

    Raises:
        SegraftError: a file is missing or is something else; the adapter belongs to another base.
    """
    if scheme_of(str(path)):
        return _opened(str(path), fold, preparation)
    path = file_in(Path(path))
    require_no_fold(fold, path)
    if path.name == FILE_NAME:
        info = read_base(path)
        require_segmenting(info.path, info.record)
        net, info = load_base(path)
        record = dict(info.record)
        if record.get("untrained"):
            raise SegraftError(
                f"{path} cannot segment by itself, as parts of it start at random ({'; '.join(_untrained(record))}): "
                "adapt it first."
            )
        if "preparation" not in record and preparation is not None:
            record["preparation"] = preparation.model_dump(mode="json")
        channels = info.arguments["in_channels"]
        return _model(net, path, record, channels, adapted_on=Served(), pretrained_on=Served.of(record))
    if holds_base(path):
        raise SegraftError(f"{path} is a base, not an adapter: give the adapter file, or name the base {FILE_NAME}.")
    header = read_adapter(path)
    net, pretrained_on = load_base_of(header, base)
    adapters.load(net, path)
    if header.spec.channels == 1:  # else there is not one weight to merge into
        adapters.merge(net, reversible=False)
    channels = image_channels(header.record["base"])
    adapted_on = Served.of(header.record)
    return _model(net, path, header.record, channels, adapted_on=adapted_on, pretrained_on=pretrained_on)


def _opened(path: str, fold: str | None, preparation: ScanPreparation | None) -> Model:
    """A network of another tool, as it is."""
    opened = open_base(path, fold=fold)
    names = tuple(opened.labels.values())
    net = build_from_start(opened.network, {**opened.arguments, "out_channels": len(names)})
    loaded = load_checkpoint(net, opened.weights, labels=names, names=opened.outputs)
    if loaded.kept:
        raise SegraftError(f"{opened.weights} does not hold all of the network, so it cannot segment: adapt it first.")
    settled = preparation or opened.preparation
    if settled is None or opened.unlike:
        reasons = "; ".join(note.removesuffix(".") for note in (*opened.unlike, *opened.notes))
        raise SegraftError(f"{path} cannot segment as it is, but can be adapted (segraft adapt --base): {reasons}.")
    return Model(net.eval(), opened.labels, settled, Served(), Served(), opened.weights, opened.channels, opened.notes)


def load_base_of(header: AdapterHeader, base: str | os.PathLike[str] | None) -> tuple[nn.Module, Served]:
    """The base that an adapter was trained on, and the images that trained the base.

    Raises:
        SegraftError: the adapter file does not say what it is, the base is not found, or its network is not one that
            a file may name.
    """
    where, described = base_file_of(header, base), header.record["base"]
    outputs, inputs = Outputs.of(described), Inputs.of(described)
    if _is_base_itself(where, described):
        net, info = load_base(where)
        net = with_outputs(net, info, outputs)
        arguments = info.arguments | ({} if outputs is None else {"out_channels": len(outputs.rows)})
        return with_inputs(net, info.network, arguments, inputs)[0], Served.of(info.record)
    require_trusted(described["network"], described["arguments"], header.path)
    net = build_from_start(described["network"], described["arguments"])
    try:
        load_checkpoint(net, where, outputs=outputs)
    except SegraftError as error:
        raise SegraftError(
            f"{header.path} was trained on a base with fingerprint {header.fingerprint[:16]}, and {where} is no such "
            f"base: {error}"
        ) from error
    net, _ = with_inputs(net, described["network"], described["arguments"], inputs)
    return net.eval(), Served.by_weights(where)


def require_base_of(header: AdapterHeader, path: Path) -> None:
    """Refuse a file that is not the base that an adapter was trained on.

    Where the adapter took the base as it is, the headers tell; else the base is built as the adapter's record says.

    Args:
        header: of the adapter.
        path: of a base file.

    Raises:
        SegraftError: it is another, or cannot be built; the adapter does not say what its base is.
    """
    described = header.record["base"] if base_file_of(header, path) else {}
    if Outputs.of(described) is None and Inputs.of(described) is None and _is_base_itself(path, described):
        found = read_base(path).fingerprint
    else:
        found = adapters.fingerprint(load_base_of(header, path)[0])
    if found != header.fingerprint:
        raise adapters.BaseMismatchError(
            f"the adapter was trained on a base with fingerprint {header.fingerprint[:16]}, and that of {path} is "
            f"{found[:16]}: get the base that it was trained on."
        )


def _is_base_itself(path: Path, described: Mapping[str, Any]) -> bool:
    """Whether a file is the base that an adapter's record describes, and not weights that another network was given."""
    if path.name != FILE_NAME and not holds_base(path):
        return False
    info = read_base(path)
    built = (described["network"], described["arguments"])
    return not holds_encoder(info.record) and (info.network, info.arguments) == built


def base_file_of(header: AdapterHeader, base: str | os.PathLike[str] | None, *, option: str = "--base") -> Path:
    """The file that the weights of an adapter's base are in.

    Args:
        header: of the adapter.
        base: where it is, if not where the adapter's record says.
        option: of the command by which a user says so, for the message.

    Raises:
        SegraftError: the adapter file does not say what its base is, or it is not found.
    """
    described = header.record.get("base")
    if not isinstance(described, dict) or not {"network", "arguments", "path"} <= set(described):
        raise SegraftError(
            f"{header.path} does not name its base network: it was saved from Python without a record, so load it "
            "there with segraft.load."
        )
    if base is not None and scheme_of(str(base)):
        return open_base(str(base)).weights
    where = Path(base) if base is not None else (header.path.parent / described["path"])
    if where.is_dir():
        where /= FILE_NAME
    if not where.is_file():
        raise SegraftError(f"the base of {header.path} is not at {where}: say where it is with {option}.")
    return where


def build_from(network: str, arguments: Mapping[str, Any]) -> nn.Module:
    """`build` with the channels among the arguments."""
    rest = dict(arguments)
    channels = {name: rest.pop(name) for name in ("in_channels", "out_channels")}
    return build(network, **channels, arguments=rest)


def build_from_start(network: str, arguments: Mapping[str, Any], *, seed: int = START_SEED) -> nn.Module:
    """The same with random weights that are the same each time, and leave the global generator as it was.

    What weights from elsewhere do not hold stays at this start, and an adapter knows its base by a fingerprint of all:
    a base always starts from `START_SEED`.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # of the CPU alone, where networks are built
    try:
        return build_from(network, arguments)
    finally:
        torch.set_rng_state(before)


def with_outputs(net: nn.Module, info: Base, outputs: Outputs | None) -> nn.Module:
    """The network of a base file with the outputs that a task takes of it.

    Raises:
        SegraftError: its outputs cannot be exchanged.
    """
    if outputs is None:
        return net
    rebuilt = build_from_start(info.network, info.arguments | {"out_channels": len(outputs.rows)})
    return take_outputs(net, info.arguments["out_channels"], rebuilt, outputs)


def with_inputs(
    net: nn.Module, network: str, arguments: Mapping[str, Any], inputs: Inputs | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """The network of a base for the channels of a task's images, and the keys of the weights that see them.

    Args:
        net: plain, with all its weights.
        network: by which it was built.
        arguments: likewise.
        inputs: channels that it shall take; None: its own, and then there are no keys.

    Raises:
        SegraftError: its channels cannot be exchanged.
    """
    if inputs is None:
        return net, ()
    if hasattr(net, "image_channels"):
        raise SegraftError(
            f"{type(net).__name__} encodes its channels one by one, and is built for as many as there are: leave "
            "--inputs out, and give it the weights of a network for one channel."
        )
    rest, count = dict(arguments), len(inputs.rows)
    takes, outputs = rest.pop("in_channels"), rest.pop("out_channels")
    rebuilt = build_from_start(network, {**arguments, "in_channels": count})
    if takes == count:
        other = outline(network, in_channels=takes + 1, out_channels=outputs, arguments=rest)
        keys = input_weights(net, other, (takes, takes + 1))
    else:
        keys = input_weights(net, rebuilt, (takes, count))
    if any(name.startswith("swinViT") for name, _ in net.named_children()):
        from segraft.networks.swin import merge_as_before, merges_as_before

        if merges_as_before(net):  # as the weights that were loaded told
            merge_as_before(rebuilt)
    return take_inputs(net, rebuilt, keys, inputs), keys


def image_channels(described: Mapping[str, Any]) -> int:
    """How many channels the images of an adapter have, by the record of its base."""
    inputs = Inputs.of(described)
    return int(described["arguments"].get("in_channels", 1)) if inputs is None else len(inputs.rows)


def named_as_loaded(
    net: nn.Module, network: str, arguments: Mapping[str, Any], loaded: Loaded
) -> tuple[str, dict[str, Any]]:
    """By which name and arguments a network is built again that computes as `net` does after weights were loaded.

    Raises:
        SegraftError: it cannot be built so.
    """
    if not loaded.original_merging:
        return network, dict(arguments)
    from segraft.networks.swin import named_as_before

    return named_as_before(net, network, arguments)


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


def _untrained(record: Mapping[str, Any]) -> list[str]:
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


def _model(
    net: nn.Module,
    path: Path,
    record: Mapping[str, Any],
    channels: int,
    *,
    adapted_on: Served,
    pretrained_on: Served,
) -> Model:
    task = task_of(path, record, channels)
    return Model(net.eval(), task.labels, task.preparation, adapted_on, pretrained_on, path, task.channels)
