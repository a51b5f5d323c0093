"""A levelling that was kept is the one that would be found."""

import nibabel as nib
import numpy as np
import pytest

from segraft.data import levelling
from segraft.data.head import Grid, Levelling
from segraft.data.levelling import kept_in, levelling_of


@pytest.fixture
def found(monkeypatch):
    """What the search returns, without searching; and how often it was asked."""
    asked = []

    def search(image):
        asked.append(image)
        affine = np.array(image.affine, dtype=np.float64) + 0.1  # digits that JSON must carry to the last
        turned = Grid((5, 6, 7), affine / 3)
        return Levelling(yaw=1 / 3, roll=-2e-17, turned=turned, grid=Grid((5, 6, 4), affine), neck_slices=3)

    monkeypatch.setattr(levelling, "level_head", search)
    return asked


def image(seed=0, affine=None):
    voxels = np.random.default_rng(seed).normal(size=(3, 4, 5)).astype(np.float32)
    return nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine)


def assert_same(one, other):
    assert (one.yaw, one.roll, one.neck_slices) == (other.yaw, other.roll, other.neck_slices)
    for a, b in ((one.turned, other.turned), (one.grid, other.grid)):
        assert a.shape == b.shape
        assert np.array_equal(a.affine, b.affine)


def test_it_is_found_once_and_bit_for_bit(found, tmp_path):
    first = levelling_of(image())
    with kept_in(tmp_path):
        again = [levelling_of(image()) for _ in range(3)]
    assert len(found) == 2  # without a folder, and the first time with one
    for each in again:
        assert_same(each, first)


@pytest.mark.parametrize("other", [image(1), image(0, np.diag([2.0, 1, 1, 1]))], ids=["voxels", "affine"])
def test_another_scan_has_its_own(found, tmp_path, other):
    with kept_in(tmp_path):
        levelling_of(image())
        levelling_of(other)
    assert len(found) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_is_kept_outside_the_block(found, tmp_path):
    with pytest.raises(KeyError), kept_in(tmp_path):
        raise KeyError
    levelling_of(image())
    assert list(tmp_path.iterdir()) == []
