"""Making a base of weights from elsewhere, such as a published foundation model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from segraft.data.preparation import Preparation
from segraft.errors import SegraftError
from segraft.jobs.bases import build_from_start, named_as_loaded
from segraft.jobs.cases import Served
from segraft.jobs.intensities import by_channel
from segraft.jobs.preparing import check_network, checked
from segraft.jobs.run_folder import RunFolder, versions
from segraft.networks import Loaded, load_checkpoint, save_base
from segraft.networks.bases import FILE_NAME
from segraft.networks.checkpoints import Contents, contents
from segraft.networks.encoder_files import with_sizes
from segraft.networks.heads import BACKGROUND, Outputs, take_outputs
from segraft.networks.layouts import known_labels
from segraft.structures import same_name


@dataclass(frozen=True)
class Imported:
    """Result of `import_base`.

    Attributes:
        path: of the base.
        fingerprint: of its weights.
        labels: number from 1 -> name, in the order of the outputs.
        report: what was loaded.
        notes: the same in sentences.
    """

    path: Path
    fingerprint: str
    labels: dict[int, str]
    report: Loaded
    notes: tuple[str, ...]


def import_base(
    weights: str | Path,
    out: str | Path,
    *,
    network: str,
    network_arguments: Mapping[str, Any] | None = None,
    labels: Sequence[str] = (),
    without_head: Sequence[str] = (),
    preparation: Preparation | Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Imported:
    """Write `out/base.safetensors` from weights of any kind that `segraft.networks.load_checkpoint` reads.

    The base has the outputs of the weights' head, without that of a softmax for the background.

    Args:
        weights: `.safetensors` or a PyTorch checkpoint.
        out: folder to write to.
        network: a key of `segraft.networks.NETWORKS`, or `package.module:Class`.
        network_arguments: further keyword arguments of the network.
        labels: names of the head's outputs, in order, or one word of `segraft.networks.layouts.KNOWN_LABELS`. Where
            their kind has names, also some of these: then only their outputs are taken. Where the weights have no head,
            the names of those that the base shall have, which start at random.
        without_head: the same, for weights that turn out to have no head, where `labels` are none.
        preparation: that the weights were trained with, whole or only the fields that differ from the defaults. None:
            the base does not say how scans are prepared, so it segments only once it is adapted.
        overwrite: replace a base that is there.

    Raises:
        SegraftError: weights that are not readable or do not fit, or names or a preparation that do not; nothing is
            written then.
    """
    weights = Path(weights)
    arguments, taken = with_sizes(network, {"in_channels": 1, "out_channels": 1, **(network_arguments or {})}, weights)
    preparation = by_channel(preparation, None, ("",) * arguments["in_channels"], f"the network {network}")
    settled = preparation if isinstance(preparation, Preparation) else checked(preparation) if preparation else None
    folder = RunFolder(Path(out), FILE_NAME, resume=False, overwrite=overwrite)
    found = contents(build_from_start(network, arguments), weights)
    given = known_labels(labels) or (() if found.outputs else tuple(without_head))
    file_names, wanted = _names(found, given, weights)
    arguments["out_channels"] = len(wanted)
    net: nn.Module = build_from_start(network, arguments)
    loaded = load_checkpoint(net, weights, labels=wanted, names=file_names)
    network, arguments = named_as_loaded(net, network, arguments, loaded)
    notes = (*taken, *loaded.notes(wanted))
    new = () if loaded.outputs is None else loaded.outputs.new
    record: dict[str, Any] = {
        "labels": {str(number): name for number, name in enumerate(wanted, start=1)},
        "imported": {"weights": weights.name, "layout": loaded.layout, "tensors": loaded.tensors},
        "versions": versions(),
        **Served.by_weights(weights).record(),
    }
    if settled is not None:
        check_network(net, settled.patch, len(wanted), arguments["in_channels"])
        record["preparation"] = settled.model_dump(mode="json")
    if loaded.untrained or new:
        record["untrained"] = {"outputs": list(new), "parts": list(loaded.untrained)}
    base = save_base(net, folder.path, network=network, arguments=arguments, record=record)
    return Imported(base.path, base.fingerprint, dict(enumerate(wanted, start=1)), loaded, notes)


def random_base(
    out: str | Path,
    *,
    network: str,
    network_arguments: Mapping[str, Any] | None = None,
    labels: Sequence[str],
    overwrite: bool = False,
) -> Path:
    """Write `out/base.safetensors` with a network that was never trained, the same each time: to train from scratch.

    What weights of an encoder leave as it starts, decoder and head, starts here likewise, so that trainings with and
    without such weights differ in the encoder alone.

    Args:
        out: folder to write to.
        network: a key of `segraft.networks.NETWORKS`, or `package.module:Class`.
        network_arguments: further keyword arguments of the network.
        labels: names of its outputs.
        overwrite: replace a base that is there.

    Returns:
        The path of the base, which can be adapted, but by itself segments nothing.

    Raises:
        SegraftError: the network cannot be built or names no head, or there is a base already.
    """
    folder = RunFolder(Path(out), FILE_NAME, resume=False, overwrite=overwrite)
    arguments = {"in_channels": 1, **(network_arguments or {}), "out_channels": len(labels)}
    start = build_from_start(network, arguments)
    net = take_outputs(start, len(labels), build_from_start(network, arguments), Outputs((None,) * len(labels)))
    record = {
        "labels": {str(number): name for number, name in enumerate(labels, start=1)},
        "untrained": {"outputs": list(range(len(labels))), "parts": [], "random": True},
        "versions": versions(),
    }
    return save_base(net, folder.path, network=network, arguments=arguments, record=record).path


def _names(found: Contents, given: tuple[str, ...], weights: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the outputs of the file, and of those that the base shall have.

    Raises:
        SegraftError: names are missing, or some that the file does not have.
    """
    if not found.outputs:
        if not given:
            raise SegraftError(
                f"{weights} holds no head that can be told in this network: say for which labels the base has outputs."
            )
        return (), given
    if given and len(given) != found.outputs:
        known = {same_name(name) for name in found.names}
        unknown = [name for name in given if same_name(name) not in known]
        if unknown:
            raise SegraftError(
                f"{weights} has {found.outputs} outputs ({', '.join(found.names) or 'of unknown labels'}), and "
                f"{len(given)} labels were named, of which {unknown[0]!r} is none of them: name all outputs, in order."
            )
        return found.names, given
    names = given or found.names or tuple(f"output {number}" for number in range(1, found.outputs + 1))
    return names, tuple(name for name in names if same_name(name) != BACKGROUND)
