"""Sliding windows against direct evaluation, and the rule that makes a mask of probabilities."""

import pytest
import torch
from torch import Tensor, nn

from segraft.errors import SegraftError
from segraft.inference import AVERAGING, label_map, sliding_scores


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Pointwise(nn.Module):
    """Two labels, each a function of the voxel alone; notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.shapes.append(tuple(image.shape))
        return torch.cat([2 * image - 1, image.square()], 1)


def direct(image: Tensor) -> Tensor:
    return torch.sigmoid(torch.cat([2 * image - 1, image.square()]))


@pytest.mark.parametrize("patch", [(8, 8, 8), (4, 6, 8), (20, 8, 4)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_pointwise_network_is_the_same_in_patches(patch, overlap, batch):
    image, net = noise(1, 17, 11, 13), Pointwise()
    found = sliding_scores(net, image, patch, overlap=overlap, batch=batch)
    assert found.dtype == torch.float32
    assert not found.is_inference() or not found.requires_grad
    torch.testing.assert_close(found, direct(image), rtol=0, atol=1e-5)
    assert {shape[2:] for shape in net.shapes} == {patch}
    assert max(shape[0] for shape in net.shapes) <= batch


@pytest.mark.parametrize("size", [(5, 8, 3), (1, 1, 1), (8, 8, 7), (16, 2, 9)])
def test_an_image_smaller_than_the_patch_is_padded(size):
    image, net = noise(1, *size), Pointwise()
    found = sliding_scores(net, image, (8, 8, 8))
    assert found.shape == (2, *size)
    torch.testing.assert_close(found, direct(image), rtol=0, atol=1e-5)
    assert {shape[2:] for shape in net.shapes} == {(8, 8, 8)}


def test_padding_is_zero():
    """A network that sums over its patch sees the image and zeros."""

    class Sum(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.ones_like(image) * image.sum((2, 3, 4), keepdim=True)

    image = noise(1, 3, 4, 5)
    found = sliding_scores(Sum(), image, (8, 8, 8))
    torch.testing.assert_close(found, torch.sigmoid(image.sum()).expand(1, 3, 4, 5))


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_flat_patches_are_slice_by_slice(batch):
    """A network that sees neighbours in the slice, on patches as large as it, so that no border is averaged."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 3, padding=1)).eval()
    image = noise(1, 8, 6, 5)
    found = sliding_scores(net, image, (8, 6, 1), batch=batch)
    assert found.shape == (3, 8, 6, 5)
    for z in range(5):
        expected = torch.sigmoid(net(image[None, ..., z]))[0]
        torch.testing.assert_close(found[..., z], expected, rtol=0, atol=1e-5)


def test_flat_patches_of_larger_slices():
    image, net = noise(1, 13, 9, 4), Pointwise()
    found = sliding_scores(net, image, (8, 4, 1))
    torch.testing.assert_close(found, direct(image), rtol=0, atol=1e-5)
    assert {shape[1:] for shape in net.shapes} == {(1, 8, 4)}


def test_the_middle_of_a_patch_weighs_more_than_its_border():
    class Ramp(nn.Module):
        """The place within the patch, whatever the image."""

        def forward(self, image: Tensor) -> Tensor:
            ramp = torch.linspace(-4, 4, image.shape[2]).reshape(1, 1, -1, 1, 1)
            return ramp.expand(image.shape)

    found = sliding_scores(Ramp(), noise(1, 12, 8, 8), (8, 8, 8), overlap=0.5)[0, :, 4, 4]
    ramp = torch.sigmoid(torch.linspace(-4, 4, 8))
    # Voxel 4 is the fifth of the first patch, near its middle, and the first of the second.
    assert abs(found[4] - ramp[4]) < 0.2 * abs(found[4] - ramp[0])
    torch.testing.assert_close(found[:4], ramp[:4])


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("16", 0.005)])
def test_half_precision_is_near_and_gives_float32(precision, tolerance):
    torch.manual_seed(0)
    net = nn.Conv3d(1, 2, 3, padding=1).eval()
    image = noise(1, 8, 8, 8)
    exact = sliding_scores(net, image, (8, 8, 8))
    found = sliding_scores(net, image, (8, 8, 8), precision=precision)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=tolerance)
    assert not torch.equal(found, exact)


