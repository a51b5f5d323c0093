"""Which slice a picture shows, how it is turned and cropped."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segraft.evaluation.view import axial_view, displayed_range


def volume(shape=(12, 16, 5), fill=0):
    return np.full(shape, fill, dtype=float)


def test_the_slice_with_the_most_truth_wins():
    truth = volume().astype(int)
    truth[0, 0, 1], truth[:3, 0, 3], truth[5, 5, 4] = 2, 1, 7
    assert axial_view(volume(), truth, [np.ones_like(truth)], (0, 1), (1, 1, 1)).z == 3


def test_without_truth_the_predictions_decide():
    blank = volume().astype(int)
    one, other = blank.copy(), blank.copy()
    one[0, 0, 1] = 1
    other[:2, 0, 4] = 1
    assert axial_view(volume(), blank, [one, other], (0, 1), (1, 1, 1)).z == 4
    assert axial_view(volume(), blank, [blank], (0, 1), (1, 1, 1)).z == 2


@given(st.integers(0, 11), st.integers(0, 15))
def test_the_view_is_radiological(x, y):
    truth = volume().astype(int)
    truth[x, y, 2] = 1
    shown = axial_view(volume(fill=1), truth, [], (0, 1), (1, 1, 1)).of(truth)
    # RAS: a larger x is further to the patient's right, which is on the viewer's left; row 0 is drawn lowest.
    assert shown.shape == (16, 12)
    assert tuple(np.argwhere(shown)[0]) == (y, 11 - x)


def test_it_crops_to_the_body_and_forgets_specks():
    image = volume((60, 80, 1))
    image[20:40, 30:50, 0] = 1
    image[0, 0, 0] = image[59, 79, 0] = 1
    blank = np.zeros(image.shape, dtype=int)
    view = axial_view(image, blank, [], (0, 1), (2, 1, 1))
    assert (view.x, view.y) == (slice(18, 42), slice(26, 54))  # 4 mm are 2 and 4 voxels
    assert view.size_mm == (48, 28)


def test_a_mask_outside_the_body_is_not_cropped_away():
    image = volume((60, 80, 1))
    image[20:40, 30:50, 0] = 1
    stray = np.zeros(image.shape, dtype=int)
    stray[55, 5, 0] = 1
    view = axial_view(image, np.zeros_like(stray), [stray], (0, 1), (4, 4, 1))
    assert view.x.stop == 57
    assert view.y.start == 4


def test_without_foreground_nothing_is_cropped():
    view = axial_view(volume(), volume().astype(int), [], (0, 1), (1, 1, 1))
    assert (view.x, view.y) == (slice(0, 12), slice(0, 16))


def test_the_displayed_range_ignores_outliers():
    image = np.arange(2001.0).reshape(3, 23, 29)
    assert displayed_range(image, None) == (pytest.approx(10), pytest.approx(1990))
    assert displayed_range(image, (0, 80)) == (0, 80)
    assert displayed_range(volume(fill=7), None) == (7, 8)
