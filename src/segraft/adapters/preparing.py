"""What an adapted layer computes with in one call, made of its base weight and of the factors of its trained edit."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from segraft.adapters.caching import Derived, Source
from segraft.adapters.choosing import Way
from segraft.adapters.composing import compose
from segraft.adapters.edits import LowRank
from segraft.adapters.functions import AdaptedLayer, Plan
from segraft.adapters.grafted import base_tensor, grafts_of, is_grafted
from segraft.adapters.layers import channel_norm
from segraft.adapters.operators import Operator
from segraft.adapters.parallel import ParallelLayer
from segraft.adapters.stages import SPREAD, SPREAD_BESIDE, chain, matrices


@dataclass(frozen=True, slots=True)
class Prepared:
    """For one call.

    Attributes:
        plan: of the call.
        function: that the call is differentiated by.
        weight: W, or W0 where the update runs beside it.
        norm: of V, or of W0, [channels]; with a magnitude.
        m: magnitudes [channels] or None.
        left: of `Matrices`, where gradients reach the factors through it.
        right: of `Matrices`, likewise.
        kernels: of the stages.
    """

    plan: Plan
    function: type[AdaptedLayer] | type[ParallelLayer]
    weight: Tensor
    norm: Tensor | None
    m: Tensor | None
    left: Tensor | None
    right: Tensor | None
    kernels: Sequence[Tensor]

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        y: Tensor = self.function.apply(  # type: ignore[no-untyped-call]
            self.plan, x, bias, self.weight, self.norm, self.m, self.left, self.right, *self.kernels
        )
        return y


def prepare(
    layer: nn.Module, operator: Operator, way: Way, base: Tensor, edit: LowRank, dtype: torch.dtype
) -> Prepared:
    """For `layer`, whose weight is `base` under the edits before the trained one.

    Args:
        layer: grafted.
        operator: of the layer.
        way: of executing it.
        base: W0.
        edit: the trained one.
        dtype: of the activations.
    """
    beside, links = way == "parallel", chain(edit.contraction)
    in_graph = way == "weight" or edit.m is not None
    factors, update, norm = edit.scaled_factors(), None, None
    if in_graph or not beside:
        # The matrices need no graph where only the chain takes gradients to the factors.
        with torch.set_grad_enabled(in_graph):
            update = matrices(edit.contraction, factors, SPREAD_BESIDE if beside else SPREAD)
    left, right = (update.left, update.right) if update is not None and in_graph else (None, None)
    stages = links.stages if way != "weight" else ()
    kernels = links.kernels(factors) if stages else []
    plan = Plan(operator, stages, edit.slot, edit.magnitude_dim, () if update is None else update.held)
    weight = base.detach()
    if update is None or beside:
        norm = None if edit.m is None else _norm_of(layer, weight, edit)
        return Prepared(plan, ParallelLayer, weight, norm, edit.m, left, right, kernels)
    with torch.no_grad():
        weight, norm = compose(base, update, edit.m, edit.slot, edit.magnitude_dim)
        weight = weight.to(dtype)
    return Prepared(plan, AdaptedLayer, weight, norm, edit.m, left, right, kernels)


def _norm_of(layer: nn.Module, base: Tensor, edit: LowRank) -> Tensor:
    """‖W0‖ [o], looked at once."""
    kept = grafts_of(layer).derived.get("weight")
    if kept is None or not kept.source.is_still(base):
        with torch.inference_mode(mode=False), torch.no_grad():
            kept = Derived(Source.of(base), channel_norm(base, edit.slot, edit.magnitude_dim))
        grafts_of(layer).derived["weight"] = kept
    return kept.value


@dataclass(frozen=True, slots=True)
class Call:
    """How a layer with one edit alone is called: what of it can be prepared before it is.

    Attributes:
        layer: not held.
        edit: the trained one, not held.
        operator: of the layer.
        way: of executing it.
        dtype: of the activations.
    """

    layer: weakref.ref[nn.Module]
    edit: weakref.ref[LowRank]
    operator: Operator
    way: Way
    dtype: torch.dtype

    def sources(self) -> tuple[Tensor, ...]:
        """What it is prepared of; nothing where the layer or the edit is gone."""
        layer, edit = self.layer(), self.edit()
        if layer is None or edit is None or not is_grafted(layer):
            return ()
        held = (*edit._parameters.values(), *edit._buffers.values())
        return base_tensor(layer, "weight"), *(tensor for tensor in held if tensor is not None)

    def scaling(self) -> float | None:
        """Of the edit."""
        edit = self.edit()
        return None if edit is None else edit.scaling

    def prepare(self) -> Prepared:
        """As the layer and the edit are now, which both are there."""
        layer, edit = self.layer(), self.edit()
        assert layer is not None  # noqa: S101
        assert edit is not None  # noqa: S101
        return prepare(layer, self.operator, self.way, base_tensor(layer, "weight"), edit, self.dtype)