@pytest.mark.parametrize("patch", [(8, 8, 8), (8, 8, 1)])
def test_nan_is_refused(patch):
    class Broken(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.where(image > 2, torch.nan, image)

    image = torch.zeros(1, 8, 8, 8)
    assert sliding_scores(Broken(), image, patch).shape == (1, 8, 8, 8)
    image[0, 3, 3, 3] = 5
    with pytest.raises(SegraftError, match="not finite on this scan"):
        sliding_scores(Broken(), image, patch)


def test_infinite_logits_are_certain():
    class Certain(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.where(image > 0, torch.inf, -torch.inf)

    image = noise(1, 8, 8, 8)
    assert torch.equal(sliding_scores(Certain(), image, (8, 8, 8)), (image > 0).float())


@pytest.mark.parametrize(
    ("probabilities", "label"),
    [
        ([0.0, 0.0], 0),
        ([0.4999, 0.3], 0),
        ([0.5, 0.1], 7),  # 0.5 belongs to the label
        ([0.1, 0.5], 3),
        ([0.8, 0.9], 3),
        ([0.9, 0.8], 7),
        ([0.5, 0.5], 7),  # of equals the first asked for
        ([1.0, 1.0], 7),
        ([0.49, 0.49], 0),
    ],
)
def test_label_map(probabilities, label):
    probability = torch.tensor(probabilities).reshape(2, 1, 1, 1).expand(2, 2, 3, 4)
    found = label_map(probability, (7, 3))
    assert found.dtype == torch.int64
    assert torch.equal(found, torch.full((2, 3, 4), label))


def test_label_map_of_one_label():
    probability = torch.tensor([0.2, 0.5, 0.9]).reshape(1, 3, 1, 1)
    assert label_map(probability, [4]).flatten().tolist() == [0, 4, 4]


class Together(nn.Module):
    """Takes channels of NaN; notes whether any was in part."""

    def __init__(self) -> None:
        super().__init__()
        self.in_part = False

    def forward(self, image: Tensor) -> Tensor:
        empty = torch.isnan(image)
        self.in_part |= bool((empty.any((2, 3, 4)) != empty.all((2, 3, 4))).any())
        return torch.nan_to_num(image).sum(1, keepdim=True)


@pytest.mark.parametrize("patch", [(4, 6, 8), (20, 8, 4), (20, 20, 20)])
def test_a_missing_channel_is_missing_in_every_patch(patch):
    """Also where a patch reaches beyond the scan, which is padded with zeros."""
    image, net = noise(3, 9, 11, 7), Together()
    image[1] = torch.nan
    found = sliding_scores(net, image, patch)
    assert not net.in_part
    torch.testing.assert_close(found[0], torch.sigmoid(image[0] + image[2]), rtol=0, atol=1e-5)
    assert torch.isnan(image[1]).all(), "the scan is left as it was"


def test_of_logits_the_larger_counts_where_both_probabilities_are_one():
    logits = torch.tensor([[30.0], [40.0]])[:, :, None, None]
    assert label_map(logits, (1, 2), AVERAGING["bare logit"].threshold).item() == 2
    assert label_map(-logits, (1, 2), AVERAGING["bare logit"].threshold).item() == 0


class Sided(nn.Module):
    """Logits are the place along X, and so not the same when mirrored."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.arange(image.shape[2], dtype=torch.float32).reshape(1, 1, -1, 1, 1).expand_as(image).clone()


@pytest.mark.parametrize(("mirror", "expected"), [((), [0.0, 1, 2, 3]), ((0,), [1.5] * 4), ((0, 2), [1.5] * 4)])
def test_mirrored_scores_are_averaged(mirror, expected):
    found = sliding_scores(Sided(), torch.zeros(1, 4, 4, 4), (4, 4, 4), average="bare logit", mirror=mirror)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor(expected))


@pytest.mark.parametrize("shape", [(4, 9, 7), (3, 20, 8), (11, 8, 8)])
@pytest.mark.parametrize("patch", [(4, 8, 8), (4, 8, 1)])
def test_even_windows_see_every_voxel_and_only_the_scan(shape, patch):
    image = torch.randn(1, *shape)
    found = sliding_scores(nn.Identity(), image, patch, average="bare logit", windows="even")
    torch.testing.assert_close(found, image)
