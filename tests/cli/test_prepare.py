"""`segraft prepare`: the steps of preparation in a picture, on heads from a hospital's DICOM."""

import numpy as np
import pytest
from matplotlib.image import imread

from segraft.data.phantom_series import write_phantom_series


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    write_phantom_series(folder, task="traumatic", patients=2, seed=1, shape=(96, 104, 22), spacing=(2.1, 2.1, 6.0))
    return folder


def test_every_step_is_shown(segraft, heads, tmp_path):
    told = segraft(
        *("prepare", "--data", heads, "--case", "phantom_traumatic_001", "--head", "--window", 0, 90),
        *("--spacing", 3, 3, 6, "--show", tmp_path / "steps.png", "--json"),
    )
    assert told.code == 0, told.err
    steps = {step["name"]: step for step in told.json["steps"]}
    assert list(steps) == ["as read", "levelled", "neck removed, cropped or padded", "scaled"]
    assert steps["as read"]["shape"] == [96, 104, 22]
    assert steps["neck removed, cropped or padded"]["shape"][:2] == [512, 512]
    assert steps["neck removed, cropped or padded"]["voxel_mm"] == [2.1, 2.1, 6]
    assert steps["scaled"]["voxel_mm"] == [3, 3, 6]
    assert told.json["case"] == "phantom_traumatic_001"
    picture = imread(tmp_path / "steps.png")
    assert picture.shape[1] > picture.shape[0] > 400
    orange = np.abs(picture[..., :3] - np.array([0xE6, 0x9F, 0x00]) / 255).max(axis=-1) < 0.05
    columns = np.flatnonzero(orange.any(axis=0)) / picture.shape[1]
    assert all(((columns > k / 4) & (columns < (k + 1) / 4)).any() for k in range(4))  # a label in every step


def test_the_table(segraft, heads, tmp_path):
    told = segraft("prepare", "--data", heads, "--show", tmp_path / "steps.png")
    assert told.code == 0, told.err
    assert "phantom_traumatic_000" in told.out
    assert "96 × 104 × 22" in told.out
    assert "levelled" not in told.out
    assert (tmp_path / "steps.png").is_file()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--case", "nobody"], 'has no case "nobody": choose one such as phantom_traumatic_000'),
        (["--show", "steps.jpg"], "steps.jpg cannot be a picture"),
        (["--spacing", "1", "1", "0"], "preparation spacing.2"),
    ],
)
def test_what_cannot_be_shown(heads, refused, tmp_path, options, says):
    refused("prepare", "--data", heads, "--show", tmp_path / "steps.png", *options, says=[says])


def test_a_model_for_heads_segments_a_series(segraft, heads, tmp_path):
    """Recorded with the model, honoured by predict and evaluate; the mask lies on the series' own grid."""
    import nibabel as nib

    from segraft.data.scans import load_scan

    made = segraft(
        *("pretrain", "--data", heads, "--out", tmp_path / "base", "--network-args", '{"widths": [4, 8]}'),
        *("--epochs", 1, "--device", "cpu", "--head", "--window", 0, 90, "--spacing", 6, 6, 6, "--patch", 32, 32, 16),
    )
    assert made.code == 0, made.err
    assert segraft("inspect", tmp_path / "base", "--json").json["preparation"]["head"] is True
    series = heads / "imagesTr" / "phantom_traumatic_000"
    told = segraft("predict", tmp_path / "base", series, "-o", tmp_path / "masks", "--device", "cpu", "--json")
    assert told.code == 0, told.err
    mask, scan = nib.load(tmp_path / "masks" / "phantom_traumatic_000.nii.gz"), load_scan(series)
    assert mask.shape == scan.shape
    np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-5)
