"""How a layer with a set of factors per channel of the image is executed: all blocks of a folded batch in one pass.

The frozen weight is applied once, to the whole batch; each block's low-rank part is added to that:

    linear            two batched products, of [C, m, i] with right [C, i, R], and of the result with left [C, R, o]
    convolution       the chain of small convolutions (`stages`) of each channel on its block
    any other         (transposed, grouped, row blocks of a convolution) each channel's composed weight on its block

Gradients are autograd's. With magnitudes (DoRA), y = γ_c (x W0 + x ΔW_c) + b, and the norm n_c in γ_c = m_c / n_c comes
from W0 right_cᵀ (see `parallel`), of convolutions from the composed weight.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segraft.adapters.composing import compose
from segraft.adapters.convolution import Convolution
from segraft.adapters.edits import LowRank
from segraft.adapters.functions import FrozenLayer
from segraft.adapters.grafted import base_tensor, grafts_of, shared_tensor
from segraft.adapters.layers import channel_norm, composing_dtype
from segraft.adapters.operators import Operator
from segraft.adapters.routing import Route
from segraft.adapters.stages import chain
from segraft.adapters.stock import operator_of
from segraft.errors import SegraftError


def run_by_channel(layer: nn.Module, x: Tensor, edits: Sequence[LowRank], *, as_usual: bool) -> Tensor:
    """The output of a stock layer.

    Args:
        layer: whose `weight` is edited.
        x: [K·B, …] (linear) or [K·B, i, …]: K equal blocks, of the channels that `routed` names.
        edits: of all channels, active.
        as_usual: it is trained eagerly, in reverse mode.

    Raises:
        SegraftError: outside `routed`, or blocks and channels that do not fit.
    """
    passes = grafts_of(layer).passes
    route = passes.route()
    by_channel = _of_route(layer, x, edits, route)
    device = x.device.type
    narrowed = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    if narrowed:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        value = shared_tensor(layer, "weight")
        narrow = value.to(x.dtype) if narrowed else value  # magnitudes are of the weight as it is
        bias = layer.bias.to(x.dtype) if isinstance(layer.bias, Tensor) else None
        operator, x = operator_of(layer, x)
        if isinstance(operator, Convolution):
            plain = not operator.transposed and operator.groups == 1 and all(e.rows is None for e in edits)
            run = _in_chains if plain else _composed
            y = run(operator, x, value, narrow, bias, by_channel, as_usual=as_usual)
        else:
            y = _in_batches(operator, x, value, narrow, bias, by_channel)
        shape = (*x.shape[:-1], y.shape[-1]) if isinstance(layer, nn.Linear) else y.shape
        idle = [edit for edit in edits if edit.rank == 0 or not any(edit in held for held in by_channel)]
        trained = [factor for edit in idle for factor in edit.parameters() if factor.requires_grad]
        if trained and torch.is_grad_enabled():
            y = _Idle.apply(y, *trained)  # type: ignore[no-untyped-call]
        y = y.view(shape)
    if route is not None:
        passes.remember(y, route)
    return y


def _of_route(layer: nn.Module, x: Tensor, edits: Sequence[LowRank], route: Route | None) -> list[list[LowRank]]:
    """The edits of each block's channel; several where row blocks of the weight are adapted."""
    what = f"{type(layer).__name__.removeprefix('Grafted')} layer of {tuple(base_tensor(layer, 'weight').shape)}"
    if route is None:
        raise SegraftError(
            f"a {what} has an adapter per channel of the image and was called without their order: call the network "
            "within segraft.adapters.routed, or adapt only what runs on one channel at a time."
        )
    channels = 1 + max(edit.channel or 0 for edit in edits)
    if max(route.channels) >= channels:
        raise SegraftError(
            f"routed names channel {max(route.channels)}, and a {what} has adapters for channels 0 to {channels - 1}."
        )
    blocks, dims = len(route.channels), base_tensor(layer, "weight").ndim
    if x.shape[0] % blocks or (x.ndim < 2 if dims == 2 else x.ndim != dims):
        raise SegraftError(
            f"a {what} with an adapter per channel was given {tuple(x.shape)}, whose first dimension is not {blocks} "
            "equal blocks, one for each channel that routed names."
        )
    return [[edit for edit in edits if edit.channel == channel] for channel in route.channels]


def _in_batches(
    operator: Operator,
    x: Tensor,
    value: Tensor,
    narrow: Tensor,
    bias: Tensor | None,
    by_channel: Sequence[Sequence[LowRank]],
) -> Tensor:
    """A linear layer: y [K, m, o] of x [K·B, …, i], m rows per block; `narrow` is `value` as x is."""
    y = operator.forward(x, narrow, bias)
    sides = [_sides(value, held) for held in by_channel]
    most = max(right.shape[0] for _, right, _ in sides)
    left = torch.stack([_filled(left, most, 1) for left, _, _ in sides])  # [K, o, R]
    right = torch.stack([_filled(right, most, 0) for _, right, _ in sides])  # [K, R, i]
    blocks = len(by_channel)
    few = torch.bmm(x.reshape(blocks, -1, x.shape[-1]), right.mT.to(x.dtype))
    added = torch.baddbmm(y.reshape(blocks, -1, y.shape[-1]), few, left.mT.to(x.dtype))
    gains = [gain for _, _, gain in sides if gain is not None]
    if gains:
        added = _gained(added, torch.stack(gains).unsqueeze(1), bias)
    return added


