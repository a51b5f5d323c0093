"""nnU-Net's models as bases, held against nnU-Net itself."""

import numpy as np
import pytest

from segraft.jobs.model import load_model

SYNTHETIC = ["Brains 3d_fullres", "Brains 2d", "Abdomens 3d_fullres"]
MODELS = [
    *SYNTHETIC,
    *(pytest.param(f"Hippocampus {each}", marks=pytest.mark.data) for each in ("3d_fullres", "2d")),
]


@pytest.mark.parametrize("made", MODELS, indirect=True)
def test_masks_are_nnunets_to_the_last_voxel(made, by_nnunet):
    model = load_model(made.base)
    found = []
    for files in made.scans():
        mask = model.segment(model.case("scan", files)).mask
        np.testing.assert_array_equal(mask, by_nnunet(made.folder, files))
        found += np.unique(mask).tolist()
    assert len(set(found)) > 1


@pytest.mark.parametrize("made", SYNTHETIC, indirect=True)
def test_masks_are_nnunets_but_for_near_ties_that_its_half_precision_decides(made, by_nnunet):
    model = load_model(made.base)
    for files in made.scans():
        mask, theirs = model.segment(model.case("scan", files)).mask, by_nnunet(made.folder, files, exact=False)
        both, either = ((mask > 0) & (theirs > 0)).sum(), (mask > 0).sum() + (theirs > 0).sum()
        assert 2 * both / either > 0.99
        assert (mask != theirs).mean() < 0.005
