"""How scans are prepared: the user's word, else the base's, else what fits the data."""

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from segraft.data.cohort import Case
from segraft.data.preparation import Preparation, Window
from segraft.errors import SegraftError
from segraft.jobs.preparing import check_network, settle_preparation
from segraft.networks import UNet

WIDTHS = {2: (2, 2), 8: (2, 2, 2, 2), 16: (2, 2, 2, 2, 2)}


def net(multiple=2, dimensions=3):
    return UNet(spatial_dims=dimensions, widths=WIDTHS[multiple])


@pytest.fixture
def scans(tmp_path):
    """scans(shape, …, affine=…): a case per shape."""

    def make(*shapes, affine=None):
        cases = []
        for place, shape in enumerate(shapes):
            path = tmp_path / f"{place}.nii"
            nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4) if affine is None else affine), path)
            cases.append(Case(path.stem, path.stem, (path,), None))
        return cases

    return make


@pytest.mark.parametrize(
    ("shapes", "multiple", "patch"),
    [
        ([(16, 24, 32)], 8, (16, 24, 32)),
        ([(17, 24, 33)], 8, (24, 24, 40)),
        ([(10, 10, 10), (60, 20, 21), (20, 30, 90)], 2, (20, 20, 22)),
        ([(200, 96, 97)], 16, (96, 96, 96)),
        ([(1, 1, 1)], 16, (16, 16, 16)),
    ],
)
def test_the_patch_is_the_median_size_rounded_up_and_capped(scans, shapes, multiple, patch):
    assert settle_preparation(None, None, net(multiple), scans(*shapes)).patch == patch


def test_a_slice_for_a_flat_network(scans):
    assert settle_preparation(None, None, net(8, 2), scans((33, 600, 20))).patch == (40, 512, 1)


def test_the_only_size_that_a_network_takes(scans):
    fixed = net()
    fixed.image_size = (24, 16, 8)
    assert settle_preparation(None, None, fixed, scans((40, 40, 40))).patch == (24, 16, 8)
    fixed.image_size = (24, 16)
    assert settle_preparation(None, None, fixed, scans((40, 40, 40))).patch == (24, 16, 1)
    assert settle_preparation({"patch": (8, 8, 8)}, None, fixed, scans((40, 40, 40))).patch == (8, 8, 8)


def test_the_cap_of_a_network_with_larger_steps(scans):
    class Coarse(nn.Module):
        size_multiple = 128

        def __init__(self):
            super().__init__()
            self.layer = nn.Conv3d(1, 1, 1)

    assert settle_preparation(None, None, Coarse(), scans((300, 100, 20))).patch == (128, 128, 128)


def test_sizes_are_counted_after_turning_and_resampling(scans):
    """Stored as (S, R, A) with voxels of 4, 1 and 2 mm; prepared as RAS with voxels of 2 mm."""
    affine = np.array([[0, 1, 0, 0], [0, 0, 2, 0], [4, 0, 0, 0], [0, 0, 0, 1.0]])
    cases = scans((10, 40, 30), affine=affine)
    assert settle_preparation(None, None, net(), cases).patch == (40, 30, 10)
    assert settle_preparation({"spacing": (2, 2, 2)}, None, net(), cases).patch == (20, 30, 20)


def test_single_fields_leave_the_bases_others(scans):
    inherited = Preparation(orientation="LPS", spacing=(1, 1, 2), intensity=Window(low=-100, high=300), patch=(8, 8, 8))
    settled = settle_preparation({"patch": (16, 16, 16)}, inherited, net(), scans((40, 40, 40)))
    assert settled == inherited.model_copy(update={"patch": (16, 16, 16)})
    settled = settle_preparation(
        {"intensity": {"kind": "percentiles", "lower": 1, "upper": 99}}, inherited, net(), scans((40, 40, 40))
    )
    assert settled.patch == (8, 8, 8)
    assert settled.spacing == (1, 1, 2)
    assert settled.intensity.kind == "percentiles"


def test_nothing_said_is_the_bases(scans):
    inherited = Preparation(spacing=(1, 1, 2), patch=(8, 8, 8))
    assert settle_preparation({}, inherited, net(), scans((40, 40, 40))) == inherited


def test_a_whole_preparation_is_taken_as_it_is():
    given = Preparation(patch=(8, 8, 8))
    assert settle_preparation(given, Preparation(spacing=(1, 1, 1)), net(), []) is given


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch", (0, 8, 8)),
        ("spacing", (1, -1, 1)),
        ("orientation", "XYZ"),
        ("intensity", {"kind": "window", "low": 3, "high": 3}),
        ("colour", "blue"),
    ],
)
def test_a_value_that_does_not_fit_is_named(field, value):
    with pytest.raises(SegraftError, match=f"preparation {field}") as error:
        settle_preparation({field: value}, Preparation(), net(), [])
    assert "\n" not in str(error.value)


class TestCheckNetwork:
    def test_leaves_the_network_as_it_was(self):
        tried = UNet(spatial_dims=3, widths=(2, 4), norm="batch").train()
        before = {key: value.clone() for key, value in tried.state_dict().items()}
        check_network(tried, (8, 8, 8), 1)
        assert tried.training
        assert all(module.training for module in tried.modules())
        assert all(torch.equal(before[key], value) for key, value in tried.state_dict().items())
        assert all(value.grad is None for value in tried.parameters())

    def test_a_slice_for_a_flat_network(self):
        check_network(net(2, 2), (8, 8, 1), 1)

    def test_several_channels(self):
        check_network(UNet(in_channels=3, spatial_dims=3, widths=(2, 2)), (8, 8, 8), 1, 3)
        with pytest.raises(SegraftError, match="does not take patches of 8 8 8 voxels with 3 channels"):
            check_network(net(2), (8, 8, 8), 1, 3)

    @pytest.mark.parametrize(
        ("tried", "patch", "labels"),
        [
            (net(8), (8, 8, 12), 1),
            (net(2), (8, 8, 1), 1),
            (net(2, 2), (8, 8, 8), 1),
            (net(2), (8, 8, 8), 2),
            (nn.Conv3d(1, 1, 3), (8, 8, 8), 1),
            (nn.Conv3d(2, 1, 1), (8, 8, 8), 1),
            (nn.Linear(7, 1), (8, 8, 8), 1),
            (nn.LSTM(8, 8), (8, 8, 1), 1),
        ],
        ids=["size", "slice", "volume", "labels", "shrinks", "channels", "foreign", "tuple"],
    )
    def test_what_does_not_fit_is_one_sentence(self, tried, patch, labels):
        with pytest.raises(SegraftError) as error:
            check_network(tried, patch, labels)
        assert "\n" not in str(error.value)
