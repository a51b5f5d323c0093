"""The output of a layer, kept for the gradient of its magnitude without a copy, though its ReLU overwrites it."""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor


class Kept:
    """Shares memory with the output y of an adapted layer; `is_valid` tells whether Σ g·y can still be had from it.

    Saving y the usual way would make autograd refuse the ReLU in place that follows most convolutions, or cost a copy
    of every activation. What ReLU leaves is as good as y if all of g comes through it: where it cuts y off, g is zero
    then. So one ReLU in place is allowed for, recognised in autograd's graph when the next adapted layer runs, if in
    the backward pass g is the very tensor that it hands down: another use of y, or a hook, would have made another one.
    Anything else that was written to y shows in its version.

    The output of a transposed convolution, which U-Nets put beside skipped features at once, is kept by no later layer
    and not for this alone either, but until the next layer runs. From then on the part of that layer's input that is a
    copy of it serves instead, where there is one which that layer keeps.

    Args:
        y: the output.
        copied: whether only a copy of it within the next layer's input is kept.
    """

    def __init__(self, y: Tensor, *, copied: bool = False) -> None:
        self.y: Tensor | None = y.detach()  # shares the version counter; y itself would be a cycle with its own graph
        self.copied = copied
        self.unchanged_copy: tuple[torch.Size, torch.dtype] | None = None
        self.version = y._version
        self.output: weakref.ref[Tensor] | None = None
        self.through_relu = False
        self.handed_down: tuple[Tensor, int] | None = None

    def watch(self, output: Tensor) -> None:
        """The tensor that the layer returned, with its graph."""
        self.output = weakref.ref(output)
        self.version = output._version
        _LAST.kept = weakref.ref(self)

    def settle(self) -> None:
        """Allow for one ReLU in place since, or let go what is to be found in the next layer's input."""
        if self.copied:
            y, self.y = self.y, None
            self.unchanged_copy = None if y is None or y._version != self.version else (y.shape, y.dtype)
            return
        output = None if self.output is None else self.output()
        if output is None or output._version != self.version + 1 or output.grad_fn is None:
            return
        done: Any = output.grad_fn
        if done.name() == "ReluBackward0" and getattr(done.next_functions[0][0], "kept", None) is self:
            self.version += 1
            self.through_relu = True
            me = weakref.ref(self)  # a hook lives as long as the graph

            def remember(inputs: tuple[Tensor | None, ...], _outputs: tuple[Tensor | None, ...]) -> None:
                kept, handed_down = me(), inputs[0]
                if kept is not None and handed_down is not None:
                    kept.handed_down = handed_down, handed_down._version

            done.register_hook(remember)

    def take_from(self, entering: Tensor) -> None:
        """Take the copy out of what enters the next layer and is kept by it, if autograd's graph says it is one."""
        done: Any = entering.grad_fn
        if self.unchanged_copy is None or type(entering) is not Tensor or done is None:
            return
        shape, dtype = self.unchanged_copy
        alike = entering.dtype == dtype and entering.ndim == len(shape) and entering.shape[0] == shape[0]
        if not alike or entering.shape[2:] != shape[2:] or done.name() != "CatBackward0" or entering._version:
            return
        inputs = [getattr(each, "kept", None) is self for each, _ in done.next_functions]
        if sum(inputs) == 1 and (inputs[0] or inputs[-1]):
            start = 0 if inputs[0] else entering.shape[1] - shape[1]
            self.y = entering.detach().narrow(1, start, shape[1])
            self.version = self.y._version

    def is_valid(self, g: Tensor) -> bool:
        """Whether nothing else was written to y, and all of its gradient `g` came through the ReLU, if there is one."""
        handed_down, self.handed_down = self.handed_down, None
        if self.y is None or self.y._version != self.version:
            return False
        if not self.through_relu:
            return True
        return (
            handed_down is not None
            and handed_down[0].data_ptr() == g.data_ptr()
            and handed_down[1] == handed_down[0]._version
        )


class _Last(threading.local):
    kept: weakref.ref[Kept] | None = None


_LAST = _Last()


def settle_last() -> Kept | None:
    """To be called when the next layer runs: what follows the last one in place has happened by then.

    Returns:
        An output of which the next layer's input may hold the copy to be kept.
    """
    last = _LAST.kept
    if last is None:
        return None
    kept = last()
    _LAST.kept = None
    if kept is None:
        return None
    kept.settle()
    return kept if kept.unchanged_copy is not None else None
