"""Composed tensors kept while nothing they were composed of has changed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
import torch.utils.dlpack
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from segraft.adapters.edits import Edit

T = TypeVar("T")

PLACES, IN_A_ROW = 32, 16
"""So many values of a tensor are compared, in rows at so many places: what costs time is not how many there are, but
the places, as each is a wait for memory that is in no cache."""


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> numbers of as many that NumPy knows."""


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor as it was when something was composed of it.

    Attributes:
        alias: shares its memory and its version; holding it keeps another tensor from getting the same address.
        address: of its memory.
        shape: of it.
        version: counts what was written to it in place.
        sample: bytes of values spread over it, on the CPU: writing through `.data` or NumPy, as moving averages of
            weights do, counts no version. Elsewhere comparing would wait for the device. Not as a tensor: of all that
            `is_still` does, torch's own comparison took longest, as its code is in no cache.
        values: a copy of these.
    """

    alias: Tensor
    address: int
    shape: torch.Size
    version: int
    sample: memoryview | None = None
    values: bytes = b""

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """What `tensor` is now."""
        alias = tensor.detach()
        version = -1 if tensor.is_inference() else tensor._version
        wrapped = type(alias).__torch_dispatch__ is not Tensor.__torch_dispatch__
        if alias.device.type != "cpu" or wrapped or alias.is_neg() or alias.is_conj():
            return cls(alias, alias.data_ptr(), alias.shape, version)
        sample = _bytes_spread_over(alias.as_subclass(Tensor))
        return cls(alias, alias.data_ptr(), alias.shape, version, sample, sample.tobytes())

    def is_still(self, tensor: Tensor) -> bool:
        """Whether `tensor` is what it was."""
        try:
            version = tensor._version
        except RuntimeError:
            return False  # made in inference mode, which counts no versions
        return (
            version == self.version
            and tensor.data_ptr() == self.address
            and tensor.shape == self.shape
            and (self.sample is None or self.sample.tobytes() == self.values)
        )


def _bytes_spread_over(tensor: Tensor) -> memoryview:
    """The memory of so many places of a tensor on the CPU, as it lies; of a small one or one with gaps, of all."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    dense = reach == tensor.numel() - 1  # in any order, such as channels last
    spare = tensor.numel() - IN_A_ROW
    if dense and spare > (PLACES - 1) * IN_A_ROW:
        tensor = tensor.as_strided((PLACES, IN_A_ROW), (spare // (PLACES - 1), 1))
    alike = BITS.get(tensor.itemsize)  # NumPy has no bfloat16
    tensor = tensor if alike is None else tensor.view(alike)
    # As another storage of the same memory: that of an array can never be resized again, as sharding does.
    return torch.utils.dlpack.from_dlpack(tensor).numpy().data


@dataclass(frozen=True, slots=True)
class Found:
    """What says which edits a layer has.

    Attributes:
        active: names of the adapters, in their order.
        held: the dictionaries of adapters and of their edits, each with what was in it.
    """

    active: tuple[str, ...]
    held: tuple[tuple[dict[str, Any], list[tuple[str, Any]]], ...]

    @classmethod
    def of(cls, active: tuple[str, ...], holders: Iterable[dict[str, Any]]) -> Self:
        """As it is now."""
        return cls(active, tuple((holder, list(holder.items())) for holder in holders))


@dataclass(frozen=True, slots=True)
class Composed:
    """A composed tensor and all it came from.

    Attributes:
        value: W.
        version: of `value`, in case somebody writes to it.
        optimiser_steps: of any optimiser until then: fused ones write without counting a version.
        base: W0.
        scalings: of the edits, each with the dictionary it is held in.
        found: how these were found.
        sources: the tensors of the edits, with where each is held and under which name.
    """

    value: Tensor
    version: int
    optimiser_steps: int
    base: Source
    scalings: tuple[tuple[dict[str, Any], float | None], ...]
    found: Found
    sources: tuple[tuple[dict[str, Any], str, Source], ...]

    @classmethod
    def compose(cls, base: Tensor, edits: Sequence[Edit], found: Found) -> Self:
        """Compose, without a graph; what it is composed of is looked at before, so that a change meanwhile shows.

        Args:
            base: W0.
            edits: in their order.
            found: how these were found, as it was before they were.
        """
        with torch.inference_mode(mode=False), torch.no_grad():
            steps, source = _STEPS[0], Source.of(base)
            scalings = tuple((edit.__dict__, edit.__dict__.get("scaling")) for edit in edits)
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
        return cls(value, value._version, steps, source, scalings, found, sources)

    def is_current(self, base: Tensor, active: tuple[str, ...]) -> bool:
        """Whether composing again, on this W0 under these adapters, would give `value` again."""
        if (
            self.value._version != self.version
            or self.found.active != active
            or self.optimiser_steps != _STEPS[0]
            or not self.base.is_still(base)
        ):
            return False
        for holder, scaling in self.scalings:
            if holder.get("scaling") != scaling:
                return False
        for holder, present in self.found.held:
            if list(holder.items()) != present:
                return False
        for holder, name, source in self.sources:
            tensor = holder[name]
            if tensor is None or not source.is_still(tensor):
                return False
        return True


@dataclass(frozen=True, slots=True)
class Derived:
    """What one frozen weight [o, i, …] gives, such as its norm.

    Attributes:
        sources: the weight, and a value of each of its channels on either side: nothing else would notice a filter that
            was overwritten.
        values: by name and whatever else they depend on.
    """

    sources: tuple[Source, ...]
    values: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """Nothing yet of the weight as it is now."""
        return cls(tuple(Source.of(each) for each in _with_channels(weight)))

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight is what it was."""
        return all(source.is_still(each) for source, each in zip(self.sources, _with_channels(weight), strict=True))

    def get(self, key: Any, make: Callable[[], T]) -> T:
        """The value of this name, made when first asked for."""
        if key not in self.values:
            with torch.inference_mode(mode=False), torch.no_grad():
                self.values[key] = make()
        found: T = self.values[key]
        return found


def _with_channels(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first = (slice(0, 1),) * (weight.ndim - 2)
    # Two of the other side: with a gap between them, so that all are compared.
    return weight, weight[(slice(None), slice(0, 2), *first)], weight[(slice(0, 2), slice(None), *first)]


_STEPS = [0]


def _count_step(*_: Any) -> None:
    _STEPS[0] += 1


register_optimizer_step_post_hook(_count_step)
