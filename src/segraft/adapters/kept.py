"""The output of a layer, kept for the gradient of its magnitude without a copy, though its ReLU overwrites it."""

import threading
import weakref
from typing import Any

from torch import Tensor


class Kept:
    """Shares memory with the output y of an adapted layer; `is_valid` tells whether Σ g·y can still be had from it.

    Saving y the usual way would make autograd refuse the ReLU in place that follows most convolutions, or cost a copy
    of every activation. What ReLU leaves is as good as y: where it cuts y off, g is zero. So one ReLU in place is
    allowed for, recognised in autograd's graph when the next adapted layer runs; anything else that was written to y
    shows in its version.
    """

    def __init__(self, y: Tensor) -> None:
        self.y = y.detach()  # shares the version counter; y itself would be a cycle with its own graph
        self.version = y._version
        self.output: weakref.ref[Tensor] | None = None

    def watch(self, output: Tensor) -> None:
        """The tensor that the layer returned, with its graph."""
        self.output = weakref.ref(output)
        self.version = output._version
        _LAST.kept = self

    def settle(self) -> None:
        """Allow for one ReLU in place since."""
        output = None if self.output is None else self.output()
        if output is None or output._version != self.version + 1 or output.grad_fn is None:
            return
        done: Any = output.grad_fn
        if done.name() == "ReluBackward0" and getattr(done.next_functions[0][0], "kept", None) is self:
            self.version += 1

    def is_valid(self) -> bool:
        """Nothing else was written to y."""
        return self.y._version == self.version


class _Last(threading.local):
    kept: Kept | None = None


_LAST = _Last()


def settle_last() -> None:
    """To be called when the next layer runs: what follows the last one in place has happened by then."""
    if _LAST.kept is not None:
        _LAST.kept.settle()
        _LAST.kept = None
