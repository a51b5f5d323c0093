"""The demo from end to end, small."""

import nibabel as nib
import numpy as np
import pytest

from segraft.jobs import demo as module


@pytest.fixture
def small(monkeypatch):
    for name, value in {
        "SOURCE": 4,
        "SHOTS": 2,
        "TESTS": 3,
        "PRETRAINING_EPOCHS": 1,
        "ADAPTING_EPOCHS": 1,
        "WIDTHS": (4, 8),
    }.items():
        monkeypatch.setattr(module, name, value)


def test_the_demo_leaves_a_table_a_report_and_masks(small, tmp_path):
    result = module.demo(tmp_path / "demo", seed=3)
    assert list(result.table["Adaptation"]) == ["no adaptation", "decoder", "dora_c"]
    page = result.report.read_text(encoding="utf-8")
    assert module.STAND_IN in page
    assert page.count("data:image/png;base64,") == 1 + 3  # the Dice figure, and each of the three test heads
    masks = sorted((tmp_path / "demo" / "masks").glob("*.nii.gz"))
    assert len(masks) == 3
    for path in masks:
        scan = nib.load(tmp_path / "demo" / "subarachnoid" / "imagesTr" / path.name)
        np.testing.assert_array_equal(nib.load(path).affine, scan.affine)
    again = module.demo(tmp_path / "demo", seed=3)  # over what is there
    seconds = "Training (s)"
    assert again.table.drop(columns=seconds).equals(result.table.drop(columns=seconds))
