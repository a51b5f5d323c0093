"""Weights from elsewhere: read without running code, recognised by their keys, and never loaded in part unnoticed."""

import pickle
import re
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from segraft.errors import SegraftError
from segraft.networks.differences import in_words, untold
from segraft.networks.heads import Head, Outputs, find_head, head_rows, match_outputs, require_head
from segraft.networks.layouts import CONTAINERS, NEVER_RUN, OWN, PREFIXES, Layout, known_labels, recognise
from segraft.networks.starting import left_at_start, untrained_notes
from segraft.structures import same_name

if TYPE_CHECKING:
    from segraft.networks.bases import Base

BASE_FILE = "base.safetensors"
"""What is meant by a folder of weights."""

_SCALAR: Any = np.float64(0).__reduce__()[0]

DATA_ONLY: tuple[Any, ...] = (
    Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.bool_)),
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # where NumPy 1 has it
)
"""What pickles may hold beside what torch takes for data: a training's arguments, and scores as NumPy numbers.

Their making runs no code of the file's choosing.
"""


@dataclass(frozen=True)
class Loaded:
    """What was loaded from a checkpoint.

    Attributes:
        path: of the file.
        layout: its kind; empty for a state dict under the network's own keys.
        tensors: how many were loaded.
        unused: group -> how many tensors stayed in the file.
        kept: part of the network -> how many tensors stayed at their start, as the file lacks them.
        layers: that stayed at their start, as they see all channels of the image, and in the file its only one.
        reshaped: key -> shape in the file and in the network, of the head.
        outputs: which of the file's outputs each of the network's takes; None: by position.
        original_merging: the network now computes as MONAI before 1.5 (see `segraft.networks.swin`).
        remarks: further sentences for the user.
    """

    path: Path
    layout: str
    tensors: int
    unused: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    outputs: Outputs | None = None
    original_merging: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def untrained(self) -> tuple[str, ...]:
        """Parts and layers of the network that start at random; of the head `outputs` says more."""
        return (*(part for part in self.kept if part not in ("head", NEVER_RUN)), *self.layers)

    def notes(self, labels: Sequence[str] = (), fresh: Collection[int] = ()) -> tuple[str, ...]:
        """All of it in sentences, with the names of the network's outputs where they are given; see `output_notes`."""
        what = f"{self.path.name} ({self.layout})" if self.layout else self.path.name
        text = f"{what}: {self.tensors} tensors loaded"
        if self.unused:
            text += f", left in the file: {_counted(self.unused)}"
        if self.kept:
            text += f", not in the file and at their start: {_counted(self.kept)}"
        if self.layers:
            text += f", for one channel in the file and at their start: {', '.join(self.layers)}"
        return (f"{text}.", *self.remarks, *untrained_notes(self.untrained), *output_notes(self.outputs, labels, fresh))


def output_notes(outputs: Outputs | None, labels: Sequence[str], fresh: Collection[int] = ()) -> list[str]:
    """Which labels take outputs of a base, in sentences; those at the places `fresh` were asked to start new."""
    if outputs is None or not labels:
        return []
    taken = [label for label, row in zip(labels, outputs.rows, strict=True) if row is not None]
    asked = [labels[place] for place in outputs.new if place in fresh]
    new = [labels[place] for place in outputs.new if place not in fresh]
    notes = []
    if taken:
        notes.append(f"outputs of the base that go on under their names: {', '.join(taken)}.")
    if taken and outputs.background is not None:
        notes.append("the background's output is taken off the others, as the base's outputs were those of a softmax.")
    if asked:
        notes.append(f"outputs that start new, as asked for: {', '.join(asked)}.")
    if new:
        notes.append(f"outputs that start new, as the base has none of their names: {', '.join(new)}.")
    return notes


