"""Intensities as z-scores, scans in their own axes, and what else comes with networks of other tools."""

import nibabel as nib
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from segraft.cli.options import preparation as options
from segraft.data.augmentation import Augmentation
from segraft.data.channels import load_channels
from segraft.data.cohort import Case
from segraft.data.preparation import Preparation, ZScore, prepare_image, prepare_scan
from segraft.data.scan_preparation import recorded_preparation
from segraft.errors import SegraftError
from segraft.inference import sliding_scores
from segraft.jobs.prepare_view import show_preparation
from segraft.jobs.preparing import settle_preparation
from segraft.networks import UNet

OWN = {"orientation": "own"}


def save(path, voxels, affine=None):
    nib.save(
        nib.Nifti1Image(np.asarray(voxels, np.float32), np.diag([-2.0, 1, -3, 1]) if affine is None else affine), path
    )
    return path


def noise(seed=0, shape=(6, 8, 5)):
    voxels = np.random.default_rng(seed).normal(50, 20, shape).astype(np.float32)
    voxels[:2] = 0
    return voxels


@pytest.mark.parametrize("nonzero", [False, True])
def test_the_formula(nonzero, tmp_path):
    """Mean 0 and standard deviation 1 (the population's) over all voxels, or over those that are not 0, which stay."""
    voxels = noise()
    path = save(tmp_path / "a.nii.gz", voxels)
    found = prepare_image(path, Preparation(intensity=ZScore(nonzero=nonzero), **OWN))
    counted = voxels[voxels != 0] if nonzero else voxels
    expected = (voxels - counted.mean(dtype=np.float64)) / counted.std(dtype=np.float64)
    if nonzero:
        expected[voxels == 0] = 0
    np.testing.assert_allclose(found.as_tensor().numpy()[0], expected, atol=1e-5)
    np.testing.assert_array_equal(found.affine.numpy(), np.diag([-2.0, 1, -3, 1]))  # its own axes


def test_each_channel_by_itself_and_the_scan_untouched(tmp_path):
    files = [save(tmp_path / f"{place}.nii.gz", (place + 1) * noise(place)) for place in range(2)]
    scan = load_channels(files, ("T1", "T2"), who="the case a")
    before = [channel.get_fdata().copy() for channel in scan.channels if channel is not None]
    found = prepare_scan(scan, Preparation(intensity=ZScore(nonzero=True), **OWN))
    for plane in found.as_tensor():
        inside = plane[plane != 0].double()
        torch.testing.assert_close(inside.mean(), torch.tensor(0.0).double(), atol=1e-6, rtol=0)
        torch.testing.assert_close(inside.std(correction=0), torch.tensor(1.0).double(), atol=1e-5, rtol=0)
    for channel, old in zip(scan.channels, before, strict=True):
        assert channel is not None
        np.testing.assert_array_equal(channel.get_fdata(), old)


def test_one_value_beside_zeros_is_refused(tmp_path):
    path = save(tmp_path / "flat.nii.gz", noise() > 0)
    prepare_image(path, Preparation(intensity=ZScore()))
    with pytest.raises(SegraftError, match=r"flat\.nii\.gz has one value beside 0"):
        prepare_image(path, Preparation(intensity=ZScore(nonzero=True)))


def test_own_axes_settle_a_patch_and_go_with_no_head(tmp_path):
    affine = np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    case = Case("a", "a", (save(tmp_path / "a.nii.gz", noise(shape=(16, 40, 8)), affine),), None)
    net = UNet(spatial_dims=3, widths=(4, 8))
    assert settle_preparation(OWN, None, net, [case]).patch == (16, 40, 8)
    assert settle_preparation({}, None, net, [case]).patch == (8, 16, 40)
    with pytest.raises(ValidationError, match="levelled and turned"):
        Preparation(head=True, **OWN)


def test_records_are_as_before_where_nothing_is_asked():
    record = Preparation().model_dump(mode="json")
    assert not {"average", "weights"} & set(record)
    other = Preparation(average="logit", weights="constant", intensity=ZScore(nonzero=True), **OWN)
    assert recorded_preparation(other.model_dump(mode="json"), "file") == other


def test_contrast_below_zero_mirrors_that_above():
    """x^g of what is below 0 is −|x|^g; what is above does not depend on it."""
    image = np.abs(noise()) / 100
    above, mirrored, mixed = image.copy(), -image, image.copy()
    mixed[3:] *= -1
    for each in (above, mirrored, mixed):
        Augmentation(()).recolour(each, np.random.default_rng(1))
    rng = np.random.default_rng(1)
    gamma = np.float32(np.exp(rng.uniform(*np.log((0.7, 1.5)))))
    scale, shift = np.float32(rng.uniform(0.9, 1.1)), np.float32(rng.uniform(-0.1, 0.1))
    np.testing.assert_allclose(above, image**gamma * scale + shift, rtol=1e-5)
    np.testing.assert_allclose(mirrored - shift, -(above - shift), atol=1e-6)
    np.testing.assert_array_equal(mixed[:3], above[:3])
    np.testing.assert_array_equal(mixed[3:], mirrored[3:])


@pytest.mark.parametrize("weights", ["gaussian", "constant"])
def test_logits_are_averaged_before_the_sigmoid(weights):
    """A network that says the place in its patch: where patches overlap, the mean is of logits, not probabilities."""

    class Place(torch.nn.Module):
        def forward(self, image):
            place = torch.linspace(-4, 4, image.shape[2])[:, None, None]
            return place.expand(*image.shape[2:]).expand(len(image), 1, *image.shape[2:]).clone()

    image = torch.rand(1, 12, 8, 8)
    logits = sliding_scores(Place(), image, (8, 8, 8), average="logit", weights=weights).logit()[0, :, 0, 0]
    both = sliding_scores(Place(), image, (8, 8, 8), weights=weights)[0, :, 0, 0]
    first, second = torch.linspace(-4, 4, 8)[4:], torch.linspace(-4, 4, 8)[:4]
    if weights == "constant":
        torch.testing.assert_close(logits[4:8], (first + second) / 2, atol=1e-4, rtol=0)
        torch.testing.assert_close(both[4:8], (first.sigmoid() + second.sigmoid()) / 2, atol=1e-5, rtol=0)
    share = (logits[4:8] - second) / (first - second)
    assert bool(((share > 0) & (share < 1)).all())
    assert bool((logits[4:7].sigmoid() - both[4:7]).abs().max() > 1e-3)


def test_on_the_command_line_and_in_pictures(tmp_path):
    given = {name: None for name in options.__annotations__ if name != "return"}
    assert options(**given | {"intensity": ["*=z_score"]}) == {"intensity": {"*": {"kind": "z_score"}}}
    for wrong in ("T1=z_score:1", "T1=window", "T1=z", "T1=window:1"):
        with pytest.raises(SegraftError, match="is not CHANNEL=KIND"):
            options(**given | {"intensity": [wrong]})
    for name, voxels in (("a", noise()), ("label", (noise() > 50).astype(np.float32))):
        save(tmp_path / f"{name}.nii.gz", voxels)
    (tmp_path / "dataset.json").write_text(
        '{"name": "t", "modality": {"0": "MR"}, "labels": {"0": "background", "1": "x"}, '
        '"training": [{"image": "./a.nii.gz", "label": "./label.nii.gz"}]}'
    )
    view = show_preparation(tmp_path, tmp_path / "v.png", preparation=Preparation(intensity=ZScore()))
    assert (view.steps[-1].unit, view.steps[-1].shown) == ("standard deviations", (-3.0, 3.0))
