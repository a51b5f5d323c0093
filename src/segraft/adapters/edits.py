"""What an adapter does to one tensor of one layer: a module that maps the tensor to its adapted value."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from segraft.adapters.composing import compose
from segraft.adapters.formulas import contraction, initial_factors, unit_factors
from segraft.adapters.layers import WeightSlot, channel_norm, composing_dtype
from segraft.adapters.spec import Gate
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

    With `channel` it is one of several, for that channel's block of a folded batch alone (`routing`).

    With a gate, `v` [R] weighs the R directions of ΔW (ARENA, AdaLoRA); a direction of weight zero is not in use.

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
        gate: Gate = "none",
        channel: int | None = None,
    ) -> None:
        super().__init__(slot.weight)
        self.channel = channel
        self.slot, self.rank, self.scaling, self.rows = slot, rank, scaling, rows
        self.initial_rank = rank
        self.factorisation, self.magnitude_dim = factorisation, magnitude_dim
        base = self._block(weight.detach()).to(composing_dtype(weight.dtype))
        self.contraction = contraction(factorisation, base.ndim - 2)
        drawn = unit_factors if gate == "zero" else initial_factors
        for name, value in zip(
            self.contraction.names, drawn(self.contraction, tuple(base.shape), rank, generator), strict=True
        ):
            self.register_parameter(name, nn.Parameter(value.to(base)))
        self.v: nn.Parameter | None = None
        if gate != "none":
            weights = torch.empty(rank).uniform_(-1, 1, generator=generator) if gate == "uniform" else torch.zeros(rank)
            self.v = nn.Parameter(weights.to(base))
        self.m = nn.Parameter(channel_norm(base, slot, magnitude_dim)) if magnitude else None

    def _block(self, weight: Tensor) -> Tensor:
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]

    def factors(self) -> list[Tensor]:
        """The factors, in the order of the formula."""
        return [getattr(self, name) for name in self.contraction.names]

    def scaled_factors(self) -> list[Tensor]:
        """The factors in at least float32, the first multiplied by scaling and gate (and not the large product)."""
        first, *others = (factor.to(composing_dtype(factor.dtype)) for factor in self.factors())
        if self.v is not None:
            letters, bottleneck = self.contraction.factors[0], self.contraction.bottleneck
            first = first * self.v.to(first.dtype).view([-1 if letter == bottleneck else 1 for letter in letters])
        return [self.scaling * first, *others]

    def sides(self) -> tuple[Tensor, Tensor]:
        """Both sides of the directions without gate and scaling, [R, …] each: ΔW = Σ_r v[r] · left[r] ⊗ right[r]."""
        first, *others = (factor.to(composing_dtype(factor.dtype)) for factor in self.factors())
        product, bottleneck = others[-1], self.contraction.bottleneck
        for step, factor in zip(self.contraction.steps[:-1], reversed(others[:-1]), strict=True):
            product = torch.einsum(step, factor, product)
        letters = self.contraction.steps[-1].split("->")[0].split(",")
        left, right = (
            side.movedim(names.index(bottleneck), 0).flatten(1)
            for side, names in zip((first, product), letters, strict=True)
        )
        return left, right

    def in_use(self) -> Tensor:
        """Indices of the directions whose gate is not zero; without a gate, all."""
        if self.v is None:
            return torch.arange(self.rank)
        return self.v.detach().nonzero().flatten()

    def of_directions(self, directions: Tensor) -> dict[str, Tensor]:
        """Factors and gate, by name, of some of the directions alone; not copies where all are asked for."""
        held = dict(zip(self.contraction.names, self.contraction.factors, strict=True))
        bottleneck = self.contraction.bottleneck
        if self.v is not None:
            held["v"] = bottleneck
        if len(directions) == self.rank:
            return {name: getattr(self, name) for name in held}
        return {
            name: getattr(self, name).index_select(letters.index(bottleneck), directions.to(getattr(self, name).device))
            for name, letters in held.items()
            if bottleneck in letters
        }

    def keep(self, directions: Tensor) -> None:
        """Drop all but some of the directions, for good. An optimiser that holds the factors has to be made anew."""
        for name, value in self.of_directions(directions).items():
            before: nn.Parameter = getattr(self, name)
            self.register_parameter(name, nn.Parameter(value.detach(), requires_grad=before.requires_grad))
        self.rank = len(directions)

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
        rows += "" if self.channel is None else f", channel {self.channel}"
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
