import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.ndimage import center_of_mass
from scipy.spatial.transform import Rotation

from segraft.data.checks import load_case
from segraft.data.cohort import Case, Cohort
from segraft.data.phantom import write_cohort
from segraft.data.preparation import (
    Percentiles,
    Preparation,
    Window,
    prepare_case,
    prepare_image,
    to_input_grid,
)
from segraft.data.scan_preparation import recorded_preparation
from segraft.errors import SegraftError

ORIENTATIONS = st.permutations(["LR", "PA", "IS"]).flatmap(
    lambda pairs: st.tuples(*map(st.sampled_from, pairs)).map("".join)
)


@pytest.mark.parametrize(
    "preparation",
    [
        Preparation(),
        Preparation(orientation="SPL", spacing=(1, 1, 2.5), intensity=Window(low=-175, high=250), patch=(64, 64, 1)),
        Preparation(intensity=Percentiles(lower=1, upper=99), crop_foreground=True),
    ],
)
def test_json_roundtrip(preparation):
    assert Preparation.model_validate(preparation.model_dump(mode="json")) == preparation
    assert Preparation.model_validate_json(preparation.model_dump_json()) == preparation


@pytest.mark.parametrize(
    "wrong",
    [
        {"orientation": "RAR"},
        {"orientation": "RA"},
        {"orientation": "ras"},
        {"orientation": "RASL"},
        {"spacing": (1, 1)},
        {"spacing": (1, 1, 0)},
        {"spacing": (1, 1, float("inf"))},
        {"patch": (0, 1, 1)},
        {"patch": (8, 8)},
        {"intensity": {"kind": "window", "low": 2, "high": 2}},
        {"intensity": {"kind": "window", "low": 2, "high": float("nan")}},
        {"intensity": {"kind": "percentiles", "lower": 60, "upper": 40}},
        {"intensity": {"kind": "percentiles", "upper": 101}},
        {"intensity": {"kind": "zscore"}},
        {"spacings": None},
    ],
)
def test_wrong_settings(wrong):
    with pytest.raises(ValidationError):
        Preparation.model_validate(wrong)


def test_window(write_case):
    """Hand-computed: -100…300 HU to 0…1."""
    image = np.array([-1000, -100, 0, 100, 300, 2000], np.int16).reshape(1, 2, 3)
    prepared = prepare_image(write_case("a", image).image, Preparation(intensity=Window(low=-100, high=300)))
    assert prepared.shape == (1, 1, 2, 3)
    assert prepared.dtype == torch.float32
    assert prepared.affine.dtype == torch.float64
    np.testing.assert_allclose(prepared.numpy().ravel(), [0, 0, 0.25, 0.5, 1, 1], atol=1e-6)


