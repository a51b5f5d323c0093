"""The picture of volumes is drawn for any cohort that agreement can be computed of."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from segraft.evaluation import volume_figure as module
from segraft.evaluation.agreement import agreement
from segraft.evaluation.volume_figure import volume_figure


@pytest.fixture
def drawn(monkeypatch):
    """The figure as matplotlib holds it, of the call that a test makes."""
    kept: list[Figure] = []
    save = module.png
    monkeypatch.setattr(module, "png", lambda figure: (kept.append(figure), save(figure))[1])
    return kept


@pytest.mark.parametrize(
    ("predicted", "annotated"),
    [([1.0, 2.5, 2.9], [1.0, 2.0, 3.0]), ([0.0, 0.0, 0.0], [10.0, 20.0, 300.0]), ([5.0, 1.0, 9.0], [1e-3, 2e-3, 4e-3])],
)
def test_points_line_and_identity_are_where_the_numbers_are(drawn, predicted, annotated):
    found = agreement(predicted, annotated)
    assert volume_figure(predicted, annotated, found, title="dora_c").startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    identity, fit = axes.get_lines()
    assert np.array_equal(identity.get_xdata(), identity.get_ydata())
    line, _, _ = found.line(fit.get_xdata())
    assert np.allclose(fit.get_ydata(), line)
    (points,) = [each for each in axes.collections if len(each.get_offsets()) == 3]
    assert np.allclose(points.get_offsets(), np.column_stack([annotated, predicted]))
    assert axes.get_xlim()[1] > max(*annotated, *predicted)
    assert "mL" in axes.get_xlabel()
