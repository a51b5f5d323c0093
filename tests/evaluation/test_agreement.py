"""The line, its band, bias and limits of agreement: by hand and against statsmodels."""

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from segraft.errors import SegraftError
from segraft.evaluation.agreement import agreement

volumes = st.floats(0, 300)
patients = st.lists(st.tuples(volumes, volumes), min_size=3, max_size=30)


def cohort(seed, n=30):
    rng = np.random.default_rng(seed)
    annotated = rng.gamma(1.5, 40, n)
    return np.maximum(5 + 0.8 * annotated + rng.normal(0, 10, n), 0), annotated


def test_three_patients_by_hand():
    result = agreement([1, 2, 4], [1, 2, 3])
    # Means 2 (annotated) and 7/3; Sxx = 2, Sxy = (−1)(−4/3) + (1)(5/3) = 3, Syy = (16 + 1 + 25)/9 = 14/3.
    # Slope 3/2, intercept 7/3 − 3, r = 3/√(2 · 14/3). Residuals 1/6, −1/3, 1/6: s² = (1/6)/(3 − 2).
    # With 1 degree of freedom the 97.5 % quantile is tan(0.475 π) = 12.706. Differences 0, 0, 1: SD √(1/3).
    t, s, sd = math.tan(0.475 * math.pi), math.sqrt(1 / 6), math.sqrt(1 / 3)
    assert asdict(result) == pytest.approx(
        {
            "n": 3,
            "slope": 1.5,
            "intercept": -2 / 3,
            "slope_low": 1.5 - t * s / math.sqrt(2),
            "slope_high": 1.5 + t * s / math.sqrt(2),
            "r": 3 / math.sqrt(28 / 3),
            "bias_ml": 1 / 3,
            "sd_ml": sd,
            "limits_low_ml": 1 / 3 - 1.96 * sd,
            "limits_high_ml": 1 / 3 + 1.96 * sd,
            "confidence": 0.95,
            "residual_sd_ml": s,
            "annotated_mean_ml": 2,
            "annotated_squares": 2,
        }
    )
    y, low, high = result.line([2.0, 4.0])
    assert y == pytest.approx([7 / 3, 16 / 3])
    # At the mean the band is t·s·√(1/3) wide to either side, two further out t·s·√(1/3 + 4/2).
    assert high - y == pytest.approx([t * s * math.sqrt(1 / 3), t * s * math.sqrt(1 / 3 + 2)])
    assert y - low == pytest.approx(high - y)


@pytest.mark.filterwarnings("ignore:(Substitution|Appender) is deprecated")  # pandas 3.1, of statsmodels' own import
@pytest.mark.parametrize("n", [3, 30, 300])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_line_and_band_are_those_of_statsmodels(n, confidence):
    import statsmodels.api as sm

    predicted, annotated = cohort(n, n)
    result = agreement(predicted, annotated, confidence=confidence)
    fit = sm.OLS(predicted, sm.add_constant(annotated)).fit()
    assert [result.intercept, result.slope] == pytest.approx(fit.params.tolist())
    assert [result.slope_low, result.slope_high] == pytest.approx(fit.conf_int(1 - confidence)[1].tolist())
    assert result.r**2 == pytest.approx(fit.rsquared)
    assert result.residual_sd_ml == pytest.approx(math.sqrt(fit.mse_resid))
    x = np.linspace(0, 300, 40)
    frame = fit.get_prediction(sm.add_constant(x)).summary_frame(1 - confidence)
    for ours, theirs in zip(result.line(x), ("mean", "mean_ci_lower", "mean_ci_upper"), strict=True):
        assert ours == pytest.approx(frame[theirs].to_numpy())


def test_the_band_keeps_the_shape_asked_for():
    result = agreement(*cohort(0))
    assert [part.shape for part in result.line(np.zeros((2, 5)))] == [(2, 5)] * 3
    assert [float(part) for part in result.line(10)] == [float(part[0]) for part in result.line([10])]


@given(patients, st.floats(0, 50))
def test_what_every_patient_has_too_much_of_is_bias(rows, excess):
    predicted, annotated = np.array(rows).T
    assume(np.ptp(annotated) > 1e-3)
    one, other = agreement(predicted, annotated), agreement(predicted + excess, annotated)
    assert other.bias_ml == pytest.approx(one.bias_ml + excess, abs=1e-9)
    assert other.intercept == pytest.approx(one.intercept + excess, rel=1e-6, abs=1e-6 * (1 + abs(one.slope)))
    assert (other.sd_ml, other.slope) == pytest.approx((one.sd_ml, one.slope), abs=1e-8 * (1 + abs(one.slope)))
    assert other.limits_high_ml - other.limits_low_ml == pytest.approx(2 * 1.96 * other.sd_ml, abs=1e-9)


@given(st.lists(volumes, min_size=3, max_size=30))
def test_predictions_as_annotated_lie_on_the_identity_line(annotated):
    assume(np.ptp(annotated) > 1e-3)
    result = agreement(annotated, annotated)
    assert (result.bias_ml, result.limits_low_ml, result.limits_high_ml) == (0, 0, 0)
    assert (result.slope, result.r) == pytest.approx((1, 1))
    x = np.array([0, 10, 300])
    for part in result.line(x):
        assert part == pytest.approx(x, abs=1e-5)


def test_a_model_that_always_predicts_the_same():
    annotated = [10.0, 20.0, 60.0]
    result = agreement([0.1] * 3, annotated)
    assert math.isnan(result.r)
    assert (result.slope, result.slope_low, result.slope_high) == pytest.approx((0, 0, 0), abs=1e-12)
    assert result.line([5.0]) == (pytest.approx([0.1]),) * 3
    assert result.bias_ml == pytest.approx(0.1 - 30)


@pytest.mark.parametrize(
    ("predicted", "annotated", "confidence", "message"),
    [
        ([1, 2], [1, 2], 0.95, "at least 3 patients"),
        ([1, 2, 3], [5, 5, 5], 0.95, "All annotated volumes are 5.0 mL"),
        ([1, 2, 3], [0, 0, 0], 0.95, "All annotated volumes are 0.0 mL"),
        ([1, 2, 3], [0.3, 0.1 + 0.2, 0.3], 0.95, "All annotated volumes"),
        ([1, 2, 3], [1, 2], 0.95, "same patients"),
        ([[1, 2, 3]], [[1, 2, 3]], 0.95, "same patients"),
        ([1, math.nan, 3], [1, 2, 3], 0.95, "A predicted volume of nan mL"),
        ([1, 2, 3], [1, math.inf, 3], 0.95, "An? annotated volume of inf mL"),
        ([1, 2, 3], [1, -2, 3], 0.95, "annotated volume of -2.0 mL"),
        ([1, 2, 3], [1, 2, 3], 0, "between 0 and 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(predicted, annotated, confidence, message):
    with pytest.raises(SegraftError, match=message):
        agreement(predicted, annotated, confidence=confidence)