def position_notes(whose: str, names: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """That outputs of a base go on under other names, as many and in their order, in a sentence."""
    cure = "let them start new with --new-labels, if they are of another kind"
    if not labels:
        return ()
    if not names:
        known = (
            f"what the outputs of {whose} stand for is not known, so they go on as {', '.join(labels)}, in this order"
        )
        return (f"{known}: say so with --base-labels if they are others; {cure}.",)
    other = [f"{old} as {new}" for old, new in zip(names, labels, strict=True) if same_name(old) != same_name(new)]
    return (f"outputs of {whose} that go on under other names: {', '.join(other)}; {cure}.",) if other else ()


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds for a network.

    Attributes:
        layout: its kind; empty for a state dict under the network's own keys.
        outputs: of its head; 0 where it has none, or where the network names no part `head` to find it by.
        names: of those, where they are known.
    """

    layout: str
    outputs: int
    names: tuple[str, ...]


def contents(net: nn.Module, path: str | Path) -> Contents:
    """What a checkpoint holds for a network like `net`, with any number of outputs.

    Raises:
        SegraftError: missing, unreadable, or of another network.
    """
    return _read(net, weights_file(path))[1]


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Load a state dict into `net`, all of it.

    Args:
        net: the network, changed in place.
        path: `.safetensors`, or a PyTorch checkpoint: a state dict, or a dictionary that holds one under one of
            `CONTAINERS`. A prefix that all keys share (`module.`, `net.`) is taken off.

    Raises:
        SegraftError: missing, unreadable, a pickle with more than data in it, or keys and shapes that do not fit.
    """
    path, wanted = weights_file(path), net.state_dict()
    tensors = unprefixed(read_tensors(path), wanted)
    _refuse_misfits(net, path, tensors, wanted, may_miss=())
    net.load_state_dict(tensors)


def load_checkpoint(
    net: nn.Module,
    path: str | Path,
    *,
    labels: Sequence[str] = (),
    names: Sequence[str] = (),
    outputs: Outputs | None = None,
    fresh: AbstractSet[int] = frozenset(),
) -> Loaded:
    """Load weights of any of the known kinds into `net`, and say what was loaded.

    Args:
        net: the network, plain, changed in place. Where the file does not hold all of it, what is left keeps its start:
            build it from a fixed seed.
        path: as in `load_weights`.
        labels: of the network's outputs, by which they take those of the file; none: by position.
        names: of the file's outputs, or one word of `KNOWN_LABELS`; none: as the file's kind has them.
        outputs: which of them to take, as an earlier call reported it; then neither labels nor names count.
        fresh: places of the labels whose outputs start new, whatever the file has.

    Raises:
        SegraftError: as `load_weights`, for all that the file's kind must hold; or outputs that do not fit.
    """
    path, wanted = weights_file(path), net.state_dict()
    layout, found, used, unused = _read(net, path)
    start = left_at_start(net, wanted, used, layout)
    used = {key: value for key, value in used.items() if key not in start.layers}
    base = _base_at(path)
    head = find_head(net)
    in_head = frozenset(head.keys if head else ())
    known = known_labels(names) or found.names
    if outputs is None:
        missing = bool(in_head) and in_head <= start.keys
        outputs = _matched(net, path, labels, known, found.outputs, missing=missing, fresh=fresh)
        by_position = () if outputs else position_notes(path.name, known, labels)
    else:
        by_position = ()
    _refuse_misfits(net, path, used, wanted, may_miss=start.keys, but=in_head if outputs else (), base=base)
    reshaped = {key: (tuple(used[key].shape), tuple(wanted[key].shape)) for key in sorted(in_head & set(used))}
    loaded = len(used)
    if outputs is not None:
        used |= head_rows(_settled_head(net, path, outputs, found.outputs), used, wanted, outputs)
    net.load_state_dict({**{key: wanted[key] for key in start.keys}, **used})
    original, remarks = _merging(net, layout, base)
    remarks = (*remarks, *start.remarks, *untold(net, used, base))
    if found.outputs and outputs is not None and outputs.new and not known:
        text = (
            f"what its {found.outputs} outputs stand for is not known: name them with --base-labels to go on with them."
        )
        remarks = (*remarks, text)
    return Loaded(
        path,
        layout.name,
        loaded,
        unused,
        dict(Counter(start.parts.values())),
        tuple(dict.fromkeys(start.layers.values())),
        {key: (theirs, ours) for key, (theirs, ours) in reshaped.items() if theirs != ours},
        outputs,
        original,
        (*remarks, *by_position),
    )


def _read(net: nn.Module, path: Path) -> tuple[Layout, Contents, dict[str, Tensor], dict[str, int]]:
    """A file's kind, what it holds, its tensors by the network's keys, and how many of each group have no place there.

    Raises:
        SegraftError: missing, unreadable, or of another network.
    """
    wanted = net.state_dict()
    tensors = read_tensors(path)
    adopted = getattr(net, "adopted", None)  # of a network that holds the file's
    tensors = adopted(tensors) if adopted else unprefixed(tensors, wanted)
    layout = recognise(tensors)
    if layout.encoder.key not in wanted and tensors.keys() <= wanted.keys():
        layout = OWN  # of an encoder for just that encoder
    if layout is not OWN and layout.encoder.key not in wanted:
        raise SegraftError(
            f"{path} holds a {layout.of} ({layout.name}), and the network is {type(net).__name__}: "
            f"{layout.encoder.cure}."
        )
    used: dict[str, Tensor] = {}
    unused: Counter[str] = Counter()
    for key, value in tensors.items():
        name, group = layout.renamed(key), layout.group(key)
        if name in wanted or group is None:
            used[name] = value
        else:
            unused[group] += 1
    head = find_head(net)
    outputs = 0 if head is None or head.keys[0] not in used else used[head.keys[0]].shape[0]
    known = layout.outputs or _names_in(_base_at(path))
    names = known if len(known) == outputs else ()
    return layout, Contents(layout.name, outputs, names), used, dict(unused)


def _base_at(path: Path) -> "Base | None":
    """What a file says of itself that is a base of Segraft, and so knows more than its tensors.

    Raises:
        SegraftError: parts of it were never trained, which its tensors do not tell.
    """
    from segraft.networks.bases import read_base

    try:
        base = read_base(path) if path.suffix == ".safetensors" else None
    except SegraftError:
        return None
    if base is not None and base.record.get("untrained"):
        raise SegraftError(f"{path} is a base of which parts were never trained: give it as --base, without --weights.")
    return base


def _names_in(base: "Base | None") -> tuple[str, ...]:
    return () if base is None else tuple(str(name) for name in base.record.get("labels", {}).values())


def weights_file(path: str | Path) -> Path:
    """The file that is meant: of a folder its base file."""
    return Path(path) / BASE_FILE if Path(path).is_dir() else Path(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, on the CPU, its keys as they are.

    Raises:
        SegraftError: missing, unreadable, a pickle with more than data in it, or no state dict in it.
    """
    if not path.is_file():
        raise SegraftError(f"{path} does not exist: give a file of weights (.safetensors, .pt, .pth).")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise SegraftError(f"{path} is not a readable safetensors file ({error}): is it complete?") from error
    content = unpickled(path)
    for key in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise SegraftError(f"{path} holds no state dict: save the network's state_dict() alone.")
    return content


def unprefixed(tensors: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Without the prefixes that all keys share and those of the network do not."""
    wanted, found = list(wanted), dict(tensors)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in found) and not all(key.startswith(prefix) for key in wanted):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found


def unpickled(path: Path) -> Any:
    """What a file of torch.save holds, on the CPU, as long as it is data alone.

    Raises:
        SegraftError: unreadable, or a pickle with more than data in it.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(DATA_ONLY)):
            # Of a pickle that is refused anyway torch also says that its protocol is unusual.
            warnings.filterwarnings("ignore", message=".*pickle protocol.*")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        named = f" ({blocked[1]})" if blocked else ""
        raise SegraftError(
            f"{path} is not loaded, as it is damaged or holds pickled objects besides tensors{named}, which could run "
            "code: save its state_dict alone (or as .safetensors) where you trust it, such as with "
            f"torch.save(torch.load({path.name!r}, weights_only=False)['state_dict'], 'weights.pt')."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise SegraftError(f"{path} is not a readable PyTorch checkpoint: is it complete?") from error


def _matched(
    net: nn.Module,
    path: Path,
    labels: Sequence[str],
    names: Sequence[str],
    in_file: int,
    *,
    missing: bool,
    fresh: AbstractSet[int],
) -> Outputs | None:
    """Which outputs of the file the labels take."""
    if missing:
        return Outputs((None,) * require_head(net).outputs)
    if (names and labels) or fresh:
        require_head(net)
    if not labels or not in_file:
        return None
    try:
        return match_outputs(labels, names, in_file, fresh)
    except SegraftError as error:
        raise SegraftError(f"{path}: {error}") from error


def _settled_head(net: nn.Module, path: Path, outputs: Outputs, in_file: int) -> Head:
    head = require_head(net, len(outputs.rows))
    rows = [row for row in (*outputs.rows, outputs.background) if row is not None]
    if rows and max(rows) >= in_file:
        raise SegraftError(f"{path} has {in_file} outputs, none with the number {max(rows)}: is it the file it was?")
    return head


def _refuse_misfits(
    net: nn.Module,
    path: Path,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    may_miss: Iterable[str],
    but: Iterable[str] = (),
    base: "Base | None" = None,
) -> None:
    """Refuse keys and shapes that are not those of the network; of `but` the first dimension may differ.

    Also refuse a base with another ViT, although of the same shapes.
    """
    missing, unexpected = set(wanted) - set(tensors) - set(may_miss), set(tensors) - set(wanted)
    exempt = {key for key in but if key in tensors and tensors[key].shape[1:] == wanted[key].shape[1:]}
    both = (set(wanted) & set(tensors)) - exempt
    reshaped = {key for key in both if tensors[key].shape != wanted[key].shape}
    problems = [
        f"{len(keys)} tensors {what}, such as {min(keys)}"
        for what, keys in (("are missing", missing), ("are unexpected", unexpected), ("have another shape", reshaped))
        if keys
    ]
    problems = in_words(net, tensors, wanted, base, misfit=bool(problems)) + problems
    if problems:
        raise SegraftError(f"the weights in {path} do not fit {type(net).__name__}: {'; '.join(problems)}.")


def _merging(net: nn.Module, layout: Layout, base: "Base | None") -> tuple[bool, tuple[str, ...]]:
    """Let a SwinUNETR compute as its weights were trained, where that is known, and say so."""
    if not any(name.startswith("swinViT") for name, _ in net.named_children()):
        return False, ()
    from segraft.networks.swin import (
        built_as_before,
        how_to_merge_as_before,
        merge_as_before,
        merges_as_before,
        merges_as_now,
    )

    if layout is not OWN or (base is not None and built_as_before(base.network, base.arguments)):
        merge_as_before(net)
        if merges_as_before(net):
            return True, ("its tokens are joined as by MONAI before 1.5, with which it was trained.",)
        return False, ("its tokens are joined as the argument downsample says, and not as it was trained.",)
    if base is not None or not merges_as_now(net):
        return False, ()
    remark = (
        "tokens are joined as by MONAI since 1.5; weights trained before, such as those published for BTCV, compute as "
        f"they were trained {how_to_merge_as_before(net)}."
    )
    return False, (remark,)


def _counted(groups: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in groups.items())
