"""Heads for other labels: which outputs of a base a task's labels take, and rows for those that it has none for."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from segraft.adapters.selection import modules_by_name, parts_of
from segraft.errors import SegraftError
from segraft.structures import same_name

START_SEED = 0
"""Of everything that a base starts at random, so that whoever rebuilds it gets the same fingerprint."""

BACKGROUND = "background"


@dataclass(frozen=True)
class Outputs:
    """Which output of a base each label takes.

    Attributes:
        rows: for each label the base's output, or None where it starts new.
        background: the output that a softmax has for the background. It is taken off the others: their sigmoid is then
            at least 0.5 just where the softmax prefers them to the background, so both give the same mask.
    """

    rows: tuple[int | None, ...]
    background: int | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self | None:
        """What the record of a base says; None where outputs map by position."""
        rows = record.get("outputs")
        return None if rows is None else cls(tuple(rows), record.get("background"))

    def record(self) -> dict[str, Any]:
        """JSON values, for `of`."""
        known = {} if self.background is None else {"background": self.background}
        return {"outputs": list(self.rows), **known}

    @property
    def new(self) -> tuple[int, ...]:
        """Places of the labels that start new."""
        return tuple(place for place, row in enumerate(self.rows) if row is None)


def match_outputs(
    labels: Sequence[str], names: Sequence[str], count: int, fresh: AbstractSet[int] = frozenset()
) -> Outputs | None:
    """Let labels take the outputs of their names.

    Args:
        labels: of the task.
        names: of the base's outputs; none means they are not known.
        count: how many outputs the base has.
        fresh: places of the labels that start new, whatever the base has.

    Returns:
        None where outputs map by position: no name is the same and there are as many, or all are the same in order.

    Raises:
        SegraftError: two outputs of the base have one name, or there are not as many names as outputs.
    """
    if names and len(names) != count:
        raise SegraftError(
            f"{len(names)} labels of the base are named, but it has {count} outputs: name each, in order."
        )
    known: dict[str, int] = {}
    for place, name in enumerate(names):
        if known.setdefault(same_name(name), place) != place:
            raise SegraftError(f"two outputs of the base are named {name!r}: name each differently.")
    background = known.pop(BACKGROUND, None)
    rows = tuple(known.get(same_name(label)) for label in labels)
    taken = [row for row in rows if row is not None]
    if background is None and len(rows) == count and (not taken or taken == list(range(count))):
        if not fresh:
            return None
        rows = tuple(range(count))
    return Outputs(tuple(None if place in fresh else row for place, row in enumerate(rows)), background)


@dataclass(frozen=True)
class Head:
    """The last layer of a network.

    Attributes:
        layer: its name.
        keys: of its tensors in the state dict, whose first dimension is the outputs.
        outputs: how many.
    """

    layer: str
    keys: tuple[str, ...]
    outputs: int


def find_head(net: nn.Module) -> Head | None:
    """The last layer of the network's part `head`, grafted or not.

    None where the network names no such part, or where it does not end in a convolution or a linear layer.
    """
    prefixes = parts_of(net).get("head", ())
    layers = [
        (name, module)
        for module, (name, *_) in modules_by_name(net).items()  # without what is grafted on
        if module._parameters and any(name == p or name.startswith(p + ".") for p in prefixes)  # noqa: SLF001
    ]
    if not layers:
        return None
    name, layer = layers[-1]
    weight, outputs = (
        getattr(layer, "weight", None),
        getattr(layer, "out_channels", getattr(layer, "out_features", None)),
    )
    if not isinstance(weight, Tensor) or weight.ndim < 2 or weight.shape[0] != outputs:  # transposed, grouped, none
        return None
    keys = [f"{name}.{tensor}" for tensor, value in layer._parameters.items() if value is not None]  # noqa: SLF001
    return Head(name, tuple(keys), weight.shape[0])


def require_head(net: nn.Module, outputs: int | None = None) -> Head:
    """The last layer of the network's part `head`.

    Args:
        net: plain.
        outputs: how many it must have.

    Raises:
        SegraftError: there is none whose outputs can be told apart, or it has another number.
    """
    head, name = find_head(net), type(net).__name__
    if head is None:
        raise SegraftError(
            f"the outputs of {name} cannot be exchanged, as it names no part 'head' that ends in a convolution or "
            "linear layer: ask for as many labels as it has outputs."
        )
    if outputs is not None and head.outputs != outputs:
        raise SegraftError(
            f"{name} has {head.outputs} outputs in its layer {head.layer!r}, not {outputs}: it does not follow the "
            "argument out_channels, so ask for as many labels as it has outputs."
        )
    return head


def head_rows(
    head: Head, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], outputs: Outputs
) -> dict[str, Tensor]:
    """The tensors of a head that takes its rows from another.

    What starts new is uniform in ±1/√fan-in, as torch starts a convolution, from a generator of its own: the same
    each time, whatever else is drawn.

    Args:
        head: of the new network.
        tensors: the old network's, by the same keys; those of the head may be missing where all rows are new.
        like: the new network's, for shapes and types.
        outputs: rows to take.
    """
    generator = torch.Generator().manual_seed(START_SEED)
    fan_in = like[head.keys[0]][0].numel()
    made: dict[str, Tensor] = {}
    for key in head.keys:
        value = torch.empty(like[key].shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        for place, row in enumerate(outputs.rows):
            if row is not None:
                value[place] = tensors[key][row]
                if outputs.background is not None:
                    value[place] -= tensors[key][outputs.background].to(value)
        made[key] = value.to(like[key])
    return made


def take_outputs(net: nn.Module, count: int, rebuilt: nn.Module, outputs: Outputs) -> nn.Module:
    """Give a network built for other labels all weights of one, and the rows of its head that `outputs` says.

    Args:
        net: the one, plain, with `count` outputs.
        count: of its outputs.
        rebuilt: the same network with as many outputs as there are labels, changed in place.
        outputs: rows to take.

    Raises:
        SegraftError: a network whose outputs cannot be exchanged.
    """
    require_head(net, count)
    head, tensors, like = require_head(rebuilt, len(outputs.rows)), net.state_dict(), rebuilt.state_dict()
    made = {**tensors, **head_rows(head, tensors, like, outputs)}
    other = [key for key in like if key not in made or made[key].shape != like[key].shape]
    if other or len(made) != len(like):
        raise SegraftError(
            f"{type(net).__name__} has more that depends on its outputs than its last layer "
            f"({min(other or set(made) - set(like))}): ask for as many labels as it has outputs."
        )
    rebuilt.load_state_dict(made)
    return rebuilt


def untrained_outputs(net: nn.Module, head: Head, places: AbstractSet[int]) -> list[int]:
    """Of some outputs of a grafted network those whose weights nothing trained can move.

    By gradients, so that it holds for every adapter: factors at their start move a row, a frozen row is moved by none.
    """
    layer: Any = net.get_submodule(head.layer)
    with torch.enable_grad():
        weight: Tensor = layer.weight  # composed with what is grafted on
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        if not weight.requires_grad or not trained:
            return sorted(places)
        generator, still = torch.Generator().manual_seed(START_SEED), []
        for place in sorted(places):
            row = weight[place]
            direction = torch.randn(row.shape, generator=generator).to(row)
            moved = torch.autograd.grad(row, trained, direction, retain_graph=True, allow_unused=True)
            if not any(gradient is not None and bool(gradient.any()) for gradient in moved):
                still.append(place)
    return still


class PickedOutputs(nn.Module):
    """A network of which only some outputs are looked at.

    Args:
        net: maps [B, C, …] to logits [B, L, …].
        places: of those, in order.
    """

    def __init__(self, net: nn.Module, places: Sequence[int]) -> None:
        super().__init__()
        self.net, self.places = net, list(places)

    def forward(self, image: Tensor) -> Tensor:
        """The logits of the outputs picked."""
        logits: Tensor = self.net(image)
        return logits[:, self.places]
