"""Composed tensors kept while nothing they were composed of has changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from segraft.adapters.edits import Edit


@dataclass(frozen=True)
class Source:
    """One tensor as it was when something was composed of it.

    Attributes:
        alias: shares its memory and its version; holding it keeps another tensor from getting the same address.
        version: counts what was written to it in place.
        values: a copy, for the small tensors of an adapter on the CPU: writing through `.data` or NumPy counts no
            version. Elsewhere comparing would wait for the device.
    """

    alias: Tensor
    version: int
    values: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, *, small: bool) -> Self:
        """What `tensor` is now."""
        alias = tensor.detach()
        return cls(alias, tensor._version, alias.clone() if small and alias.device.type == "cpu" else None)

    def is_still(self, tensor: Tensor) -> bool:
        """Whether `tensor` is what it was."""
        return (
            tensor._version == self.version
            and tensor.data_ptr() == self.alias.data_ptr()
            and tensor.dtype == self.alias.dtype
            and tensor.device == self.alias.device
            and tensor.stride() == self.alias.stride()
            and (self.values is None or torch.equal(tensor, self.values))
        )


@dataclass(frozen=True)
class Composed:
    """A composed tensor and all it came from.

    Attributes:
        value: W.
        version: of `value`, in case somebody writes to it.
        base: W0.
        edits: in the order in which they were applied, each with its scaling.
        sources: the tensors of the edits.
    """

    value: Tensor
    version: int
    base: Source
    edits: tuple[tuple[Edit, float | None], ...]
    sources: tuple[Source, ...]

    @classmethod
    def compose(cls, base: Tensor, edits: Sequence[Edit]) -> Self:
        """Compose, without a graph; what it is composed of is looked at before, so that a change meanwhile shows."""
        with torch.inference_mode(mode=False), torch.no_grad():
            source = Source.of(base, small=False)
            sources = tuple(Source.of(tensor, small=edit.is_small) for edit in edits for tensor in edit.parameters())
            value = base
            for edit in edits:
                value = edit(value)
            value = value.to(base.dtype)
        return cls(value, value._version, source, _named(edits), sources)

    def is_current(self, base: Tensor, edits: Sequence[Edit]) -> bool:
        """Whether composing these again would give `value` again."""
        if self.value._version != self.version or self.edits != _named(edits) or not self.base.is_still(base):
            return False
        tensors = [tensor for edit in edits for tensor in edit.parameters()]
        return all(source.is_still(tensor) for source, tensor in zip(self.sources, tensors, strict=True))


def _named(edits: Sequence[Edit]) -> tuple[tuple[Edit, float | None], ...]:
    return tuple((edit, getattr(edit, "scaling", None)) for edit in edits)
