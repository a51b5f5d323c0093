"""Which labels the outputs of a bundle's network are, and which values its masks have."""

from collections.abc import Sequence
from typing import Any

from segraft.data.labels import Labels
from segraft.errors import SegraftError
from segraft.exchange.bundle_config import Config
from segraft.exchange.bundle_entries import REGIONS, VALUES
from segraft.exchange.bundle_postprocessing import Activation, require_values
from segraft.exchange.bundle_preparation import Unlike
from segraft.structures import same_name

BACKGROUNDS = ("background", "everything else", "other", "bg")


def labels_of(
    names: Sequence[str], count: int, activation: Activation, config: Config
) -> tuple[Labels, bool, tuple[str, ...]]:
    """Value in masks -> name, whether the first output is the background's, and notes.

    Raises:
        SegraftError: outputs and postprocessing do not fit together.
    """
    notes = []
    first = bool(names) and same_name(names[0]) in BACKGROUNDS and not config.has(VALUES)
    background = first if activation.exclusive is None else activation.exclusive
    if activation.exclusive is False and first:
        raise SegraftError(
            f"{config.path} cuts each output off by itself, and the first is {names[0]!r}: an output for the "
            "background goes with softmax or argmax in its postprocessing."
        )
    if background and count == 1:
        raise SegraftError(f"{config.path} chooses among the outputs of a network that has one: is it a sigmoid?")
    if not names:
        names = ("background", *(f"label {place}" for place in range(1, count))) if background else ()
        names = names or tuple(f"label {place}" for place in range(1, count + 1))
        notes.append("the bundle's metadata does not name the outputs, so they have numbers.")
    elif background and not first:
        notes.append(f"its first output ({names[0]}) is the background, as masks have 0 there.")
    become = activation.values
    if background:
        return Labels({become.get(at, at): name for at, name in enumerate(names[1:], start=1)}), True, tuple(notes)
    painted = {output: become.get(value, value) for output, value in activation.painted}
    if config.has(VALUES) and (config.has(REGIONS) or not painted):
        return _recorded(names, painted, config), False, tuple(notes)
    if count > 1 and painted:
        order = list(painted)
        covers = {painted[output]: tuple(painted[each] for each in order[at:]) for at, output in enumerate(order)}
        inside = " > ".join(names[output] for output in order)
        notes.append(f"outputs are regions one inside the other, as masks are painted ({inside}).")
        return Labels({painted[output]: names[output] for output in range(count)}, covers), False, tuple(notes)
    if count > 1:
        notes.append("outputs may overlap; a mask shows at each voxel the one of the largest probability.")
    values = [painted.get(at, become.get(at + 1, at + 1)) for at in range(count)]
    return Labels(dict(zip(values, names, strict=True))), False, tuple(notes)


def _recorded(names: Sequence[str], painted: dict[int, int], config: Config) -> Labels:
    """As Segraft wrote them beside the transforms.

    Raises:
        SegraftError: they are no values of masks, or do not fit the outputs and how masks are painted.
    """
    values, regions = config.value(VALUES), config.value(REGIONS) if config.has(REGIONS) else {}
    try:
        _require_fit(values, regions, painted, len(names))
    except Unlike as error:
        raise SegraftError(f"{config.path} does not fit together ({error}): export it again.") from error
    return Labels(dict(zip(values, names, strict=True)), {int(value): covers for value, covers in regions.items()})


def _require_fit(values: Any, regions: Any, painted: dict[int, int], count: int) -> None:
    if not isinstance(values, list) or len(values) != count:
        raise Unlike(f"{VALUES} is {values} for {count} outputs")
    require_values(values)
    if not isinstance(regions, dict) or not all(isinstance(covers, list) and covers for covers in regions.values()):
        raise Unlike(f"{REGIONS} is {regions}")
    for covers in regions.values():
        require_values(covers)
    if painted and [painted[at] for at in range(count)] != values:
        raise Unlike(f"masks are not painted with its {VALUES}")
    if list(regions) != list(map(str, painted.values())):
        raise Unlike(f"masks are not painted in the order of its {REGIONS}")
