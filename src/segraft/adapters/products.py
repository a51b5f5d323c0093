"""Products of two matrices on a CPU, by the faster of the two libraries that torch brings.

torch's `@` is BLAS. On processors other than Intel's, MKL as torch brings it is far from what their vectors can do, and
products as flat as those of factors leave cores idle in any BLAS. oneDNN, which computes torch's convolutions, has
neither weakness.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

ENOUGH = 1 << 22
"""Multiply-adds from which on calling oneDNN pays: a call takes some 15 µs."""

LANES = 16
"""Numbers in one of its vectors."""

FEW_ROWS, LONG = 4, 1 << 19
"""With fewer rows or columns than this, or longer ones, it leaves cores idle."""

HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def product(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] @ [k, n]: [m, n]. Where no gradient is recorded, as inside of autograd's functions, as fast as it can be.

    `a` is read row by row as it lies, or else `b` column by column; where neither lies like that, the smaller one is
    copied.
    """
    return served_product(a, b) if serves(a, b) else a @ b


def served_product(a: Tensor, b: Tensor) -> Tensor:
    """`product` of matrices of which `serves` is known to be true."""
    if a.is_contiguous():
        return _rows_by_columns(a, b.t())
    if b.t().is_contiguous() or b.numel() < a.numel():
        return _rows_by_columns(b.t().contiguous(), a).t()
    return _rows_by_columns(a.contiguous(), b.t())


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X [m, k], w [n, k], b [n] or None -> x wᵀ + b [m, n]."""
    if not serves(x, weight.t()):
        return nn.functional.linear(x, weight, bias)
    return _rows_by_columns(x.contiguous(), weight, None if bias is None else bias.contiguous())


def is_fast(x: Tensor) -> bool:
    """Whether products of matrices as large and dense as this tensor are as fast as convolutions."""
    return HAS_ONEDNN and x.dtype == torch.float32 and x.is_cpu


def is_left_to_torch(x: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether a convolution in three dimensions, and its gradients, come to torch's own code rather than to oneDNN.

    For one small image torch means that to be faster; it unfolds x for products by BLAS.

    Args:
        x: shape of its input [B, i, *space].
        weight: [o, i, *kernel], without groups.
    """
    return len(x) == 5 and x[0] == 1 and math.prod(x[:4]) <= 20480 and min(weight[3:]) <= 3


def serves(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN computes this one."""
    if not (is_fast(a) and is_fast(b)) or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return False
    if is_traced(a, b):
        return False
    (m, k), (rows, n) = a.shape, b.shape
    return k == rows and m * k * n >= ENOUGH and min(m, n) >= FEW_ROWS and k <= LONG


def is_traced(*tensors: Tensor) -> bool:
    """Whether these stand for others: compilers, exporters, counters and batched gradients know torch's own alone."""
    return (
        is_compiling()
        or _get_tracing_state() is not None
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or not all(map(_is_itself, tensors))
    )


def _is_itself(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not is_legacy_batchedtensor(tensor)


def _rows_by_columns(rows: Tensor, columns: Tensor, more: Tensor | None = None) -> Tensor:
    """[m, k], [n, k] -> [m, n], `more` [n] added to each row.

    The second in any order, but dense: else oneDNN takes a thousand times as long. The steps of the others it ignores.
    """
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, _dense(columns), more, "none", [], "")
    return found


def _dense(matrix: Tensor) -> Tensor:
    if matrix.is_contiguous() or matrix.t().is_contiguous():
        return matrix
    return matrix.contiguous() if matrix.stride(0) >= matrix.stride(1) else matrix.t().contiguous().t()
