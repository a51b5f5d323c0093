"""Running a network over a whole scan, patch by patch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, combinations, product

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from segraft.errors import SegraftError

AUTOCAST = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class Averaging:
    """What is averaged over overlapping patches.

    Attributes:
        averaged: of logits.
        made: of the average.
        threshold: the least of that that is a label.
    """

    averaged: Callable[[Tensor], Tensor]
    made: Callable[[Tensor], Tensor]
    threshold: float


def _same(scores: Tensor) -> Tensor:
    return scores


AVERAGING: dict[str, Averaging] = {
    "probability": Averaging(torch.sigmoid, _same, 0.5),
    "logit": Averaging(_same, torch.sigmoid, 0.5),
    # to the end, as two probabilities may both be 1 where one logit is larger
    "bare logit": Averaging(_same, _same, 0.0),
}
"""To average something else, add one entry."""


@torch.inference_mode()
def sliding_scores(
    net: nn.Module,
    image: Tensor,
    patch: Sequence[int],
    *,
    overlap: float = 0.5,
    average: str = "probability",
    weights: str = "gaussian",
    windows: str = "dense",
    mirror: Sequence[int] = (),
    batch: int = 4,
    device: str | torch.device = "cpu",
    precision: str = "32",
) -> Tensor:
    """Label probabilities (or logits) of a prepared scan, averaged over overlapping patches.

    Args:
        net: in evaluation mode, maps [B, C, X, Y(, Z)] to logits [B, L, X, Y(, Z)].
        image: [C, X, Y, Z]; smaller than the patch is padded with zeros. A channel that is missing is NaN throughout.
        patch: voxels along X, Y, Z; with 1 in Z the network is two-dimensional and is given single slices.
        overlap: of neighbouring patches along each axis, in [0, 1).
        average: what is averaged, a key of `AVERAGING`.
        weights: of patches there, `gaussian` or `constant`.
        windows: where patches lie, a key of `WINDOWS`.
        mirror: axes of the patch; its scores are averaged over all ways of mirroring it along them.
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

    def scores(window: Tensor) -> Tensor:
        if missing.any():
            window = window.clone()
            window[:, missing.to(window.device)] = torch.nan
        with torch.autocast(where.type, dtype=autocast, enabled=autocast is not None):
            logits: Tensor = net(window)
        return AVERAGING[average].averaged(logits.float())

    def mirrored(window: Tensor) -> Tensor:
        total = scores(window)
        ways = [[axis + 2 for axis in way] for way in _subsets(mirror) if way]
        for axes in ways:
            total = total + scores(window.flip(axes)).flip(axes)
        return total / (len(ways) + 1)

    size = tuple(patch[:2] if flat else patch)
    result = WINDOWS[windows](batched, size, batch, mirrored if mirror else scores, overlap, weights, where)
    if not torch.isfinite(result).all():
        raise SegraftError("the network's output is not finite on this scan: use precision 32, or look at the scan.")
    result = AVERAGING[average].made(result)
    return result.permute(1, 2, 3, 0) if flat else result[0]


def _subsets(axes: Sequence[int]) -> chain[tuple[int, ...]]:
    return chain.from_iterable(combinations(axes, count) for count in range(len(axes) + 1))


Scores = Callable[[Tensor], Tensor]


def _dense(
    image: Tensor,
    patch: tuple[int, ...],
    batch: int,
    scores: Scores,
    overlap: float,
    weights: str,
    device: torch.device,
) -> Tensor:
    """MONAI's: a fixed step from the first voxel; what would stand out is moved back inside."""
    result = sliding_window_inference(
        image,
        patch,
        batch,
        scores,
        overlap=overlap,
        mode=weights,
        sw_device=device,
        device=torch.device("cpu"),
    )
    assert isinstance(result, Tensor)  # noqa: S101  one network output gives one tensor
    return result


def _even(
    image: Tensor,
    patch: tuple[int, ...],
    batch: int,
    scores: Scores,
    overlap: float,
    weights: str,
    device: torch.device,
) -> Tensor:
    """nnU-Net's: as few as the overlap allows, spread evenly, with its weights (Isensee et al. 2021)."""
    try:
        theirs = import_module("nnunetv2.inference.sliding_window_prediction")
    except ImportError as error:
        raise SegraftError(
            f"nnU-Net's windows need a package that is not there ({error.name}): pip install 'segraft[nnunet]'."
        ) from error
    sizes = image.shape[2:]
    gaps = [max(0, window - size) for window, size in zip(patch, sizes, strict=True)]
    padded = nn.functional.pad(image, [side for gap in reversed(gaps) for side in (gap // 2, gap - gap // 2)])
    steps = theirs.compute_steps_for_sliding_window(tuple(padded.shape[2:]), patch, 1 - overlap)
    weight = (
        torch.ones(patch)
        if weights == "constant"
        else theirs.compute_gaussian(patch, value_scaling_factor=10, dtype=torch.float16, device=torch.device("cpu"))
    )
    places = [
        (number, (slice(None), *(slice(first, first + size) for first, size in zip(start, patch, strict=True))))
        for number in range(len(padded))
        for start in product(*steps)
    ]
    weight = weight.float()
    total, whole = torch.empty(0), torch.zeros(padded.shape[2:])
    for _, place in places[: len(places) // len(padded)]:
        whole[place[1:]].add_(weight)
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        found = scores(torch.stack([padded[number][place] for number, place in some]).to(device)).cpu() * weight
        if not total.numel():
            total = torch.zeros(len(padded), found.shape[1], *padded.shape[2:])
        for (number, place), each in zip(some, found, strict=True):
            total[number][place].add_(each)
    total /= whole
    inside = (slice(gap // 2, gap // 2 + size) for gap, size in zip(gaps, sizes, strict=True))
    return total[(slice(None), slice(None), *inside)]


WINDOWS: Mapping[str, Callable[[Tensor, tuple[int, ...], int, Scores, float, str, torch.device], Tensor]] = {
    "dense": _dense,
    "even": _even,
}
"""Where patches lie: (image [N, C, …], patch, patches at once, their scores, overlap, weights, device) -> [N, L, …]."""


def label_map(scores: Tensor, values: Sequence[int], threshold: float = 0.5) -> Tensor:
    """The label of the largest score where that is at least the threshold, else 0.

    Args:
        scores: [L, X, Y, Z].
        values: the label value of each plane.
        threshold: see `Averaging`.

    Returns:
        [X, Y, Z] int64.
    """
    largest, plane = scores.max(0)
    return torch.where(largest >= threshold, torch.as_tensor(list(values))[plane], 0)
