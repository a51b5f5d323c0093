"""Running a network over a whole scan, patch by patch."""

from collections.abc import Sequence

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from segraft.errors import SegraftError

AUTOCAST = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


@torch.inference_mode()
def sliding_probability(
    net: nn.Module,
    image: Tensor,
    patch: Sequence[int],
    *,
    overlap: float = 0.5,
    average: str = "probability",
    weights: str = "gaussian",
    batch: int = 4,
    device: str | torch.device = "cpu",
    precision: str = "32",
) -> Tensor:
    """Label probabilities of a prepared scan, averaged over overlapping patches.

    Args:
        net: in evaluation mode, maps [B, C, X, Y(, Z)] to logits [B, L, X, Y(, Z)].
        image: [C, X, Y, Z]; smaller than the patch is padded with zeros. A channel that is missing is NaN throughout.
        patch: voxels along X, Y, Z; with 1 in Z the network is two-dimensional and is given single slices.
        overlap: of neighbouring patches along each axis, in [0, 1).
        average: `probability`, or `logit`.
        weights: `gaussian`, or `constant`.
        batch: patches at once.
        device: where the network is.
        precision: `32`, or autocast to `bf16` or `16`.

    Returns:
        [L, X, Y, Z] float32 on the CPU.

    Raises:
        SegraftError: the result is not finite.
    """
    flat = patch[2] == 1
    batched = image.permute(3, 0, 1, 2) if flat else image[None]
    autocast = AUTOCAST[precision]
    where = torch.device(device)

    missing = torch.isnan(image).all(dim=(1, 2, 3))  # padding must not make zeros of their borders

    def score(window: Tensor) -> Tensor:
        if missing.any():
            window = window.clone()
            window[:, missing.to(window.device)] = torch.nan
        with torch.autocast(where.type, dtype=autocast, enabled=autocast is not None):
            logits: Tensor = net(window)
        return torch.sigmoid(logits.float()) if average == "probability" else logits.float()

    result = sliding_window_inference(
        batched,
        tuple(patch[:2] if flat else patch),
        batch,
        score,
        overlap=overlap,
        mode=weights,
        sw_device=where,
        device=torch.device("cpu"),
    )
    assert isinstance(result, Tensor)  # noqa: S101  one network output gives one tensor
    if not torch.isfinite(result).all():
        raise SegraftError("the network's output is not finite on this scan: use precision 32, or look at the scan.")
    if average == "logit":
        result = torch.sigmoid(result)
    return result.permute(1, 2, 3, 0) if flat else result[0]


def label_map(probability: Tensor, values: Sequence[int]) -> Tensor:
    """The label of the largest probability where that is at least 0.5, else 0.

    Args:
        probability: [L, X, Y, Z].
        values: the label value of each plane.

    Returns:
        [X, Y, Z] int64.
    """
    largest, plane = probability.max(0)
    return torch.where(largest >= 0.5, torch.as_tensor(list(values))[plane], 0)
