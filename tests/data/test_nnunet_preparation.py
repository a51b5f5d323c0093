"""Scans prepared as nnU-Net does, held against its own preprocessor."""

import contextlib
import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from segraft.data.channels import Scan
from segraft.data.nnunet_preparation import NNUNetPreparation, preparation_of_plans
from segraft.data.preparation import Preparation
from segraft.data.scan_preparation import recorded_preparation
from segraft.errors import SegraftError

STATISTICS = {"mean": 40.0, "std": 25.0, "percentile_00_5": -30.0, "percentile_99_5": 130.0}
CUBIC = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
LINEAR = {**CUBIC, "order": 1}


def plans_of(**given):
    """Plans with one configuration, `c`."""
    flat = len(given["spacing"]) == 2
    configuration = {
        "data_identifier": "c",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 12] if flat else [8, 16, 12],
        "spacing": given["spacing"],
        "normalization_schemes": given["schemes"],
        "use_mask_for_norm": given["masked"],
        "resampling_fn_data": given.get("function", "resample_data_or_seg_to_shape"),
        "resampling_fn_data_kwargs": given.get("arguments", CUBIC),
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**LINEAR, "is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": LINEAR,
        "architecture": {},
    }
    return {
        "image_reader_writer": given["reader"],
        "transpose_forward": given["transpose"],
        "transpose_backward": [int(axis) for axis in np.argsort(given["transpose"])],
        "configurations": {"c": configuration},
        "foreground_intensity_properties_per_channel": {str(n): STATISTICS for n in range(len(given["schemes"]))},
    }


def ours(plans) -> NNUNetPreparation:
    return preparation_of_plans(plans, plans["configurations"]["c"], (0, 1))


