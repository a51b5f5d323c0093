"""The functions that adapted and frozen layers are differentiated by; `execution` decides on which."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from segraft.adapters.composing import along, channels_first, contract
from segraft.adapters.kept import Kept
from segraft.adapters.layers import WeightSlot
from segraft.adapters.operators import Operator
from segraft.adapters.packed import Packed
from segraft.adapters.passing import CHANNELS_LAST, Pass
from segraft.adapters.stages import Matrices, Stage


@dataclass(frozen=True)
class Plan:
    """Of one call of one layer.

    Attributes:
        operator: the layer's arithmetic.
        stages: of the chain; empty when the gradient of the whole weight is formed.
        slot: of the weight.
        magnitude_dim: of the spec.
        held: of the two matrices, see `Matrices`.
        packed: the frozen weight as oneDNN wants it for the gradient of the input, where that pays.
    """

    operator: Operator
    stages: tuple[Stage, ...]
    slot: WeightSlot
    magnitude_dim: int | None
    held: tuple[int, ...]
    packed: Packed | None = None

    @property
    def channel_dim(self) -> int:
        """Dimension of the weight that carries the magnitude."""
        return self.slot.channel_dim(self.magnitude_dim)


def outside_autocast(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """`backward` in the precision of its tensors, also within autocast, which was heeded in the forward pass."""

    @wraps(backward)
    def run(ctx: Any, g: Tensor) -> Any:
        device = g.device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, g)
        with torch.autocast(device, enabled=False):
            return backward(ctx, g)

    return run


class AdaptedLayer(torch.autograd.Function):
    """y = x ∗ W + b, differentiated to x, b, m and to the factors in one of their two forms."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        norm: Tensor | None,
        m: Tensor | None,
        left: Tensor | None,
        right: Tensor | None,
        *kernels: Tensor,
    ) -> Tensor:
        """The layer's output.

        Args:
            ctx: of autograd.
            plan: of this call.
            x: input.
            bias: [o] or None.
            weight: W, composed.
            norm: n [channels], with a magnitude.
            m: magnitudes [channels] or None.
            left: of `Matrices`.
            right: of `Matrices`.
            kernels: of the stages.
        """
        y = own(plan.operator.output(x, weight, bias))
        with_output = m is not None and bool(plan.stages)
        ctx.plan, ctx.kept = plan, Kept(y, copied=plan.operator.transposed) if with_output else None
        ctx.save_for_backward(x, bias if with_output else None, weight, norm, m, left, right, *kernels)
        return y

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs."""
        x, bias, weight, norm, m, left, right, *kernels = ctx.saved_tensors
        plan: Plan = ctx.plan
        operator = plan.operator
        needs = ctx.needs_input_grad
        of_m = of_left = of_right = None
        of_kernels: Sequence[Tensor | None] = [None] * len(kernels)
        t, sums = magnitude_product(ctx, g, bias) if m is not None and plan.stages else (None, None)
        of_bias = bias_gradient(operator, g, sums) if needs[2] else None
        if not g.is_contiguous() and channels_first(g) and channels_first(x):
            g = g.contiguous()  # part of the gradient of features beside each other: better copied once than by each
        if plan.stages and (m is None or t is not None):
            # Only now: the output may be gone, which counts at the peak of a step.
            of_x = operator.input_gradient(g, weight, x) if needs[1] else None
            of_kernels = chain_gradients(plan, g, x, kernels, None if m is None else m / norm)
            if m is not None and t is not None:
                of_m = t.to(m.dtype) / divisor(m)
                of_left, of_right = contract(
                    weight.to(left.dtype), Matrices(left, right, plan.held), -of_m / norm, plan.channel_dim
                )
        else:
            of_x, of_weight = operator.gradients(g, x, weight, of_x=needs[1])
            of_m, of_left, of_right = gradients_through_weight(plan, of_weight, weight, norm, m, left, right)
        return None, of_x, of_bias, None, None, of_m, of_left, of_right, *of_kernels


def own(y: Tensor) -> Tensor:
    """`y`, just made, as no view: linear layers flatten tokens, and autograd refuses to write to views of functions."""
    return y.data if y._is_view() else y


def gradients_through_weight(
    plan: Plan, gradient: Tensor, weight: Tensor, norm: Tensor | None, m: Tensor | None, left: Tensor, right: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of the magnitudes and of the two matrices, from the gradient of the whole weight W."""
    gradient, of_m = gradient.to(left.dtype), None
    if m is not None and norm is not None:
        whole, dim = weight.to(gradient), plan.channel_dim
        shape, positions = gradient.shape, gradient.shape[2:].numel()
        if dim == 1:  # as a matrix: sums over the few positions of a kernel between channels are slow
            gradient, whole = gradient.flatten(1), whole.flatten(1)
            of_m = (gradient * whole).sum(0).view(-1, positions).sum(1) / divisor(m)
        else:
            positions = 1
            of_m = (gradient * whole).sum([d for d in range(gradient.ndim) if d != dim]) / divisor(m)
        gain, shrink = (along(each.repeat_interleave(positions), gradient, dim) for each in (m / norm, -of_m / norm))
        gradient = gradient.mul_(gain).addcmul_(whole, shrink).view(shape)
    return of_m, *contract(gradient, Matrices(left, right, plan.held))


