"""How an adapted layer is executed: forward with the composed weight, backward to the factors.

Four ways, with the same result up to rounding:

    composed   W = compose(W0, factors) is part of autograd's graph: the reference, for every layer and every edit
    weight     one function: the gradient of the whole weight is formed, then contracted to the factors
    chain      one function: the factors' gradients come from the activations, through the chain of small convolutions
               that ΔW stands for (`stages`); no gradient of the size of the weight is formed
    parallel   as chain, and the chain runs beside the frozen weight in the forward pass too: W itself is never formed

Layers with a set of factors per channel of the image are executed in `per_channel`.

All but the first serve one trained low-rank edit on a linear or convolution layer of torch's own. In the first three,
forward is one convolution with W, in `weight` and `chain` with the very W of the merged layer, and the gradient of the
input goes through W.
`choosing` takes the cheapest; `execution` overrides that. With a magnitude (DoRA) the gradient of V that reaches the
factors is

    dL/dV = γ dL/dW − t / (n m) · W        γ = m / n,  n = ‖V‖,  dL/dm = t / m,  t = ⟨dL/dW, W⟩ per output channel

where t = Σ g·(y − b) takes no more than the output, which is there for the next layer's sake.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable it imports no compiler
from torch.compiler import is_compiling

from segraft.adapters.caching import Derived
from segraft.adapters.choosing import Way, cheapest
from segraft.adapters.composing import compose
from segraft.adapters.convolution import Convolution
from segraft.adapters.edits import Edit, LowRank
from segraft.adapters.functions import NEXT_TO_ZERO, AdaptedLayer, FrozenLayer, Plan
from segraft.adapters.grafted import adapted_tensor, base_tensor, grafts_of
from segraft.adapters.kept import Kept, settle_last
from segraft.adapters.layers import channel_norm, composing_dtype
from segraft.adapters.operators import Operator
from segraft.adapters.packed import Packed, pays_to_pack
from segraft.adapters.parallel import ParallelLayer
from segraft.adapters.per_channel import run_by_channel
from segraft.adapters.stages import chain, matrices
from segraft.adapters.stock import operator_of
from segraft.errors import SegraftError

AnyWay = Literal["composed"] | Way
_WAY: ContextVar[AnyWay | None] = ContextVar("segraft_execution", default=None)


@contextmanager
def execution(way: AnyWay | None) -> Iterator[None]:
    """Within the `with` block, execute every adapted layer that can be in this way; None: the cheapest.

    Where a layer cannot (several trained edits on one weight, grouped convolutions, …) it stays `composed`. The
    backward pass of recomputed activations belongs into the block too.
    """
    token = _WAY.set(way)
    try:
        yield
    finally:
        _WAY.reset(token)


def executed(forward: Callable[..., Tensor], dims: int) -> Callable[..., Tensor]:
    """`forward` of a stock layer with `dims` spatial dimensions, executed in one of the ways above where it can be."""

    def run(layer: nn.Module, x: Tensor, *others: Any, **named: Any) -> Tensor:
        grafts = grafts_of(layer)
        of_channels = grafts.channel_edits() if grafts.by_channel else ()
        if of_channels:
            by_channel = _by_channel_eagerly if is_compiling() else _by_channel
            return by_channel(layer, x, of_channels, dims, (*others, *named.values()))
        if is_compiling():
            return forward(layer, x, *others, **named)
        copied = settle_last()
        if not is_grad_enabled() or others or named or not _is_training_as_usual(layer, x, dims):
            return forward(layer, x, *others, **named)
        edits = list(grafts.active_edits("weight"))
        before, trained = (edits[:-1], edits[-1]) if edits and _is_trained(edits[-1]) else (edits, None)
        served = _can_adapt(trained) if trained is not None else dims > 0 and x.requires_grad
        if not served or any(_is_trained(edit) for edit in before):
            return forward(layer, x)
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return _run(layer, x, before, trained, copied)
        if x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return _run(layer, x, before, trained, copied)

    return run


def _by_channel(layer: nn.Module, x: Tensor, edits: Sequence[LowRank], dims: int, others: Sequence[Any]) -> Tensor:
    settle_last()
    if others:
        raise SegraftError(
            f"a {type(layer).__name__.removeprefix('Grafted')} layer with an adapter per channel was called with more "
            "than its input (such as output_size), which has no meaning here: leave the layer out of the adapter."
        )
    return run_by_channel(layer, x, edits, as_usual=_is_training_as_usual(layer, x, dims))


_by_channel_eagerly: Callable[..., Tensor] = _disable_dynamo(_by_channel)
"""Within what is compiled: the order of channels is a context variable, which cannot be traced."""


def _is_training_as_usual(layer: nn.Module, x: Tensor, dims: int) -> bool:
    """Whether a call is what the functions serve: reverse mode, eagerly, an ordinary batch, the base frozen."""
    if (
        not is_grad_enabled()
        or _WAY.get() == "composed"
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    base = layer._parameters.get("weight")
    if type(x) not in (Tensor, nn.Parameter) or any(
        not isinstance(getattr(layer, name, ()), tuple | str) for name in ("stride", "padding", "dilation")
    ):
        return False  # such as MONAI's MetaTensor, which the layer itself hands on
    if base is None or base.requires_grad or not x.is_floating_point() or x.numel() == 0:
        return False
    if dims and x.ndim != dims + 2:
        return False
    # What torch would refuse is left to torch.
    return x.dtype == base.dtype or torch.is_autocast_enabled(x.device.type)


def _is_trained(edit: Edit) -> bool:
    if any(value is not None and value.requires_grad for value in edit._parameters.values()):
        return True
    return bool(edit._modules) and any(value.requires_grad for value in edit.parameters())  # parametrised ones


def _can_adapt(trained: Edit) -> bool:
    """Whether `AdaptedLayer` serves: low rank (but not none), of the whole weight, without groups."""
    whole = isinstance(trained, LowRank) and trained.rows is None and trained.slot.groups == 1 and trained.rank > 0
    return whole and _can_divide_by(trained)


def _can_divide_by(edit: Edit) -> bool:
    """Whether t / m can be had: not where a channel of the magnitude is (next to) zero.

    On other devices than the CPU, where looking waits for the device, it is looked at once; a channel that becomes zero
    later gets no gradient of its magnitude there as long as it is.
    """
    if not isinstance(edit, LowRank) or edit.m is None:
        return True
    if edit.m.device.type == "cpu":
        return _smallest(edit.m) > NEXT_TO_ZERO
    seen: tuple[int, bool] | None = edit.__dict__.get("divisible")
    if seen is None or seen[0] != edit.m.data_ptr():
        seen = edit.m.data_ptr(), _smallest(edit.m) > NEXT_TO_ZERO
        edit.__dict__["divisible"] = seen
    return seen[1]


def _smallest(m: Tensor) -> float:
    return float(torch.linalg.vector_norm(m.detach(), -math.inf))


def _saving_is_somebody_elses() -> bool:
    """Whether what is saved for the backward pass is dropped and recomputed, or moved elsewhere."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # noqa: FBT003


