"""Losses against the formulas themselves, and the rule that stops a training."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from segraft.training.callbacks import has_converged
from segraft.training.losses import LOSSES, DiceCrossEntropy, overlap, overlap_loss

SHAPE = (2, 3, 4)
unit = arrays.arrays(np.float64, SHAPE, elements=st.one_of(st.just(0.0), st.floats(0, 1, width=32)))
binary = arrays.arrays(np.float64, SHAPE, elements=st.sampled_from([0.0, 1.0]))
logit = arrays.arrays(np.float32, SHAPE, elements=st.floats(-30, 30, width=32))


def equation_1(probability: np.ndarray, mask: np.ndarray) -> float:
    total = 0.0
    for o, label in zip(probability.ravel(), mask.ravel(), strict=True):
        if label + o > 0:
            total -= label * o / (label + o)
    return total


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def by_hand(logits: np.ndarray, mask: np.ndarray) -> float:
    """Dice of each label over the batch (smoothed as MONAI does) plus the mean binary cross-entropy."""
    p = sigmoid(logits)
    dice = [
        1 - (2 * (p[:, c] * mask[:, c]).sum() + 1e-5) / (p[:, c].sum() + mask[:, c].sum() + 1e-5)
        for c in range(mask.shape[1])
    ]
    return float(np.mean(dice) - np.mean(mask * np.log(p) + (1 - mask) * np.log(1 - p)))


@given(unit, unit)
def test_overlap_is_equation_1(probability, mask):
    found = overlap(torch.from_numpy(probability), torch.from_numpy(mask))
    assert found.item() == pytest.approx(equation_1(probability, mask), abs=1e-12)


def test_overlap_of_known_values():
    probability, mask = torch.tensor([0.0, 1.0, 0.5, 0.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert overlap(probability, mask).item() == pytest.approx(-(1 / 2 + 1 / 3))


def test_overlap_has_a_finite_gradient_where_both_are_zero():
    probability = torch.zeros(4, requires_grad=True)
    overlap(probability, torch.tensor([0.0, 0.0, 1.0, 1.0])).backward()
    assert torch.equal(probability.grad, torch.tensor([0.0, 0.0, -1.0, -1.0]))


@given(logit, binary)
def test_overlap_loss_is_the_equation_over_both_classes(logits, mask):
    p = sigmoid(logits)
    expected = 2 / mask.size * (equation_1(p, mask) + equation_1(1 - p, 1 - mask))
    found = overlap_loss(torch.from_numpy(logits), torch.from_numpy(mask).float()).item()
    assert found == pytest.approx(expected, abs=1e-5)
    assert -1 - 1e-6 <= found <= 0


@given(binary)
def test_overlap_loss_is_least_exactly_at_the_mask(mask):
    truth = torch.from_numpy(mask).float()
    perfect = 200 * truth - 100
    assert overlap_loss(perfect, truth).item() == pytest.approx(-1, abs=1e-6)
    assert overlap_loss(-perfect, truth).item() == pytest.approx(0, abs=1e-6)
    worse = perfect.clone()
    worse[0, 0, 0] *= -1
    assert overlap_loss(worse, truth).item() == pytest.approx(-1 + 1 / truth.numel(), abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_pixel_is_pulled_towards_its_class(loss):
    """Gradient descent lowers the logits of the background and raises those of the label."""
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 2:4, 2:4] = 1
    logits = torch.zeros_like(mask, requires_grad=True)
    LOSSES[loss]()(logits, mask).backward()
    assert (logits.grad[mask == 0] > 0).all()
    assert (logits.grad[mask == 1] < 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_mask_of_ones_is_not_the_best_answer(loss):
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 2:4, 2:4] = 1
    function = LOSSES[loss]()
    assert function(torch.full_like(mask, 20.0), mask) > function(40 * mask - 20, mask) + 0.1


@given(
    arrays.arrays(np.float32, (2, 3, 4, 2), elements=st.floats(-8, 8, width=32)),
    arrays.arrays(np.float32, (2, 3, 4, 2), elements=st.sampled_from([0.0, 1.0])),
)
def test_dice_cross_entropy_is_the_formula(logits, mask):
    found = DiceCrossEntropy()(torch.from_numpy(logits), torch.from_numpy(mask)).item()
    assert found == pytest.approx(by_hand(logits, mask), abs=2e-4)
    assert found >= 0


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 3, 4, 4, 4)])
@pytest.mark.parametrize("empty", [False, True])
def test_dice_cross_entropy_of_a_perfect_prediction_is_near_zero(shape, empty):
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5).float() * (not empty)
    assert DiceCrossEntropy()(200 * mask - 100, mask).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_stay_finite_at_extreme_logits(loss):
    logits = torch.tensor([[[1e4, -1e4, 1e4, -1e4]]], requires_grad=True)
    value = LOSSES[loss]()(logits, torch.tensor([[[1.0, 0.0, 0.0, 1.0]]]))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    ("losses", "converged"),
    [
        ([], False),
        ([1.0] * 19, False),  # shorter than the window
        ([1.0] * 20, True),
        ([100.0] * 19 + [99.0], True),  # exactly 1 %
        ([100.0] * 19 + [98.75], False),
        ([50.0, *[100.0] * 19, 99.0], True),  # only the window counts
        ([200.0, *[100.0] * 19, 98.0], False),
        ([1.0] * 19 + [2.0], True),  # it rose
        ([-0.5] * 19 + [-0.504], True),  # negative: improved by 0.8 %
        ([-0.5] * 19 + [-0.51], False),  # improved by 2 %
        ([-0.5] * 19 + [-0.4], True),  # it rose
        ([-100.0] * 19 + [-101.0], True),  # exactly 1 %
        ([0.0] * 20, True),
        ([0.0] * 19 + [-0.1], False),
        ([0.1] * 19 + [-0.1], False),
        ([100.0, *[math.nan] * 18, 99.5], True),  # what lies between does not count
        ([100.0 - step for step in range(20)], False),
    ],
)
def test_has_converged(losses, converged):
    assert has_converged(losses) is converged


@pytest.mark.parametrize(("window", "tolerance", "converged"), [(3, 0.5, True), (3, 0.49, False), (4, 0.5, False)])
def test_window_and_tolerance(window, tolerance, converged):
    assert has_converged([8.0, 4.0, 3.0, 2.0], window=window, tolerance=tolerance) is converged
