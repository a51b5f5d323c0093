"""Whether one arm of a study scores higher than another on the same patients.

An arm is what was trained (a method at its rank, a strategy); its scores are one number per patient, higher being
better. The comparison is that of the haemorrhage paper's Table 6: a paired one-sided t-test and a Wilcoxon signed-rank
test of each arm against a reference, each corrected over the arms by Benjamini and Hochberg.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from segraft.errors import SegraftError

_DECIMALS = 10  # a Dice score moves by more than 1e-10 with a single voxel; what is below is rounding


@dataclass(frozen=True)
class PairedTest:
    """How the scores of an arm differ from those of a reference on the same patients.

    Attributes:
        n: number of pairs.
        mean_difference: mean of score − reference.
        ci_low: lower end of the two-sided t interval of the mean difference.
        ci_high: its upper end.
        t: the t statistic, with n − 1 degrees of freedom.
        p_t: one-sided p of the t-test, against "the arm scores higher".
        w: sum of the ranks of the positive differences.
        p_wilcoxon: one-sided p of the signed-rank test, against "the arm scores higher".
    """

    n: int
    mean_difference: float
    ci_low: float
    ci_high: float
    t: float
    p_t: float
    w: float
    p_wilcoxon: float


def paired(scores: Sequence[float], reference: Sequence[float], *, confidence: float = 0.95) -> PairedTest:
    """Test whether scores are higher than the reference's, pair by pair.

    Differences are rounded to 10 decimals first, so that equal scores that were averaged in another order are equal.

    *t-test*: where all differences are one number c, their deviation is 0 and the interval is [c, c]. Then c > 0 gives
    t = ∞ and p = 0, c < 0 gives t = −∞ and p = 1, and c = 0, where t is 0/0, gives t = 0 and p = 1: nothing speaks
    for the arm.

    *Wilcoxon* (1945): pairs without a difference are left out (SciPy's `zero_method="wilcox"`), and p is taken from
    the exact distribution of W (`method="exact"`) for every number of pairs. SciPy's "auto" would change to a normal
    approximation where a single pair has no difference, as two empty predictions have. Equal differences share
    their mean rank; W is then rounded down, towards the larger p, which is no longer exact. Without any
    difference W = 0 and p = 1.

    Args:
        scores: one number per patient.
        reference: the numbers of the same patients, in the same order.
        confidence: of the interval, between 0 and 1.

    Raises:
        SegraftError: the lengths differ, there are fewer than 2 pairs, a number is not finite, or the confidence is
            not between 0 and 1.
    """
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (scores, reference))
    if ours.ndim != 1 or ours.shape != theirs.shape:
        raise SegraftError(
            f"Scores {ours.shape} and reference {theirs.shape} are not one number per patient each: "
            "give both for the same patients."
        )
    if ours.size < 2:
        raise SegraftError(f"{ours.size} pairs of scores cannot be tested: evaluate at least 2 patients.")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise SegraftError("A score is not a finite number: leave that patient out of both arms or measure it again.")
    difference = (ours - theirs).round(_DECIMALS)
    mean, error = _mean_and_error(difference)
    reach = t_factor(confidence, difference.size - 1) * error
    t, p_t = _t_test(difference)
    w, p_wilcoxon = _signed_rank(difference)
    return PairedTest(difference.size, mean, mean - reach, mean + reach, t, p_t, w, p_wilcoxon)


def adjusted(p_values: Sequence[float]) -> tuple[float, ...]:
    """Correct p values for their number, controlling the false discovery rate (Benjamini & Hochberg 1995).

    Args:
        p_values: one per test, in any order; the order is kept.

    Raises:
        SegraftError: a value is not between 0 and 1.
    """
    values = np.asarray(p_values, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise SegraftError(f"The p values {values.tolist()} must all lie between 0 and 1: test again.")
    return tuple(stats.false_discovery_control(values, method="bh").tolist()) if values.size else ()


def compare(scores: Mapping[str, Mapping[str, float]], reference: str, *, confidence: float = 0.95) -> pd.DataFrame:
    """Test every other arm against a reference, patient by patient.

    Args:
        scores: name of the arm → name of the patient → score. The order of the patients does not matter.
        reference: the arm that the others are compared with.
        confidence: of the intervals, between 0 and 1.

    Returns:
        One row per other arm, in their order; index `arm`, columns: the fields of `PairedTest`, `p_t_adjusted` and
        `p_wilcoxon_adjusted`, each corrected over the rows.

    Raises:
        SegraftError: the reference is not among the arms or the only one, an arm lacks a patient that another has,
            or `paired` refuses the scores.
    """
    _check_arms(scores, [reference])
    others = [arm for arm in scores if arm != reference]
    if not others:
        raise SegraftError(f"There is nothing to compare {reference} with: give the scores of another arm.")
    patients = _patients(scores, scores)
    theirs = [scores[reference][patient] for patient in patients]
    tests = [paired([scores[arm][patient] for patient in patients], theirs, confidence=confidence) for arm in others]
    frame = pd.DataFrame([asdict(test) for test in tests], index=pd.Index(others, name="arm"))
    for column in ("p_t", "p_wilcoxon"):
        frame[f"{column}_adjusted"] = adjusted(frame[column].tolist())
    return frame


def best_arm(scores: Mapping[str, Mapping[str, float]], among: Sequence[str]) -> str:
    """Return the arm with the highest mean score; of several, the first in the order of `among`.

    Args:
        scores: name of the arm → name of the patient → score.
        among: the arms to choose from.

    Raises:
        SegraftError: `among` is empty or names an arm without scores, an arm lacks a patient that another has, or a
            score is not finite.
    """
    if not among:
        raise SegraftError("There are no arms to choose the best from: name at least one.")
    _check_arms(scores, among)
    patients = _patients(scores, among)
    return max(among, key=lambda arm: math.fsum(scores[arm][patient] for patient in patients))


def t_factor(confidence: float, degrees: int) -> float:
    """Return how many standard errors a two-sided t interval reaches to either side, such as 2.045 for 0.95 and 29.

    Raises:
        SegraftError: the confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise SegraftError(f"A confidence of {confidence} cannot be: give a number between 0 and 1, such as 0.95.")
    return float(stats.t.isf((1 - confidence) / 2, degrees))


def _mean_and_error(difference: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and its standard error; of equal numbers exactly that number and 0, which a rounded mean would miss."""
    if np.ptp(difference) == 0:
        return float(difference[0]), 0.0
    return float(difference.mean()), float(stats.sem(difference))


def _t_test(difference: NDArray[np.float64]) -> tuple[float, float]:
    if np.ptp(difference) == 0:
        sign = float(np.sign(difference[0]))
        return (sign * math.inf if sign else 0.0), (0.0 if sign > 0 else 1.0)
    test = stats.ttest_1samp(difference, 0, alternative="greater")
    return float(test.statistic), float(test.pvalue)


def _signed_rank(difference: NDArray[np.float64]) -> tuple[float, float]:
    """W of the positive differences and P(W or more), asked for as P(W of the negative ones or less).

    Both are the same by symmetry, but SciPy computes the tail above as 1 − the rest: of 60 positive differences p
    would be 0, and for some numbers of pairs it would be slightly below.
    """
    count = np.count_nonzero(difference)
    if not count:
        return 0.0, 1.0
    test = stats.wilcoxon(-difference, alternative="less", method="exact", zero_method="wilcox")
    return count * (count + 1) / 2 - float(test.statistic), float(test.pvalue)


def _check_arms(scores: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
    for name in names:
        if name not in scores:
            raise SegraftError(f"There are no scores of {name}: give one of {', '.join(scores) or 'no arms'}.")


def _patients(scores: Mapping[str, Mapping[str, float]], arms: Mapping[str, object] | Sequence[str]) -> list[str]:
    """The patients that all these arms have, sorted, so that results do not depend on their order."""
    everyone = {patient for arm in arms for patient in scores[arm]}
    if not everyone:
        raise SegraftError(f"{', '.join(arms)}: there are no patients with scores: evaluate at least 2.")
    for arm in arms:
        for patient in sorted(everyone):
            if patient not in scores[arm]:
                raise SegraftError(f"{arm} has no score of patient {patient}, others have: evaluate it there too.")
            if not math.isfinite(scores[arm][patient]):
                raise SegraftError(f"{arm}: the score of patient {patient} is not a finite number: measure it again.")
    return sorted(everyone)
