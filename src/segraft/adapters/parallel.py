"""The update beside the frozen weight, y = γ (x ∗ W0 + x ∗ ΔW) + b with ΔW as a chain: W is never composed.

What it saves are passes over the weight, which are what counts where a layer has more weights than activations. With
ΔW = left right as matrices, the norm n in γ = m / n takes one such pass, as does its gradient:

    n² = ‖W0‖² + Σ left · (H + E) per output channel        H = W0 rightᵀ,  E = (W0 + ΔW) rightᵀ = H + left right rightᵀ

Where ΔW nearly cancels W0, n has fewer digits than the composed weight's; an update so large is no longer small.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from segraft.adapters.composing import Layout, by_row, compose
from segraft.adapters.functions import (
    Plan,
    bias_gradient,
    divisor,
    gradients_through_weight,
    magnitude_product,
    outside_autocast,
    own,
)
from segraft.adapters.kept import Kept
from segraft.adapters.narrow import correlation, wide_product
from segraft.adapters.passing import Pass
from segraft.adapters.products import is_traced
from segraft.adapters.stages import SPREAD, Matrices


def norm_of_sum(base: Tensor, base_norm: Tensor, update: Matrices) -> tuple[Tensor, Tensor]:
    """The norm n = ‖W0 + ΔW‖ [o] and E [o·F, ρ]; n is ‖W0‖ bit for bit where ΔW is zero.

    Args:
        base: W0 [o, i, *kernel].
        base_norm: ‖W0‖ [o].
        update: ΔW, scaled.
    """
    spread, itself = update.spread(base.shape, SPREAD), update.right.flatten(1).unsqueeze(0)
    layout = Layout.of(base, spread.held)
    h = correlation(layout.matrix(base).unsqueeze(0), layout.matrix(spread.right).unsqueeze(0))
    h = h.reshape(update.left.shape)
    e = torch.addmm(h, update.left, correlation(itself, itself))
    more = (update.left * (h + e)).view(len(base_norm), -1).sum(1)
    tiny = torch.finfo(base_norm.dtype).tiny
    new = torch.addcmul(more, base_norm, base_norm).clamp_min(0).sqrt()
    # √(n0² + q) as n0 + q / (n0 + n): exact at q = 0.
    return (base_norm + more / (base_norm + new).clamp_min(tiny)).clamp_min(tiny), e


def norm_gradients(base: Tensor, update: Matrices, e: Tensor, of_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Of left and right, from that of n [o], divided by n; E [o·F, ρ] as `norm_of_sum` gave it."""
    spread = update.spread(base.shape, SPREAD)
    layout = Layout.of(base, spread.held)
    weighted = wide_product(by_row(spread.left, of_norm).t(), layout.matrix(base))
    of_left, of_right = update.gathered(by_row(e, of_norm), layout.tensor(weighted, spread.right.shape))
    left, right = by_row(update.left, of_norm).t() @ update.left, update.right
    return of_left, of_right + (left @ right.flatten(1)).view(right.shape)


class ParallelLayer(torch.autograd.Function):
    """y = γ (x ∗ W0 + x ∗ ΔW) + b, differentiated to x, b, m and to the factors by the chain and by the norm."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        x: Tensor,
        bias: Tensor | None,
        base: Tensor,
        base_norm: Tensor | None,
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
            base: W0.
            base_norm: ‖W0‖ [o], with a magnitude.
            m: magnitudes [o] or None.
            left: of `Matrices`, with a magnitude.
            right: of `Matrices`, with a magnitude.
            kernels: of the stages.
        """
        y = own(plan.operator.output(x, base, bias))
        run = Pass.of(plan.operator, plan.stages, kernels, x)
        inputs = run.inputs(x)
        y.add_(run.output(inputs))
        norm = e = None
        if m is not None and base_norm is not None and left is not None and right is not None:
            norm, e = norm_of_sum(base, base_norm, Matrices(left, right, plan.held))
            gain = m / norm
            y.mul_(plan.operator.over_channels(gain))
            if bias is not None:
                y.add_(plan.operator.over_channels(bias - gain * bias))  # nothing where γ is 1
        ctx.plan, ctx.kept = plan, None if m is None else Kept(y)
        ctx.save_for_backward(bias, base, norm, e, m, left, right, *inputs, *kernels)
        return y

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs."""
        bias, base, norm, e, m, left, right, *rest = ctx.saved_tensors
        plan: Plan = ctx.plan
        operator, depth = plan.operator, len(plan.stages)
        inputs, kernels = rest[:depth], rest[depth:]
        needs = ctx.needs_input_grad
        t, sums = (None, None) if m is None else magnitude_product(ctx, g, bias)
        of_bias = bias_gradient(operator, g, sums) if needs[2] else None
        scaled = g if m is None else g * operator.over_channels(m / norm)
        run = Pass.of(operator, plan.stages, kernels, inputs[0])
        of_kernels: Sequence[Tensor | None]
        of_kernels, of_x = run.gradients(scaled, inputs, of_entering=needs[1])
        if of_x is not None:
            packed = None if is_traced(scaled, base) else plan.packed
            through = (
                operator.input_gradient(scaled, base, inputs[0]) if packed is None else packed.input_gradient(scaled)
            )
            of_x = through.add_(of_x)
        of_m = of_left = of_right = None
        if m is not None and t is not None:
            of_m = t.to(m.dtype) / divisor(m)
            # dL/dn = −t / n, and dn = ⟨V, dΔW⟩ / n.
            of_left, of_right = norm_gradients(base, Matrices(left, right, plan.held), e, -t.to(m.dtype) / norm**2)
        elif m is not None:
            # The output was overwritten.
            update = Matrices(left, right, plan.held)
            weight, norm = compose(base, update, m, plan.slot, plan.magnitude_dim)
            of_weight = operator.weight_gradient(g, inputs[0], weight)
            of_m, of_left, of_right = gradients_through_weight(plan, of_weight, weight, norm, m, left, right)
            of_kernels = [None] * depth
        return None, of_x, of_bias, None, None, of_m, of_left, of_right, *of_kernels