def theirs(plans, files):
    """nnU-Net's prepared array, its properties, and its managers."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    with contextlib.redirect_stdout(io.StringIO()):
        data, _, properties = DefaultPreprocessor(verbose=False).run_case(
            [str(file) for file in files], None, manager, manager.get_configuration("c"), {}
        )
    return data, properties, manager


def scan_in(folder: Path, affine, shape, channels, seed=0) -> tuple[Scan, list[Path]]:
    """Noise within a box of zeros, of other values in each channel."""
    rng = np.random.default_rng(seed)
    files, images = [], []
    inside = tuple(slice(1 + seed % 2, size - 2) for size in shape)
    for place in range(channels):
        data = np.zeros(shape, np.float32)
        data[inside] = rng.normal(40 + 10 * place, 30, data[inside].shape)
        images.append(nib.Nifti1Image(data, affine))
        files.append(folder / f"scan_{place:04}.nii.gz")
        nib.save(images[-1], files[-1])
    loaded = tuple(nib.load(file) for file in files)
    return Scan("the scan", tuple(f"channel {n}" for n in range(channels)), tuple(files), loaded), files


@st.composite
def geometries(draw):
    """An affine of any orientation, oblique or not, and a shape."""
    axes, signs = draw(st.permutations(range(3))), draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=3, max_size=3))
    sizes = draw(st.lists(st.sampled_from([0.7, 1.0, 1.3, 4.0]), min_size=3, max_size=3))
    turn = Rotation.from_euler("xyz", draw(st.sampled_from([(0, 0, 0), (10, -8, 15)])), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.eye(3)[:, list(axes)] @ np.diag(signs) @ np.diag(sizes)
    affine[:3, 3] = [-20, 35, 7]
    return affine, tuple(draw(st.lists(st.integers(7, 15), min_size=3, max_size=3)))


READERS = ["SimpleITKIO", "NibabelIO", "SimpleITKIOWithReorient", "NibabelIOWithReorient"]


@settings(max_examples=25)
@given(
    geometry=geometries(),
    reader=st.sampled_from(READERS),
    transpose=st.permutations([0, 1, 2]),
    spacing=st.sampled_from([[1.0, 1.0, 1.0], [3.0, 0.8, 0.9], [0.9, 1.2]]),
    scheme=st.sampled_from(["CTNormalization", "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization"]),
    masked=st.booleans(),
)
def test_prepared_arrays_are_nnunets(tmp_path_factory, geometry, reader, transpose, spacing, scheme, masked):
    affine, shape = geometry
    plans = plans_of(
        reader=reader,
        transpose=list(transpose),
        spacing=spacing,
        schemes=[scheme, "ZScoreNormalization"],
        masked=[masked, True],
    )
    scan, files = scan_in(tmp_path_factory.mktemp("scan"), affine, shape, 2)
    preparation = ours(plans)
    prepared = preparation.prepare(scan)
    expected, properties, manager = theirs(plans, files)
    if len(spacing) == 2:
        expected = expected.transpose(0, 2, 3, 1)
    assert prepared.shape == expected.shape
    np.testing.assert_allclose(prepared.as_tensor().numpy(), expected, atol=2e-4)
    # and back: what nnU-Net makes of the same logits
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    scores = torch.from_numpy(np.random.default_rng(1).normal(size=(2, *prepared.shape[1:])).astype(np.float32))
    labels = {"labels": {"background": 0, "a": 1, "b": 2}}
    logits = np.concatenate([np.zeros_like(scores[:1]), scores.numpy()])
    logits = logits.transpose(0, 3, 1, 2) if len(spacing) == 2 else logits
    mask = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, manager, manager.get_configuration("c"), manager.get_label_manager(labels), properties, False, 1
    )
    back = preparation.to_scan(scores, prepared.affine.numpy(), scan.first)
    assert back.shape == (2, *shape)
    largest, label = back.max(0)
    found = np.where(largest > 0, label + 1, 0).astype(np.uint8)
    if reader.endswith("WithReorient"):  # whose writer turns the mask back
        found = np.asarray(nib.as_closest_canonical(nib.Nifti1Image(found, affine)).dataobj)
    np.testing.assert_array_equal(found, mask.transpose(2, 1, 0))
    assert np.isneginf(back[:, 0].numpy()).all()


@pytest.mark.parametrize("spacing", [[2.0, 1.0, 1.5], [1.1, 0.9]])
def test_the_affine_of_a_prepared_scan_says_where_its_voxels_are(tmp_path, spacing):
    affine = np.array([[0, 1.0, 0.1, 3], [-0.8, 0, 0, 4], [0, -0.1, 2.5, -9], [0, 0, 0, 1]])
    where = np.einsum("ij,jxyz->ixyz", affine[:3], np.stack([*np.indices((16, 18, 14)), np.ones((16, 18, 14))]))
    channels = tuple(nib.Nifti1Image((place + 100).astype(np.float32), affine) for place in where)
    plans = plans_of(
        reader="SimpleITKIO",
        transpose=[1, 2, 0],
        spacing=spacing,
        schemes=["NoNormalization"] * 3,
        masked=[False] * 3,
        arguments={**LINEAR, "force_separate_z": False},
    )
    prepared = ours(plans).prepare(Scan("a ramp", ("x", "y", "z"), (tmp_path,) * 3, channels))
    voxels = np.stack([*np.indices(prepared.shape[1:]), np.ones(prepared.shape[1:])])
    expected = np.einsum("ij,jxyz->ixyz", prepared.affine.numpy()[:3], voxels) + 100
    middle = (slice(None), *(slice(2, -2),) * 3)
    np.testing.assert_allclose(prepared.as_tensor().numpy()[middle], expected[middle], atol=1e-3)


def test_settings_come_back_from_a_file():
    plans = plans_of(
        reader="NibabelIO", transpose=[0, 2, 1], spacing=[1.0, 2.0], schemes=["CTNormalization"], masked=[False]
    )
    preparation = ours(plans)
    assert recorded_preparation(preparation.model_dump(mode="json"), "a") == preparation
    assert recorded_preparation(Preparation().model_dump(mode="json"), "a") == Preparation()
    assert preparation.patch == (16, 12, 1)
    assert preparation.without_mirroring().flip_axes == ()
    with pytest.raises(SegraftError, match="in a way that this version knows"):
        recorded_preparation({"kind": "other"}, "a")


@pytest.mark.parametrize(
    "changed",
    [{"schemes": ["os"]}, {"function": "deepcopy"}, {"function": "resample_data_or_seg"}],
    ids=["scheme", "function", "another of its functions"],
)
def test_a_file_names_no_other_code(changed):
    given = {"reader": "NibabelIO", "transpose": [0, 1, 2], "spacing": [1.0, 1.0, 1.0], "masked": [False]}
    with pytest.raises(ValueError, match="Input should be"):
        ours(plans_of(**{"schemes": ["ZScoreNormalization"], **given, **changed}))


@pytest.mark.parametrize(
    ("channels", "moved", "message"),
    [
        (1, False, "the scan has 1 channels, and nnU-Net's plans are for 2: list as many."),
        (2, True, "lies on another grid than the channel channel 0"),
    ],
)
def test_channels_that_do_not_fit_are_refused(tmp_path, channels, moved, message):
    plans = plans_of(
        reader="SimpleITKIO",
        transpose=[0, 1, 2],
        spacing=[1.0] * 3,
        schemes=["NoNormalization"] * 2,
        masked=[False] * 2,
    )
    scan, _ = scan_in(tmp_path, np.eye(4), (8, 8, 8), channels)
    if moved:
        other = nib.Nifti1Image(np.asarray(scan.channels[1].dataobj), np.diag([2.0, 1, 1, 1]))
        scan = Scan(scan.who, scan.names, scan.files, (scan.channels[0], other))
    with pytest.raises(SegraftError, match=message):
        ours(plans).prepare(scan)


def test_a_missing_channel_is_refused(tmp_path):
    plans = plans_of(
        reader="SimpleITKIO",
        transpose=[0, 1, 2],
        spacing=[1.0] * 3,
        schemes=["NoNormalization"] * 2,
        masked=[False] * 2,
    )
    scan, _ = scan_in(tmp_path, np.eye(4), (8, 8, 8), 2)
    with pytest.raises(SegraftError, match="lacks its channel channel 1, which nnU-Net's network needs"):
        ours(plans).prepare(Scan(scan.who, scan.names, scan.files, (scan.channels[0], None)))
