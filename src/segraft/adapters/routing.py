"""Which channel each block of a folded batch belongs to, for adapters with a set of factors per channel.

    with routed([0, 2, 3]):
        states = encoder(folded)    # [3·B, …]: channel 0's B volumes, then channel 2's, then channel 3's

`execution` asks for it where a layer with such an adapter runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from segraft.errors import SegraftError


@dataclass(frozen=True, eq=False)
class Route:
    """One `with routed(…)` block: the channels of its blocks, in order. Two blocks are two routes."""

    channels: tuple[int, ...]


_KEY = "segraft_route"

_ROUTE: ContextVar[Route | None] = ContextVar(_KEY, default=None)
_RESUMED: ContextVar[Route | None] = ContextVar(f"{_KEY}_resumed", default=None)


@contextmanager
def routed(channels: Sequence[int]) -> Iterator[None]:
    """Within the `with` block, inputs of adapted layers are folded: equal consecutive blocks, one per channel named.

    Args:
        channels: block j along the first dimension is of channel `channels[j]`, from 0. Whatever a network splits off
            the batch (windows, tokens) stays in its block, if the channel is the outermost.

    Raises:
        SegraftError: no channels, or something that is no channel.
    """
    found = tuple(channels)
    if not found or not all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in found):
        raise SegraftError(f"routed({list(found)}): name the channel of every block, as whole numbers from 0.")
    token = _ROUTE.set(Route(found))
    try:
        yield
    finally:
        _ROUTE.reset(token)


class Resumed(AbstractContextManager[None]):
    """Within the `with` block, layers are of the route that was there when this was made.

    For a recomputation that knows which pass it recomputes, as those of `training.recomputation` do.
    """

    def __init__(self) -> None:
        self.route = _RESUMED.get() or _ROUTE.get()
        self.tokens: list[Token[Route | None]] = []

    def __enter__(self) -> None:
        self.tokens.append(_RESUMED.set(self.route))

    def __exit__(self, *_error: object) -> None:
        _RESUMED.reset(self.tokens.pop())


class Passes:
    """The routes of a layer's forward passes whose activations are dropped and recomputed in the backward pass.

    A recomputation happens outside the `with` block, on a GPU even in another thread. So the graph of such a pass holds
    its route, and what is recomputed is of a pass whose graph is still there, unless it is `Resumed`.
    """

    def __init__(self) -> None:
        self.alive: WeakSet[Route] = WeakSet()

    def __reduce__(self) -> tuple[type["Passes"], tuple[()]]:
        """A copy of the layer has no graphs."""
        return Passes, ()

    def remember(self, output: Tensor, route: Route) -> None:
        """A forward pass gave `output`."""
        if output.grad_fn is not None and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # noqa: FBT003
            held: Any = output.grad_fn.metadata  # as annotated by torch, a method
            held[_KEY] = route
            self.alive.add(route)

    def route(self) -> Route | None:
        """The route of the pass that runs now; None outside `routed`.

        Raises:
            SegraftError: it is recomputed, and could be of several passes.
        """
        if (resumed := _RESUMED.get()) is not None:
            return resumed
        if torch._C._current_graph_task_id() == -1 or not self.alive:
            return _ROUTE.get()
        first, *others = self.alive
        if any(other.channels != first.channels for other in others):
            raise SegraftError(
                "a layer with adapters per channel recomputes its activations, and the graphs of several passes with "
                "other channels are there: call backward after each forward pass, and let go of its result."
            )
        return first
