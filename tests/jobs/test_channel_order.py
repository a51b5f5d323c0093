"""Channels that a data set lists in another order than the network takes them, on grids of their own."""

import nibabel as nib
import numpy as np
import pytest
from torch import Tensor, nn

from segraft.data.cohort import Case
from segraft.data.labels import Labels
from segraft.data.preparation import Preparation
from segraft.errors import SegraftError
from segraft.jobs.cases import Served
from segraft.jobs.evaluating import measure
from segraft.jobs.model import Model
from segraft.jobs.preparing import require_same_order

SHAPE, BLOCK = (12, 10, 8), (slice(4, 8), slice(3, 7), slice(2, 6))
SHIFT = 3


class FirstChannel(nn.Module):
    """Finds what is bright in its first channel."""

    def forward(self, image: Tensor) -> Tensor:
        return 10 * (image[:, :1] - 0.5)


@pytest.fixture
def case(tmp_path):
    """T1 (listed first) and FLAIR, which shows the same block on a grid of the same shape that lies 3 mm further on."""
    truth = np.zeros(SHAPE, np.float32)
    truth[BLOCK] = 1
    moved = np.diag([1.0, 1, 1, 1])
    moved[0, 3] = SHIFT
    nib.save(nib.Nifti1Image(truth + 0.01 * np.arange(SHAPE[2], dtype=np.float32), np.eye(4)), tmp_path / "t1.nii.gz")
    nib.save(nib.Nifti1Image(np.roll(truth, -SHIFT, 0), moved), tmp_path / "flair.nii.gz")
    nib.save(nib.Nifti1Image(truth.astype(np.uint8), np.eye(4)), tmp_path / "label.nii.gz")
    files = (tmp_path / "t1.nii.gz", tmp_path / "flair.nii.gz")
    return Case("p", "p", files, tmp_path / "label.nii.gz", channels=("T1", "FLAIR"))


@pytest.fixture
def model(tmp_path):
    preparation = Preparation(
        patch=(8, 8, 8), channel_grids="resample", intensity={"kind": "window", "low": 0, "high": 1}
    )
    return Model(FirstChannel(), Labels({1: "block"}), preparation, Served(), Served(), tmp_path / "m", ("FLAIR", "T1"))


def test_a_mask_is_on_the_grid_that_the_case_says(case, model):
    found = model.segment(case, device="cpu")
    assert np.array_equal(found.scan.grid.affine, np.eye(4))
    assert np.array_equal(found.mask, np.asanyarray(nib.load(case.label).dataobj))
    assert measure(case, found, model.labels).labels[0].dice == 1


def test_what_was_found_on_another_grid_is_not_measured(case, model):
    others = Case("p", "p", case.images[::-1], None, channels=("FLAIR", "T1"))
    with pytest.raises(SegraftError, match="another grid than its label"):
        measure(case, model.segment(others, device="cpu"), model.labels)


@pytest.mark.parametrize(
    ("ours", "fits"),
    [
        (("FLAIR", "T1", "T2"), True),
        (("FLAIR", "T1", "T1Gd"), True),
        (("T1", "FLAIR", "T2"), False),
        (("T1", "FLAIR", "T1Gd"), False),
        (("ADC", "DWI", "FLAIR"), False),
        (("ADC", "DWI", "b0"), True),
    ],
)
def test_a_channel_in_the_place_of_another_is_refused(ours, fits):
    if fits:
        require_same_order(("FLAIR", "T1", "T2"), ours, "the base", "the data")
        return
    with pytest.raises(SegraftError, match="same places"):
        require_same_order(("FLAIR", "T1", "T2"), ours, "the base", "the data")