def _bias(layer: nn.Module, x: Tensor) -> Tensor | None:
    bias = layer.bias
    return bias.to(x.dtype) if isinstance(bias, Tensor) else None


def _run(layer: nn.Module, x: Tensor, before: Sequence[Edit], trained: Edit | None, copied: Kept | None) -> Tensor:
    return _run_adapted(layer, x, before, trained, copied) if isinstance(trained, LowRank) else _run_frozen(layer, x)


def _run_frozen(layer: nn.Module, x: Tensor) -> Tensor:
    operator, x = operator_of(layer, x)
    weight = adapted_tensor(layer, "weight").detach().to(x.dtype)
    y: Tensor = FrozenLayer.apply(operator, x, _bias(layer, x), weight)  # type: ignore[no-untyped-call]
    return y


def _run_adapted(layer: nn.Module, x: Tensor, before: Sequence[Edit], edit: LowRank, copied: Kept | None) -> Tensor:
    operator, x = operator_of(layer, x)
    if copied is not None and not _saving_is_somebody_elses():
        copied.take_from(x)
    base = own = base_tensor(layer, "weight")
    grafts_of(layer).composed.pop("weight", None)  # of an evaluation before
    if before:
        with torch.no_grad():
            for each in before:
                base = each(base)
    links, wanted = chain(edit.contraction), _WAY.get()
    ways = cheapest(operator, links, edit.rank, x, tuple(base.shape), magnitude=edit.m is not None)
    if wanted is not None and wanted != "composed":
        ways = (wanted, *ways)
    way = next(way for way in ways if _is_possible(way, operator, edit, x, base, is_own=base is own))
    in_graph = way == "weight" or edit.m is not None
    factors, beside, update = edit.scaled_factors(), way == "parallel", None
    if in_graph or not beside:
        # The matrices need no graph where only the chain takes gradients to the factors.
        with torch.set_grad_enabled(in_graph):
            update = matrices(edit.contraction, factors)
    pair = (update.left, update.right) if update is not None and in_graph else (None, None)
    stages = links.stages if way != "weight" else ()
    kernels = links.kernels(factors) if stages else []
    held = () if update is None else update.held
    norm, packed = _of_frozen(layer, operator, base.detach(), x, edit) if beside else (None, None)
    plan = Plan(operator, stages, edit.slot, edit.magnitude_dim, held, packed)
    y: Tensor
    if update is None or beside:
        y = ParallelLayer.apply(plan, x, _bias(layer, x), base.detach(), norm, edit.m, *pair, *kernels)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            weight, norm = compose(base, update, edit.m, edit.slot, edit.magnitude_dim)
            weight = weight.to(x.dtype)
        y = AdaptedLayer.apply(plan, x, _bias(layer, x), weight, norm, edit.m, *pair, *kernels)  # type: ignore[no-untyped-call]
    kept = getattr(y.grad_fn, "kept", None)
    if kept is not None:
        kept.watch(y)
    return y


