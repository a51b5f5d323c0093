"""What the outputs of a bundle's network stand for, and which values its masks have."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segraft.data.labels import Labels
from segraft.errors import SegraftError
from segraft.exchange.bundle_config import Config
from segraft.structures import same_name

LEFT_OUT = ("KeepLargestConnectedComponent", "FillHoles", "RemoveSmallObjects", "LabelFilter", "MeanEnsemble")
BACKGROUNDS = ("background", "everything else", "other", "bg")
VALUES = "label_values"
"""Entry of the bundles that Segraft writes: the value in masks of each output."""

SCORES, PROBABILITIES = "scores", "$torch.nn.Sequential(@network, torch.nn.Sigmoid())"
"""Another one: what is averaged where patches overlap, the network's logits or these."""


@dataclass(frozen=True)
class Activation:
    """What a bundle's postprocessing makes of the outputs.

    Attributes:
        exclusive: one of the outputs is chosen at each voxel, the first of them for the background; None: not said.
        painted: (output, value) in the order in which masks are painted, where outputs may overlap.
        notes: what Segraft does otherwise.
    """

    exclusive: bool | None
    painted: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()


def activation_of(config: Config, place: str | None) -> Activation:
    """What the transforms at a place make of the outputs.

    Raises:
        SegraftError: softmax and sigmoid at once.
    """
    composed = config.followed(config.raw(place)) if place else None
    listed = config.followed(composed.get("transforms")) if isinstance(composed, Mapping) else None
    steps = [each for each in map(config.followed, listed or ()) if isinstance(each, Mapping)]
    exclusive: bool | None = None
    softmax, sigmoid = _says(steps, config, "softmax"), _says(steps, config, "sigmoid")
    if softmax and sigmoid:
        raise SegraftError(
            f"{config.path} has softmax and sigmoid in its {place}: leave the one that is not meant out."
        )
    if softmax or _says(steps, config, "argmax"):
        exclusive = True
    elif sigmoid or _says(steps, config, "threshold"):
        exclusive = False
    names = [str(step.get("_target_", "")).rpartition(".")[2] for step in steps]
    notes = [f"{name} of its postprocessing is left out." for name in names if name.startswith(LEFT_OUT)]
    functions = [step.get("func") for step in steps if str(step.get("_target_", "")).startswith("Lambda")]
    painted = next((order for order in map(painting_of, functions) if order), ())
    if any(_true(config, step.get("nearest_interp")) for step in steps):
        notes.append(
            "here probabilities, not masks, are brought back to the scan's grid, which makes smoother borders."
        )
    return Activation(exclusive, painted, tuple(notes))


def labels_of(
    names: Sequence[str], count: int, activation: Activation, config: Config
) -> tuple[Labels, bool, tuple[str, ...]]:
    """Value in masks -> name, whether the first output is the background's, and notes.

    Raises:
        SegraftError: outputs and postprocessing do not fit together.
    """
    notes = []
    first = bool(names) and same_name(names[0]) in BACKGROUNDS
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
    if background:
        return Labels(dict(enumerate(names[1:], start=1))), True, tuple(notes)
    painted = dict(activation.painted)
    if count > 1 and painted.keys() == set(range(count)) and len(set(painted.values())) == count:
        order = list(painted)
        covers = {painted[output]: tuple(painted[each] for each in order[at:]) for at, output in enumerate(order)}
        inside = " > ".join(names[output] for output in order)
        notes.append(f"outputs are regions one inside the other, as masks are painted ({inside}).")
        return Labels({painted[output]: names[output] for output in range(count)}, covers), False, tuple(notes)
    if count > 1 and not config.has(VALUES):
        notes.append("outputs may overlap; a mask shows at each voxel the one of the largest probability.")
    values = _values(config, count)
    return Labels(dict(zip(values, names, strict=True))), False, tuple(notes)


def _values(config: Config, count: int) -> list[int]:
    values = config.value(VALUES) if config.has(VALUES) else None
    fits = isinstance(values, list) and len(values) == count and all(isinstance(value, int) for value in values)
    return list(values) if isinstance(values, list) and fits else list(range(1, count + 1))


def painting_of(function: Any) -> tuple[tuple[int, int], ...]:
    """(output, value) in the order of painting, of `$lambda x: torch.where(x[[2]] > 0, 4, torch.where(…, 0))`.

    The expression is looked at, not run; empty where it is of another form.
    """
    try:
        tree = ast.parse(str(function).removeprefix("$").strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError):
        return ()
    node: ast.AST = tree.body if isinstance(tree, ast.Lambda) else tree
    order = []
    while True:
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="torch"), attr="where"),
                args=[
                    ast.Compare(
                        left=ast.Subscript(value=ast.Name(), slice=place),
                        ops=[ast.Gt() | ast.GtE()],
                        comparators=[ast.Constant()],
                    ),
                    ast.Constant(value=int(value)),
                    rest,
                ],
            ):
                output = place.elts[0] if isinstance(place, ast.List) and len(place.elts) == 1 else place
                if not (isinstance(output, ast.Constant) and isinstance(output.value, int)):
                    return ()
                order.append((output.value, value))
                node = rest
            case ast.Constant(value=0):
                return tuple(reversed(order))
            case _:
                return ()


def _says(steps: Sequence[Mapping[str, Any]], config: Config, name: str) -> bool:
    return any(_true(config, step.get(name)) for step in steps)


def _true(config: Config, value: Any) -> bool:
    """Of an argument that is one value, or a list with one for each key."""
    try:
        value = config.resolve(value)
    except SegraftError:
        return False
    return any(bool(each) for each in value) if isinstance(value, list) else bool(value)
