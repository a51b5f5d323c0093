"""What an adapter does to one tensor of one layer: a module that maps the tensor to its adapted value."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from segraft.adapters.composing import channel_norm, compose
from segraft.adapters.formulas import contraction, initial_factors
from segraft.adapters.layers import WeightSlot, composing_dtype
from segraft.adapters.stages import Matrices, matrices


class Edit(nn.Module):
    """Maps the value of the layer's `tensor` to its adapted value.

    Attributes:
        tensor: the attribute of the layer that is edited.
        is_small: its own tensors are small beside the one it edits.
    """

    is_small = True

    def __init__(self, tensor: str) -> None:
        super().__init__()
        self.tensor = tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002  torch's
        """As torch's, but memory formats, which are for weights, pass small tensors by: those may have any rank."""
        small = self.is_small
        super()._apply((lambda tensor: fn(tensor.flatten()).view(tensor.shape)) if small else fn, recurse)  # type: ignore[no-untyped-call]
        return self


class LowRank(Edit):
    """`V = W0 + scaling·ΔW(factors)`, and with a magnitude `m · V/‖V‖` per output channel (DoRA).

    The norm is part of the graph, as in equation 8 of the haemorrhage paper. With the factors at their start the
    result equals W0 bit for bit: ΔW is 0 and m/‖V‖ is a number divided by itself.
    """

    def __init__(
        self,
        slot: WeightSlot,
        weight: Tensor,
        *,
        factorisation: str,
        rank: int,
        scaling: float,
        magnitude: bool,
        magnitude_dim: int | None,
        rows: tuple[int, int] | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__(slot.weight)
        self.slot, self.rank, self.scaling, self.rows = slot, rank, scaling, rows
        self.factorisation, self.magnitude_dim = factorisation, magnitude_dim
        base = self._block(weight.detach()).to(composing_dtype(weight.dtype))
        self.contraction = contraction(factorisation, base.ndim - 2)
        for name, value in zip(
            self.contraction.names,
            initial_factors(self.contraction, tuple(base.shape), rank, generator),
            strict=True,
        ):
            self.register_parameter(name, nn.Parameter(value.to(base)))
        self.m = nn.Parameter(channel_norm(base, slot, magnitude_dim)) if magnitude else None

    def _block(self, weight: Tensor) -> Tensor:
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]

    def factors(self) -> list[Tensor]:
        """The factors, in the order of the formula."""
        return [getattr(self, name) for name in self.contraction.names]

    def scaled_factors(self) -> list[Tensor]:
        """The factors in at least float32, the first multiplied by the scaling (and not the large product)."""
        first, *others = (factor.to(composing_dtype(factor.dtype)) for factor in self.factors())
        return [self.scaling * first, *others]

    def matrices(self) -> Matrices:
        """scaling·ΔW as a product of two matrices."""
        return matrices(self.contraction, self.scaled_factors())

    def delta(self) -> Tensor:
        """scaling·ΔW, shaped as the adapted (block of the) weight."""
        return self.contraction(self.scaled_factors())

    def forward(self, value: Tensor) -> Tensor:
        """The adapted weight, in at least float32."""
        dtype = composing_dtype(value.dtype)
        with torch.autocast(value.device.type, enabled=False):
            adapted, _ = compose(self._block(value), self.matrices(), self.m, self.slot, self.magnitude_dim)
            if self.rows is None:
                return adapted
            start, stop = self.rows
            return torch.cat([value[:start].to(dtype), adapted, value[stop:].to(dtype)])

    def extra_repr(self) -> str:
        """What `print(net)` shows."""
        rows = "" if self.rows is None else f", rows {self.rows[0]}:{self.rows[1]}"
        return f"{self.tensor}{rows}, {','.join(self.contraction.factors)}, R={self.rank}"


class BiasFactor(Edit):
    """`b0 + scaling · Σ_R β[R, o]`: the R×o bias factor that Table 3 of the haemorrhage paper counts."""

    def __init__(self, bias: str, value: Tensor, *, rank: int, scaling: float, rows: tuple[int, int] | None) -> None:
        super().__init__(bias)
        self.scaling, self.rows = scaling, rows
        size = value.shape[0] if rows is None else rows[1] - rows[0]
        self.beta = nn.Parameter(value.new_zeros(rank, size, dtype=composing_dtype(value.dtype)))

    def forward(self, value: Tensor) -> Tensor:
        """The adapted bias, in at least float32."""
        shift = self.scaling * self.beta.sum(0)
        if self.rows is not None:
            shift = nn.functional.pad(shift, (self.rows[0], value.shape[0] - self.rows[1]))
        return value.to(composing_dtype(value.dtype)) + shift


class Replacement(Edit):
    """The tensor trained whole: a copy takes the base's place, the base itself is never written to.

    A buffer (running statistics) is replaced by a buffer, so that in-place updates in training mode land in the copy.
    """

    is_small = False

    def __init__(self, tensor: str, value: Tensor) -> None:
        super().__init__(tensor)
        copy = value.detach().clone(memory_format=torch.preserve_format)
        if isinstance(value, nn.Parameter):
            self.value = nn.Parameter(copy)
        else:
            self.register_buffer("value", copy)

    def forward(self, _value: Tensor) -> Tensor:
        """The copy."""
        return self.value