def _is_possible(way: Way, operator: Operator, edit: LowRank, x: Tensor, base: Tensor, *, is_own: bool) -> bool:
    if way == "weight":
        return True
    if edit.m is not None and _saving_is_somebody_elses():
        return False  # no output to keep
    if operator.transposed:
        of_outputs = edit.m is None or edit.slot.channel_dim(edit.magnitude_dim) == 1
        return way == "chain" and of_outputs and operator.has_adjoint()
    # In bf16 another sum would be rounded than in the merged weight.
    return way == "chain" or (is_own and x.dtype == base.dtype == composing_dtype(base.dtype))


def _derived(layer: nn.Module, base: Tensor) -> Derived:
    """What W0 gives, as long as it stays what it is."""
    derived = grafts_of(layer).derived
    kept = derived.get("weight")
    if kept is None or not kept.is_of(base):
        with torch.inference_mode(mode=False), torch.no_grad():
            kept = derived["weight"] = Derived.of(base)
    return kept


def _of_frozen(
    layer: nn.Module, operator: Operator, base: Tensor, x: Tensor, edit: LowRank
) -> tuple[Tensor | None, Packed | None]:
    """‖W0‖ [o] with a magnitude, and W0 as oneDNN wants it for the gradient of x where that pays: made once."""
    packs = x.requires_grad and isinstance(operator, Convolution) and pays_to_pack(operator, base, x)
    if edit.m is None and not packs:
        return None, None
    derived, norm, packed = _derived(layer, base), None, None
    if edit.m is not None:
        how = edit.slot, edit.magnitude_dim
        norm = derived.get(("norm", *how), lambda: channel_norm(base, *how))
    if packs and isinstance(operator, Convolution):
        packed = derived.get(("packed", operator), lambda: Packed.of(operator, base, x.shape))
    return norm, packed