def magnitude_product(ctx: Any, g: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The t = Σ g·(y − b) [o] of a layer and Σ g [o], from its kept output, which is let go; None where gone."""
    kept: Kept | None = ctx.kept
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.kept = None  # as autograd frees what it saved
    if kept is None or not kept.is_valid(g):
        return None, None
    return ctx.plan.operator.channel_products(g, kept.y, bias)  # type: ignore[no-any-return]


def bias_gradient(operator: Operator, g: Tensor, sums: Tensor | None) -> Tensor:
    """Σ g [o], unless it is known."""
    return (operator.channel_sum(g) if sums is None else sums).to(g.dtype)


NEXT_TO_ZERO = torch.finfo(torch.float32).eps ** 3
"""A magnitude that nothing can be divided by."""


def divisor(m: Tensor) -> Tensor:
    """The magnitudes [channels], where they are not next to zero; there y − b, and so t, is zero too.

    On a CPU `execution` has looked that none is.
    """
    return m if m.device.type == "cpu" else torch.where(m.abs() > NEXT_TO_ZERO, m, 1.0)


def chain_gradients(plan: Plan, g: Tensor, x: Tensor, kernels: Sequence[Tensor], gain: Tensor | None) -> list[Tensor]:
    """Of the kernels of the chain, from the layer's input and its output's gradient.

    Of a transposed convolution they are those of the convolution that is its adjoint, which maps g to x.
    """
    turned = plan.operator.transposed
    entering, leaving = (g, x) if turned else (x, g)
    run = Pass.of(plan.operator, plan.stages, kernels, entering, gain, gain_enters=turned)
    return run.gradients(leaving, run.inputs(entering))[0]


class FrozenLayer(torch.autograd.Function):
    """y = x ∗ W + b with W frozen: unlike torch's own convolution it does not keep x for a gradient nobody wants."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, x: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
        """The layer's output."""
        ctx.operator, ctx.shape = operator, x.shape
        # The backward pass takes its memory format from the weight, as it has no x.
        last = not channels_first(x)
        ctx.save_for_backward(weight.contiguous(memory_format=CHANNELS_LAST[weight.ndim]) if last else weight)
        return operator.output(x, weight, bias)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of the bias."""
        (weight,) = ctx.saved_tensors
        x = g.new_empty(1).expand(ctx.shape)
        of_x = ctx.operator.input_gradient(g, weight, x) if ctx.needs_input_grad[1] else None
        return None, of_x, ctx.operator.channel_sum(g).to(g.dtype) if ctx.needs_input_grad[2] else None, None
