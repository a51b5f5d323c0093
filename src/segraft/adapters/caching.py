"""Composed tensors kept while nothing they were composed of has changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from segraft.adapters.edits import Edit

SAMPLE = 512
"""So many values of a tensor are compared: as many as take no time beside a convolution."""

FAR_APART = 64
"""So many where they lie further apart than a page of memory, as each is then a wait of its own."""

PAGE = 1024  # numbers of four bytes


@dataclass(frozen=True)
class Source:
    """One tensor as it was when something was composed of it.

    Attributes:
        alias: shares its memory and its version; holding it keeps another tensor from getting the same address.
        version: counts what was written to it in place.
        sample: values spread over it, on the CPU: writing through `.data` or NumPy, as moving averages of weights do,
            counts no version. Elsewhere comparing would wait for the device.
        values: a copy of these.
    """

    alias: Tensor
    version: int
    sample: Tensor | None = None
    values: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """What `tensor` is now."""
        alias = tensor.detach()
        version = -1 if tensor.is_inference() else tensor._version
        if alias.device.type != "cpu":
            return cls(alias, version)
        reach = sum((size - 1) * step for size, step in zip(alias.shape, alias.stride(), strict=True))
        dense = reach == alias.numel() - 1  # in any order, such as channels last
        count = FAR_APART if alias.numel() > SAMPLE * PAGE else SAMPLE
        sample = alias.as_strided((alias.numel(),), (1,))[:: 1 + alias.numel() // count] if dense else alias
        return cls(alias, version, sample, sample.clone())

    def is_still(self, tensor: Tensor) -> bool:
        """Whether `tensor` is what it was."""
        return (
            not tensor.is_inference()  # which count no versions
            and tensor._version == self.version
            and tensor.data_ptr() == self.alias.data_ptr()
            and tensor.shape == self.alias.shape
            and (self.sample is None or self.values is None or torch.equal(self.sample, self.values))
        )


@dataclass(frozen=True)
class Composed:
    """A composed tensor and all it came from.

    Attributes:
        value: W.
        version: of `value`, in case somebody writes to it.
        optimiser_steps: of any optimiser until then: fused ones write without counting a version.
        base: W0.
        edits: in the order in which they were applied, each with its scaling.
        sources: the tensors of the edits, with where each is held and under which name.
    """

    value: Tensor
    version: int
    optimiser_steps: int
    base: Source
    edits: tuple[tuple[Edit, float | None], ...]
    sources: tuple[tuple[dict[str, Any], str, Source], ...]

    @classmethod
    def compose(cls, base: Tensor, edits: Sequence[Edit]) -> Self:
        """Compose, without a graph; what it is composed of is looked at before, so that a change meanwhile shows."""
        with torch.inference_mode(mode=False), torch.no_grad():
            steps, source = _STEPS[0], Source.of(base)
            sources = tuple(
                (held, name, Source.of(tensor))
                for edit in edits
                for held in (edit._parameters, edit._buffers)
                for name, tensor in held.items()
                if tensor is not None
            )
            value = base
            for edit in edits:
                value = edit(value)
            value = value.to(base.dtype)
        return cls(value, value._version, steps, source, _named(edits), sources)

    def is_current(self, base: Tensor, edits: Sequence[Edit]) -> bool:
        """Whether composing these again would give `value` again."""
        if (
            self.value._version != self.version
            or self.optimiser_steps != _STEPS[0]
            or self.edits != _named(edits)
            or not self.base.is_still(base)
        ):
            return False
        return all(source.is_still(held[name]) for held, name, source in self.sources)


@dataclass(frozen=True)
class Derived:
    """Something that one frozen tensor gives, such as its norm."""

    source: Source
    value: Tensor


_STEPS = [0]


def _count_step(*_: Any) -> None:
    _STEPS[0] += 1


register_optimizer_step_post_hook(_count_step)


def _named(edits: Sequence[Edit]) -> tuple[tuple[Edit, float | None], ...]:
    return tuple((edit, getattr(edit, "scaling", None)) for edit in edits)
