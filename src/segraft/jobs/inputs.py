"""Which channels of a base those of a cohort take, and what follows for how scans are prepared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from segraft.data.channels import plain
from segraft.data.cohort import Cohort
from segraft.data.preparation import Percentiles
from segraft.errors import SegraftError
from segraft.jobs.preparing import require_same_channels, require_same_order
from segraft.networks.checkpoints import read_tensors, unprefixed, weights_file
from segraft.networks.inputs import Inputs, input_weights, match_inputs
from segraft.networks.layouts import recognise
from segraft.networks.registry import outline

P = TypeVar("P")
"""Some preparation of scans, or None."""

CURE = (
    "choose a base of as many, list as many there, or let the first layers take other channels with --inputs share "
    "(docs/heads-and-inputs.md)"
)


def settle_inputs(
    takes: int, names: Sequence[str], cohort: Cohort, start: str | None, who: str
) -> tuple[Inputs | None, tuple[str, ...]]:
    """Which channels of a base a cohort's take, and what the user should know of it.

    Args:
        takes: channels of the base.
        names: of these, where they are known.
        cohort: of the images.
        start: of channels that are new, a key of `STARTS`; None: the cohort must have as many as the base.
        who: the base, for messages.

    Raises:
        SegraftError: the cohort's channels are others, and `start` does not allow it; what `match_inputs` refuses.
    """
    channels = cohort.channels
    if start is None:
        require_same_channels(takes, channels, who, str(cohort.path), CURE)
        require_same_order(names, channels, who, str(cohort.path))
    inputs = None
    if start is not None:
        try:
            inputs = match_inputs([plain(name) for name in channels], [plain(name) for name in names], takes, start)
        except SegraftError as error:
            raise SegraftError(f"{who}: {error}") from error
    return inputs, tuple(_notes(inputs, names, channels))


def _notes(inputs: Inputs | None, names: Sequence[str], channels: Sequence[str]) -> list[str]:
    if inputs is None:
        other = [
            f"{old} as {new}" for old, new in zip(names, channels, strict=False) if old and plain(old) != plain(new)
        ]
        if not other or len(channels) == 1:
            return []
        cure = "tell channels apart by name with --inputs share, if they are of another kind"
        return [f"channels of the base that go on under other names: {', '.join(other)}; {cure}."]
    told = [name or f"channel {place}" for place, name in enumerate(channels)]
    kept = [name for name, row in zip(told, inputs.rows, strict=True) if row is not None]
    left = [name or f"channel {place}" for place, name in enumerate(names) if place not in inputs.rows]
    notes = []
    if kept:
        notes.append(f"channels of the base that go on under their names: {', '.join(kept)}.")
    if left:
        notes.append(f"channels of the base that the scans have not got by name: {', '.join(left)}.")
    if inputs.new:
        new = ", ".join(told[place] for place in inputs.new)
        notes.append(f"channels that the base has not got by name, and that start with --inputs {inputs.start}: {new}.")
    return notes


def channels_held(network: str, arguments: Mapping[str, Any], weights: str | Path) -> int | None:
    """How many channels weights from elsewhere are for; None where that cannot be told.

    Raises:
        SegraftError: weights that are not readable, or a network that cannot be built.
    """
    rest = dict(arguments)
    channels, outputs = rest.pop("in_channels"), rest.pop("out_channels")
    net, other = (
        outline(network, in_channels=count, out_channels=outputs, arguments=rest) for count in (channels, channels + 1)
    )
    tensors = unprefixed(read_tensors(weights_file(weights)), net.state_dict())
    layout = recognise(tensors)
    shapes = {layout.renamed(key): value.shape for key, value in tensors.items()}
    try:
        keys = input_weights(net, other, (channels, channels + 1))
    except SegraftError:
        return None
    found = {shapes[key][1] for key in keys if key in shapes and len(shapes[key]) > 1}
    return found.pop() if len(found) == 1 else None


def prepared_for(preparation: P, inputs: Inputs | None) -> P:
    """A base's preparation for the channels of a task: each that goes on keeps its setting.

    A new one has the intensity that all of the base's channels have, else percentiles; where nnU-Net prepares them, a
    z-score, which is what it gives channels that are no CT.
    """
    settings: Any = preparation
    if inputs is None or settings is None:
        return preparation
    changed: dict[str, Any] = {}
    each = getattr(settings, "intensity", None)
    if isinstance(each, tuple):
        new = each[0] if len(set(each)) == 1 else Percentiles()
        found = tuple(new if row is None else each[row] for row in inputs.rows)
        changed["intensity"] = found if len(found) > 1 else found[0]
    each = getattr(settings, "normalization", None)
    if isinstance(each, tuple):
        score = type(each[0])(scheme="ZScoreNormalization")
        changed["normalization"] = tuple(score if row is None else each[row] for row in inputs.rows)
    prepared: P = settings.model_copy(update=changed)
    return prepared