def _sides(value: Tensor, held: Sequence[LowRank]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of one channel ΔW = left right, left [o, R] and right [R, i], over all its row blocks; and the gain [o]."""
    lefts, rights = [], []
    gain = None
    if held[0].m is not None:
        gain = torch.ones(len(value), device=value.device, dtype=composing_dtype(value.dtype))
    for edit in held:
        update, (start, stop) = edit.matrices(), edit.rows or (0, len(value))
        lefts.append(nn.functional.pad(update.left, (0, 0, start, len(value) - stop)))
        rights.append(update.right)
        if gain is not None and edit.m is not None:
            norm = _norm_of_sum(value[start:stop].to(gain.dtype), update.left, update.right, edit)
            gain = torch.cat((gain[:start], edit.m.to(gain.dtype) / norm, gain[stop:]))
    return torch.cat(lefts, 1), torch.cat(rights), gain


def _norm_of_sum(base: Tensor, left: Tensor, right: Tensor, edit: LowRank) -> Tensor:
    """‖W0 + left right‖ [o], of linear layers; as `channel_norm` never zero, and ‖W0‖ bit for bit where ΔW is zero."""
    start = channel_norm(base, edit.slot, edit.magnitude_dim)
    tiny = torch.finfo(start.dtype).tiny
    h = base @ right.mT
    more = (left * (2 * h + left @ (right @ right.mT))).sum(1)
    square = torch.addcmul(more, start, start)
    # A row of zeros, whose root has no gradient.
    there = square > tiny
    root = torch.where(there, square, 1.0).sqrt()
    # √(n0² + q) as n0 + q / (n0 + n): exact at q = 0.
    return torch.where(there, start + more / (start + root), tiny)


def _filled(side: Tensor, rank: int, dim: int) -> Tensor:
    """With directions of zero, where another channel has more."""
    missing = rank - side.shape[dim]
    return nn.functional.pad(side, (0, missing) if dim == 1 else (0, 0, 0, missing)) if missing else side


def _gained(y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """γ (y − b) + b, which is y bit for bit where γ is 1; gain and bias shaped to be broadcast over y."""
    if bias is None:
        return (gain * y).to(y.dtype)
    return (gain * y + (bias - gain * bias)).to(y.dtype)


def _in_chains(
    operator: Convolution,
    x: Tensor,
    value: Tensor,
    narrow: Tensor,
    bias: Tensor | None,
    by_channel: Sequence[Sequence[LowRank]],
    *,
    as_usual: bool,
) -> Tensor:
    """A convolution without groups: y [K·B, o, …] of x [K·B, i, …]."""
    if as_usual and x.requires_grad and not value.requires_grad:
        y: Tensor = FrozenLayer.apply(operator, x, bias, narrow)  # type: ignore[no-untyped-call]
    else:
        y = operator.forward(x, narrow, bias)
    shift = None if bias is None else operator.over_channels(bias)
    parts = []
    for own, part, (edit,) in zip(x.chunk(len(by_channel)), y.chunk(len(by_channel)), by_channel, strict=True):
        links, entering = chain(edit.contraction), own
        if edit.rank:
            for stage, kernel in zip(links.stages, links.kernels(edit.scaled_factors()), strict=True):
                entering = operator.stage(stage, kernel.shape[0]).forward(entering, kernel.to(x.dtype), None)
            part = part + entering  # noqa: PLW2901
        if edit.m is not None:
            whole, _ = compose(value, edit.matrices(), None, edit.slot, edit.magnitude_dim)
            gain = edit.m / channel_norm(whole, edit.slot, edit.magnitude_dim)
            part = _gained(part, operator.over_channels(gain), shift)  # noqa: PLW2901
        parts.append(part)
    return torch.cat(parts)


def _composed(
    operator: Convolution,
    x: Tensor,
    value: Tensor,
    narrow: Tensor,  # noqa: ARG001
    bias: Tensor | None,
    by_channel: Sequence[Sequence[LowRank]],
    *,
    as_usual: bool,  # noqa: ARG001
) -> Tensor:
    """Any convolution, a whole one per block."""
    parts = []
    for own, held in zip(x.chunk(len(by_channel)), by_channel, strict=True):
        weight = value
        for edit in held:
            weight = edit(weight)
        parts.append(operator.forward(own, weight.to(x.dtype), bias))
    return torch.cat(parts)


class _Idle(torch.autograd.Function):
    """The output, as it is; factors of channels that are not there get a gradient of zero, instead of none.

    So do those of channels that have no direction left. An optimiser does with them what it does in a step with other
    channels, and processes that train together have gradients for the same tensors.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, *factors: Tensor) -> Tensor:
        """`y` itself: as a view of it, it could not be overwritten by a ReLU in place."""
        ctx.shapes = [(factor.shape, factor.dtype, factor.device) for factor in factors]
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all inputs."""
        return g, *(g.new_zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes)
