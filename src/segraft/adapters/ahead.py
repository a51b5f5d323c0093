"""What the layers of a network compute with, prepared for all of them when the first one of a training pass runs.

A preparation is a few dozen small operations. Between two convolutions, which leave none of their code and data in any
cache, they take twice as long as all of them in a row; and so do their gradients, which autograd takes last for what
was made first.

What a pass will run is what the last one ran. A layer that this does not hold for prepares by itself; what was prepared
in vain is let go by the next pass.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from segraft.adapters.caching import optimiser_steps

Made = TypeVar("Made")
Made_co = TypeVar("Made_co", covariant=True)

ENOUGH_IN_VAIN = 256
"""After so many more preparations in vain than others nothing is prepared ahead any more: a layer may run twice in each
pass, which looks like the start of another one."""


class Call(Protocol[Made_co]):
    """How a layer is called. Calls are equal if they prepare the same of the same tensors."""

    @property
    def layer(self) -> Hashable:
        """Which it is."""
        ...

    def sources(self) -> Sequence[Tensor]:
        """What it is prepared of, now; nothing where that is gone."""
        ...

    def scaling(self) -> float | None:
        """Of the edit, now."""
        ...

    def prepare(self) -> Made_co:
        """What the layer computes with, now."""
        ...


@dataclass(frozen=True, slots=True)
class _State(Generic[Made]):
    """A call and all that its preparation came of."""

    call: Call[Made]
    sources: Sequence[Tensor]
    versions: Sequence[tuple[int, int, bool]]
    scaling: float | None
    steps: int

    @classmethod
    def of(cls, call: Call[Made]) -> "_State[Made]":
        sources = call.sources()
        versions = [
            (tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version, tensor.requires_grad)
            for tensor in sources
        ]
        return cls(call, sources, versions, call.scaling(), optimiser_steps())

    def is_still(self, other: "_State[Any]") -> bool:
        """Whether a preparation in the other state serves in this one."""
        alike = self.call == other.call and self.scaling == other.scaling and self.steps == other.steps
        return alike and self.versions == other.versions and all(map(_is, self.sources, other.sources))

    def places(self) -> list[tuple[int, int]]:
        """Which tensors these are, and where they lie."""
        return [(id(tensor), address) for tensor, (address, *_) in zip(self.sources, self.versions, strict=True)]


def _is(one: object, other: object) -> bool:
    return one is other


class Course(Generic[Made]):
    """The layers that a network's last training pass ran, in order, and what is prepared for this one.

    It is nothing that a copy of the network, or a file, would have to hold.
    """

    def __init__(self) -> None:
        self._ran: dict[Hashable, tuple[Call[Made], list[tuple[int, int]]]] = {}
        self._ready: dict[Hashable, tuple[_State[Made], Made]] = {}
        self._in_vain = 0

    def __reduce__(self) -> tuple[type["Course[Made]"], tuple[()]]:
        return Course, ()

    def take(self, call: Call[Made]) -> Made:
        """What a layer that is called so computes with, for this call alone."""
        if self._in_vain >= ENOUGH_IN_VAIN:
            return call.prepare()
        if call.layer in self._ran:
            self._begin()
        state, (before, made) = _State.of(call), self._ready.pop(call.layer, (None, None))
        self._ran[call.layer] = call, state.places()
        if made is None or before is None:
            return call.prepare()
        serves = state.is_still(before)
        self._in_vain = max(0, self._in_vain + (-1 if serves else 1))
        return made if serves else call.prepare()

    def _begin(self) -> None:
        """A new pass: prepare what the last one ran."""
        self._in_vain += len(self._ready)
        planned, self._ran, self._ready = self._ran, {}, {}
        if self._in_vain >= ENOUGH_IN_VAIN:
            return
        for layer, (call, places) in planned.items():
            state = _State.of(call)
            # Weights that were moved since, or that are gathered for each layer's own turn, are not there yet.
            if state.sources and state.places() == places:
                self._ready[layer] = state, call.prepare()
