"""How predicted volumes agree with annotated ones: a fitted line with its band, bias and limits of agreement.

The line and its band are those of the haemorrhage paper's Figure 5; bias and limits are those of Bland & Altman (1986).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from segraft.errors import SegraftError
from segraft.evaluation.statistics import t_factor

_SDS = 1.96  # Bland & Altman 1986: 95 % of normal differences lie within
_ALIKE = 1e-9  # volumes that differ by less than this share are one volume and rounding

Volumes = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Predicted against annotated volume. The identity line, predicted = annotated, has slope 1 and intercept 0.

    Attributes:
        n: number of patients.
        slope: of the least-squares line, mL predicted per mL annotated.
        intercept: of that line, in mL.
        slope_low: lower end of the slope's t interval.
        slope_high: its upper end.
        r: Pearson's correlation; NaN where all predicted volumes are equal.
        bias_ml: mean of predicted − annotated in mL; positive where too much is predicted.
        sd_ml: standard deviation (n − 1) of those differences in mL.
        limits_low_ml: bias − 1.96 SD in mL.
        limits_high_ml: bias + 1.96 SD in mL.
        confidence: of the slope's interval and of the band.
        residual_sd_ml: deviation of the points from the line in mL (n − 2).
        annotated_mean_ml: mean annotated volume in mL.
        annotated_squares: sum of (annotated − mean)² in mL².
    """

    n: int
    slope: float
    intercept: float
    slope_low: float
    slope_high: float
    r: float
    bias_ml: float
    sd_ml: float
    limits_low_ml: float
    limits_high_ml: float
    confidence: float
    residual_sd_ml: float
    annotated_mean_ml: float
    annotated_squares: float

    def line(self, x_ml: ArrayLike) -> tuple[Volumes, Volumes, Volumes]:
        """Return the fitted line and the confidence band of the mean prediction (not of single patients).

        The half width is t · s · √(1/n + (x − x̄)² / Σ(xᵢ − x̄)²), t with n − 2 degrees of freedom and s the residual
        deviation.

        Args:
            x_ml: annotated volumes in mL, of any shape.

        Returns:
            Predicted volume, lower and upper end of the band, in mL and of that shape.
        """
        x = np.asarray(x_ml, dtype=np.float64)
        y = self.intercept + self.slope * x
        error = self.residual_sd_ml * np.sqrt(1 / self.n + (x - self.annotated_mean_ml) ** 2 / self.annotated_squares)
        reach = t_factor(self.confidence, self.n - 2) * error
        return y, y - reach, y + reach


def agreement(predicted_ml: Sequence[float], annotated_ml: Sequence[float], *, confidence: float = 0.95) -> Agreement:
    """Compare predicted with annotated volumes.

    Args:
        predicted_ml: one volume per patient in mL.
        annotated_ml: the volumes of the same patients, in the same order.
        confidence: of the slope's interval and of the line's band, between 0 and 1. The limits of agreement are
            1.96 SD whatever it is.

    Raises:
        SegraftError: the lengths differ, there are fewer than 3 patients, a volume is negative or not finite, all
            annotated volumes are equal, or the confidence is not between 0 and 1.
    """
    predicted, annotated = (np.asarray(values, dtype=np.float64) for values in (predicted_ml, annotated_ml))
    _check(predicted, annotated)
    fit = stats.linregress(annotated, predicted)
    slope, intercept = float(fit.slope), float(fit.intercept)
    # Not SciPy's standard error: from 1 − r² it is lost to rounding where r is near 1, and NaN where r is.
    residuals = predicted - (intercept + slope * annotated)
    residual_sd = float(np.sqrt(residuals @ residuals / (annotated.size - 2)))
    centred = annotated - annotated.mean()
    squares = float(centred @ centred)
    reach = t_factor(confidence, annotated.size - 2) * residual_sd / squares**0.5
    difference = predicted - annotated
    bias, sd = float(difference.mean()), float(difference.std(ddof=1))
    return Agreement(
        n=annotated.size,
        slope=slope,
        intercept=intercept,
        slope_low=slope - reach,
        slope_high=slope + reach,
        r=float(fit.rvalue) if np.ptp(predicted) else np.nan,
        bias_ml=bias,
        sd_ml=sd,
        limits_low_ml=bias - _SDS * sd,
        limits_high_ml=bias + _SDS * sd,
        confidence=confidence,
        residual_sd_ml=residual_sd,
        annotated_mean_ml=float(annotated.mean()),
        annotated_squares=squares,
    )


def _check(predicted: Volumes, annotated: Volumes) -> None:
    if annotated.ndim != 1 or predicted.shape != annotated.shape:
        raise SegraftError(
            f"Predicted {predicted.shape} and annotated volumes {annotated.shape} are not one number per patient each: "
            "give both for the same patients."
        )
    if annotated.size < 3:
        raise SegraftError(f"{annotated.size} volumes do not make a fitted line: evaluate at least 3 patients.")
    for what, volumes in (("predicted", predicted), ("annotated", annotated)):
        wrong = volumes[~(np.isfinite(volumes) & (volumes >= 0))]
        if wrong.size:
            raise SegraftError(f"A {what} volume of {wrong[0]} mL cannot be: check the mask and its voxel spacing.")
    if np.ptp(annotated) <= _ALIKE * annotated.max():
        raise SegraftError(
            f"All annotated volumes are {annotated[0]} mL, to which no line can be fitted: "
            "evaluate patients with different volumes."
        )