@pytest.mark.parametrize("scale", [1, 1e6])
def test_percentiles_do_not_depend_on_units(write_case, scale):
    image = np.random.default_rng(0).gamma(2, 1, (20, 20, 20)).astype(np.float32) * np.float32(scale)
    prepared = prepare_image(write_case("a", image).image, Preparation()).numpy()[0]
    low, high = np.percentile(image.astype(float), [0.5, 99.5])
    np.testing.assert_allclose(prepared, ((image - low) / (high - low)).clip(0, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("intensity", "complaint"),
    [
        (Window(low=500, high=600), "lies wholly outside the intensity window 500 to 600"),
        (Window(low=-9, high=-5), "lies wholly outside"),
        (Percentiles(lower=5, upper=95), "the value 0 at both percentiles 5 and 95"),
    ],
)
def test_no_contrast_left(write_case, intensity, complaint):
    image = np.zeros((10, 10, 10), np.int16)
    image[0, 0, 0] = 100
    case = write_case("a", image)
    with pytest.raises(SegraftError, match=complaint) as caught:
        prepare_image(case.image, Preparation(intensity=intensity))
    assert str(case.image) in str(caught.value)


def test_crop_keeps_places(write_case):
    image = np.full((9, 8, 7), -1000, np.int16)
    image[2:5, 3:7, 1:3] = 100
    label = (image > 0).astype(np.uint8) * 4
    case = write_case("a", image, label, affine=np.diag([2.0, 2, 5, 1]))
    prepared = prepare_case(case, Preparation(intensity=Window(low=0, high=100), crop_foreground=True), [4])
    assert prepared["image"].shape == (1, 3, 4, 2)
    assert (prepared["label"] == 1).all()
    np.testing.assert_array_equal(prepared["image"].affine[:3, 3], [4, 6, 5])
    back = to_input_grid(prepared["label"], prepared["image"].affine, nib.load(case.image))
    np.testing.assert_array_equal(back[0].numpy(), label == 4)


def test_planes_follow_the_order_asked(write_case):
    label = np.zeros((4, 4, 4), np.float32)
    label[0], label[1], label[2] = 1, 2, 300
    case = write_case("a", np.random.default_rng(0).normal(size=(4, 4, 4)), label)
    planes = prepare_case(case, Preparation(), [300, 1])["label"]
    assert planes.dtype == torch.float32
    np.testing.assert_array_equal(planes.numpy(), np.stack([label == 300, label == 1]))


@st.composite
def scans(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ball in noise with any orientation, obliqueness and anisotropic spacing: image, label, affine."""
    shape = draw(st.tuples(*[st.integers(16, 24)] * 3))
    centre = [draw(st.floats(5, size - 6)) for size in shape]
    distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - centre, axis=-1)
    noise = np.random.default_rng(0).normal(size=shape)
    label = (distance < draw(st.floats(5, 8))).astype(np.uint8)
    turn = np.eye(3)[list(draw(st.permutations(range(3))))] * draw(st.tuples(*[st.sampled_from([-1, 1])] * 3))
    angles = draw(st.tuples(*[st.sampled_from([0, 0, 12, -25])] * 3))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ turn
    affine[:3, :3] *= draw(st.tuples(*[st.floats(0.7, 1.6)] * 3))
    affine[:3, 3] = draw(st.tuples(*[st.floats(-300, 300)] * 3))
    return (label + noise).astype(np.float32), label, affine.astype(np.float32).astype(float)


def saved(folder, image, label, affine) -> Case:
    nib.save(nib.Nifti1Image(image, affine), folder / "image.nii")
    nib.save(nib.Nifti1Image(label, affine), folder / "label.nii")
    return Case("a", "a", (folder / "image.nii",), folder / "label.nii")


@settings(max_examples=40, deadline=None)
@given(scan=scans(), orientation=ORIENTATIONS)
def test_labels_come_back_exactly_without_resampling(tmp_path_factory, scan, orientation):
    case = saved(tmp_path_factory.getbasetemp(), *scan)
    prepared = prepare_case(case, Preparation(orientation=orientation), [1])
    assert "".join(nib.aff2axcodes(prepared["image"].affine.numpy())) == orientation
    scan, label = load_case(case)
    back = to_input_grid(prepared["label"], prepared["image"].affine, scan.first)
    np.testing.assert_array_equal(back[0].numpy(), label.get_fdata())


@settings(max_examples=40, deadline=None)
@given(scan=scans(), orientation=ORIENTATIONS, fineness=st.floats(1, 1.6))
def test_labels_come_back_through_resampling(tmp_path_factory, scan, orientation, fineness):
    case = saved(tmp_path_factory.getbasetemp(), *scan)
    spacing = (float(np.linalg.norm(scan[2][:3, :3], axis=0).min() / fineness),) * 3
    prepared = prepare_case(case, Preparation(orientation=orientation, spacing=spacing), [1])
    affine = prepared["image"].affine.numpy()
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), spacing, atol=1.1e-3)
    scan, label = load_case(case)
    back = to_input_grid(prepared["label"], affine, scan.first)[0].numpy() >= 0.5
    truth = label.get_fdata() > 0
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.9
    # half a voxel's shift, the usual mistake, would show here
    np.testing.assert_allclose(center_of_mass(back), center_of_mass(truth), atol=0.35)


@pytest.mark.data
@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5)])
def test_real_ct(real_data, spacing):
    folder = real_data / "spleen_ct"
    (label,) = folder.glob("derivatives/**/*seg*.nii.gz")
    case = Case("s", "s", (folder / "sub-spleen2/ct/sub-spleen2_ct.nii.gz",), label)
    preparation = Preparation(
        spacing=spacing, intensity=Window(low=-175, high=250), crop_foreground=True, patch=(96, 96, 96)
    )
    prepared = prepare_case(case, preparation, [1])
    scan, truth = load_case(case)
    back = to_input_grid(prepared["label"], prepared["image"].affine, scan.first)[0].numpy() >= 0.5
    spleen = truth.get_fdata() == 1
    dice = 2 * (back & spleen).sum() / (back.sum() + spleen.sum())
    assert dice == 1 if spacing is None else dice > 0.95


@pytest.mark.data
def test_real_mri_intensities_become_comparable(real_data):
    cases = Cohort.read(real_data / "hippocampus").cases[:20]
    means = [float(prepare_image(case.image, Preparation()).mean()) for case in cases]
    assert 0.2 < min(means) < max(means) < 0.8


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """One phantom whose head lies as it was drawn: yaw, roll and pitch of some degrees."""
    folder = write_cohort(
        tmp_path_factory.mktemp("heads"),
        task="traumatic",
        patients=4,
        seed=1,
        shape=(128, 144, 26),
        spacing=(1.6, 1.6, 5),
    )
    return Cohort.read(folder).cases


@pytest.mark.parametrize(
    ("place", "spacing", "least", "off"),
    # The last is a crescent a few mm thin that leans across slices of 5 mm.
    [(0, None, 0.9, 0.05), (2, (1.0, 1.0, 5.0), 0.9, 0.05), (3, None, 0.9, 0.05), (1, None, 0.85, 0.08)],
)
def test_a_head_comes_back_to_its_own_grid(heads, place, spacing, least, off):
    case = heads[place]
    preparation = Preparation(head=True, spacing=spacing, intensity=Window(low=0, high=90), crop_foreground=True)
    prepared = prepare_case(case, preparation, [1])
    scan, label = load_case(case)
    truth = label.get_fdata() > 0
    back = to_input_grid(prepared["label"], prepared["image"].affine, scan.first)[0].numpy() >= 0.5
    assert back.shape == truth.shape
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > least
    assert back.sum() == pytest.approx(truth.sum(), rel=off)
    np.testing.assert_allclose(center_of_mass(back), center_of_mass(truth), atol=0.4)
    in_between = float(prepared["label"].sum()) * abs(np.linalg.det(prepared["image"].affine.numpy()[:3, :3]))
    assert in_between == pytest.approx(truth.sum() * 1.6 * 1.6 * 5, rel=0.05)


def test_a_head_has_one_size_in_plane(heads):
    prepared = prepare_image(heads[0].image, Preparation(head=True, intensity=Window(low=0, high=90)))
    assert prepared.shape[1:3] == (512, 512)
    assert float(prepared[0, 0, 0, 0]) == 0


def test_a_scan_that_is_no_head_is_named(write_case):
    case = write_case("a", np.random.default_rng(0).normal(40, 5, (16, 16, 8)).astype(np.float32))
    with pytest.raises(SegraftError, match=r"a\.nii\.gz cannot be levelled: no voxel is above 200 HU"):
        prepare_image(case.image, Preparation(head=True))


def test_records_from_before_heads_still_load():
    record = Preparation(patch=(64, 64, 1)).model_dump(mode="json")
    del record["head"]
    assert recorded_preparation(record, "old.safetensors") == Preparation(patch=(64, 64, 1))


def test_records_of_one_channel_are_as_before_several():
    assert "channel_grids" not in Preparation(patch=(64, 64, 1)).model_dump(mode="json")
    several = Preparation(channel_grids="resample", intensity=(Window(low=0, high=1), Percentiles()))
    assert recorded_preparation(several.model_dump(mode="json"), "new.safetensors") == several
