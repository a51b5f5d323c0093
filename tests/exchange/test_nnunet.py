"""nnU-Net's models as bases, held against nnU-Net itself."""

import numpy as np
import pytest

from segraft.jobs.model import load_model

SYNTHETIC = ["Brains 3d_fullres", "Brains 2d", "Abdomens 3d_fullres"]
HIPPOCAMPUS = [pytest.param(f"Hippocampus {each}", marks=pytest.mark.data) for each in ("3d_fullres", "2d")]


@pytest.mark.parametrize("made", [*SYNTHETIC, *HIPPOCAMPUS], indirect=True)
def test_masks_are_nnunets_to_the_last_voxel(made, by_nnunet):
    model = load_model(made.base)
    for files in made.scans():
        mask = model.segment(model.case("scan", files)).mask
        np.testing.assert_array_equal(mask, by_nnunet(made.folder, files))
        assert "Hippocampus" in made.base or mask.any()


@pytest.mark.parametrize("made", SYNTHETIC[:1], indirect=True)
def test_its_half_precision_decides_near_ties_alone(made, by_nnunet):
    model = load_model(made.base)
    for files in made.scans():
        mask, theirs = model.segment(model.case("scan", files)).mask, by_nnunet(made.folder, files, exact=False)
        assert (mask != theirs).mean() < 0.005
