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
from segraft.data.channels import Files, Scan, numbered, plain
from segraft.data.checks import check_scan, require_channels
from segraft.data.cohort import Case
from segraft.data.labels import Labels
from segraft.data.preparation import prepare_scan
from segraft.data.scan_preparation import ScanPreparation
from segraft.errors import SegraftError
from segraft.exchange.opening import open_base, require_no_fold, scheme_of
from segraft.inference import AVERAGING, label_map, sliding_scores
from segraft.jobs.bases import build_from_start, image_channels, load_base_of
from segraft.jobs.cases import Served
from segraft.jobs.locating import file_in, holds_base, read_adapter
from segraft.jobs.preparing import require_same_channels, takes_missing_channels
from segraft.jobs.task import task_of, untrained_words
from segraft.networks import load_base, load_checkpoint, read_base
from segraft.networks.bases import FILE_NAME
from segraft.networks.encoder_files import require_segmenting
from segraft.networks.heads import PickedOutputs
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
            parts = "; ".join(untrained_words(record))
            raise SegraftError(
                f"{path} cannot segment by itself, as parts of it start at random ({parts}): adapt it first."
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
