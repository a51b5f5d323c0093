"""Paired tests, their correction and intervals: by hand, by enumeration, against statsmodels."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from segraft.errors import SegraftError
from segraft.evaluation.statistics import PairedTest, adjusted, best_arm, compare, paired, t_factor

ZEROS = [0.0] * 3
scores = st.floats(0, 1)
pairs = st.lists(st.tuples(scores, scores), min_size=2, max_size=40).map(lambda rows: tuple(zip(*rows, strict=True)))
distinct = st.lists(st.integers(1, 500), min_size=2, max_size=9, unique=True)


def random_pair(seed, n):
    rng = np.random.default_rng(seed)
    reference = rng.uniform(0, 0.9, n)
    return np.clip(reference + rng.normal(0.03, 0.08, n), 0, 1), reference


def signed_rank_by_enumeration(difference):
    """P(W or more) over all signs, in plain loops; zeros are left out, no ties."""
    kept = [d for d in difference if d]
    ranks = [sum(abs(other) <= abs(d) for other in kept) for d in kept]
    w = sum(rank for rank, d in zip(ranks, kept, strict=True) if d > 0)
    sums = [
        sum(rank for rank, up in zip(ranks, signs, strict=True) if up) for signs in product((0, 1), repeat=len(kept))
    ]
    return w, sum(total >= w for total in sums) / len(sums)


# ---- one pair of arms ----


def test_three_pairs_by_hand():
    test = paired([0.5, 0.6, 0.7], [0.4, 0.4, 0.4])
    # Differences 0.1, 0.2, 0.3: mean 0.2, SD 0.1, error 0.1/√3, t = 2√3. With 2 degrees of freedom
    # P(T > t) = 1/2 − t / (2√(2 + t²)) = 1/2 − √12 / (2√14), and the 97.5 % quantile is 0.95 / √(2·0.975·0.025).
    # All three ranks are positive: W = 1 + 2 + 3, which is one of 2³ equally likely outcomes.
    reach = 0.95 / math.sqrt(2 * 0.975 * 0.025) * 0.1 / math.sqrt(3)
    assert test == PairedTest(
        n=3,
        mean_difference=pytest.approx(0.2),
        ci_low=pytest.approx(0.2 - reach),
        ci_high=pytest.approx(0.2 + reach),
        t=pytest.approx(2 * math.sqrt(3)),
        p_t=pytest.approx(0.5 - math.sqrt(12) / (2 * math.sqrt(14))),
        w=6,
        p_wilcoxon=1 / 8,
    )


def test_wilcoxons_own_example():
    # Wilcoxon 1945, Darwin's plants: the negative ranks are 10 and 14, W = 120 − 24; the exact p is 676 of 2¹⁵.
    heights = [6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75]
    test = paired(heights, [0] * 15)
    assert (test.w, test.p_wilcoxon) == (96, pytest.approx(676 / 2**15))


@pytest.mark.parametrize(
    ("difference", "w", "p"),
    [
        # Signs of the ranks 1, 2, 3 give the sums 0, 1, 2, 3, 3, 4, 5, 6.
        ([0.1, 0.1, -0.2], 3, 5 / 8),  # ranks 1.5, 1.5, 3: P(3 or more)
        ([0.1, -0.1, 0.2], 4.5, 3 / 8),  # rounded down: P(4 or more)
        ([0.1, 0, -0.2, 0, 0.3], 4, 3 / 8),  # two pairs left out
        ([-0.1, -0.2, -0.3], 0, 1),
    ],
)
def test_ties_and_pairs_without_a_difference(difference, w, p):
    test = paired(difference, [0] * len(difference))
    assert (test.w, test.p_wilcoxon) == (w, pytest.approx(p))


@given(distinct, st.lists(st.booleans(), min_size=9, max_size=9), st.integers(0, 4))
def test_wilcoxon_is_exact_without_ties(sizes, signs, zeros):
    difference = [size if up else -size for size, up in zip(sizes, signs, strict=False)] + [0] * zeros
    test = paired(difference, [0] * len(difference))
    assert (test.w, test.p_wilcoxon) == pytest.approx(signed_rank_by_enumeration(difference))


@pytest.mark.parametrize("n", [5, 30, 50])
def test_up_to_50_pairs_it_is_what_scipy_does_by_itself(n):
    ours, theirs = random_pair(n, n)
    test, peer = paired(ours, theirs), stats.wilcoxon(ours, theirs, alternative="greater")
    assert (test.w, test.p_wilcoxon) == pytest.approx((peer.statistic, peer.pvalue))


@pytest.mark.parametrize("n", [2, 31, 60, 200])
def test_a_tail_far_out_is_no_rounding_error(n):
    test = paired(np.arange(1, n + 1), np.zeros(n))
    assert test.p_wilcoxon == pytest.approx(0.5**n, rel=1e-9, abs=0)
    assert test.p_t > 0


@pytest.mark.parametrize("n", [3, 30, 400])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_t_test_and_interval_are_those_of_statsmodels(n, confidence):
    ours, theirs = random_pair(n, n)
    test, peer = paired(ours, theirs, confidence=confidence), DescrStatsW(ours - theirs)
    t, p, _ = peer.ttest_mean(0, alternative="larger")
    assert (test.t, test.p_t) == pytest.approx((t, p), rel=1e-6)
    assert (test.ci_low, test.ci_high) == pytest.approx(peer.tconfint_mean(1 - confidence), rel=1e-6)
    assert test.mean_difference == pytest.approx(peer.mean)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.98])
def test_the_interval_and_the_test_agree(confidence):
    """The interval excludes 0 just where the one-sided p is below half of what it leaves out."""
    for seed in range(60):
        test = paired(*random_pair(seed, 12), confidence=confidence)
        assert (test.ci_low > 0) == (test.p_t < (1 - confidence) / 2)


@given(pairs)
def test_any_scores_give_numbers(pair):
    ours, theirs = pair
    test, back = paired(ours, theirs), paired(theirs, ours)
    for result in (test, back):
        assert 0 <= result.p_t <= 1
        assert 0 <= result.p_wilcoxon <= 1
        assert result.ci_low <= result.mean_difference <= result.ci_high
    assert (back.mean_difference, back.ci_low, back.t) == (-test.mean_difference, -test.ci_high, -test.t)
    if any(d for d in np.round(np.subtract(ours, theirs), 10)):
        assert back.p_t == pytest.approx(1 - test.p_t)
        assert back.p_wilcoxon + test.p_wilcoxon >= 1


@given(pairs, st.randoms(use_true_random=False))
def test_the_order_of_patients_does_not_matter(pair, random):
    rows = list(zip(*pair, strict=True))
    random.shuffle(rows)
    one, other = paired(*pair), paired(*zip(*rows, strict=True))
    assert (one.w, one.p_wilcoxon) == (other.w, other.p_wilcoxon)
    assert (one.t, one.p_t) == pytest.approx((other.t, other.p_t))


@pytest.mark.parametrize(
    ("difference", "t", "p_t", "w", "p_wilcoxon"),
    [(0.1, math.inf, 0, 15, 1 / 32), (-0.1, -math.inf, 1, 0, 1), (0.0, 0, 1, 0, 1)],
)
def test_equal_differences(difference, t, p_t, w, p_wilcoxon):
    reference = [0.2, 0.3, 0.5, 0.6, 0.8]
    test = paired([score + difference for score in reference], reference)
    assert test == PairedTest(5, difference, difference, difference, t, p_t, w, p_wilcoxon)


def test_equal_scores_averaged_in_another_order_are_equal():
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    test = paired([0.1 + 0.2 + 0.3, 0.4], [0.3 + 0.2 + 0.1, 0.3])
    assert (test.w, test.p_wilcoxon) == (1, 0.5)


@pytest.mark.parametrize(
    ("ours", "theirs", "confidence", "message"),
    [
        ([0.5], [0.4], 0.95, "at least 2 patients"),
        ([], [], 0.95, "at least 2 patients"),
        (ZEROS, ZEROS[:2], 0.95, "same patients"),
        ([ZEROS], [ZEROS], 0.95, "same patients"),
        ([0.1, math.nan, 0.2], ZEROS, 0.95, "not a finite number"),
        (ZEROS, [0.1, math.inf, 0.2], 0.95, "not a finite number"),
        (ZEROS, ZEROS, 1, "between 0 and 1"),
        (ZEROS, ZEROS, 95, "between 0 and 1"),
        (ZEROS, ZEROS, math.nan, "between 0 and 1"),
    ],
)
def test_bad_pairs_are_refused(ours, theirs, confidence, message):
    with pytest.raises(SegraftError, match=message):
        paired(ours, theirs, confidence=confidence)


def test_t_factor_from_a_printed_table():
    assert [round(t_factor(0.95, degrees), 3) for degrees in (1, 2, 10, 29)] == [12.706, 4.303, 2.228, 2.045]


# ---- several tests ----


def test_benjamini_and_hochberg_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04; times 4 / rank: 0.02, 0.02, 0.04, 0.04, which grow already.
    assert adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.02, 0.04, 0.04, 0.02))
    # 0.02 · 2 / 1 = 0.04 is more than the larger p's 0.03 · 2 / 2, so it is lowered to 0.03.
    assert adjusted([0.03, 0.02]) == pytest.approx((0.03, 0.03))
    assert adjusted([]) == ()


@given(st.lists(scores, min_size=1, max_size=30))
def test_adjusted_is_that_of_statsmodels(p_values):
    assert adjusted(p_values) == pytest.approx(tuple(multipletests(p_values, method="fdr_bh")[1]))


@pytest.mark.parametrize("wrong", [math.nan, -1e-9, 1.1])
def test_what_is_no_p_value_is_refused(wrong):
    with pytest.raises(SegraftError, match="between 0 and 1"):
        adjusted([0.5, wrong])


# ---- arms by patient ----


def arms(seed=0, n=20, names=("lora", "decoder", "dora")):
    rng = np.random.default_rng(seed)
    patients = [f"p{number}" for number in rng.permutation(n)]
    base = rng.uniform(0.2, 0.8, n)
    return {
        name: dict(zip(patients, (base + rng.normal(0.02 * place, 0.05, n)).tolist(), strict=True))
        for place, name in enumerate(names)
    }


def test_each_arm_is_paired_by_patient_and_corrected_over_arms():
    table = arms()
    table["dora"] = dict(reversed(table["dora"].items()))  # another order of the patients
    frame = compare(table, "decoder", confidence=0.9)
    assert frame.index.tolist() == ["lora", "dora"]
    assert frame.index.name == "arm"
    for arm in ("lora", "dora"):
        ours, theirs = ([table[name][patient] for patient in sorted(table["lora"])] for name in (arm, "decoder"))
        assert PairedTest(**frame.loc[arm].drop(["p_t_adjusted", "p_wilcoxon_adjusted"])) == paired(
            ours, theirs, confidence=0.9
        )
    for column in ("p_t", "p_wilcoxon"):
        expected = multipletests(frame[column], method="fdr_bh")[1]
        assert frame[f"{column}_adjusted"].tolist() == pytest.approx(expected.tolist())
    assert frame["n"].tolist() == [20, 20]


def test_the_order_of_arms_changes_only_the_order_of_rows():
    table = arms(1, names="abcd")
    one, other = compare(table, "b"), compare(dict(reversed(table.items())), "b")
    assert other.index.tolist() == ["d", "c", "a"]
    assert one.equals(other.loc[one.index])


@pytest.mark.parametrize("arm", ["lora", "decoder"])
def test_a_missing_patient_is_named(arm):
    table = arms()
    del table[arm]["p7"]
    with pytest.raises(SegraftError, match=rf"^{arm} has no score of patient p7,"):
        compare(table, "decoder")
    with pytest.raises(SegraftError, match=rf"^{arm} has no score of patient p7,"):
        best_arm(table, ["lora", "decoder"])


@pytest.mark.parametrize(
    ("change", "reference", "message"),
    [
        (
            {"dora": dict.fromkeys(arms()["dora"], math.nan)},
            "decoder",
            r"^dora: the score of patient p0 is not a finite",
        ),
        ({}, "encoder", "no scores of encoder: give one of lora, decoder, dora"),
        ({name: {} for name in arms()}, "decoder", "there are no patients"),
    ],
)
def test_bad_arms_are_refused(change, reference, message):
    with pytest.raises(SegraftError, match=message):
        compare(arms() | change, reference)


def test_one_arm_has_nothing_to_be_compared_with():
    with pytest.raises(SegraftError, match="nothing to compare decoder with"):
        compare({"decoder": arms()["decoder"]}, "decoder")


def test_the_best_arm_has_the_highest_mean_and_of_equal_ones_comes_first():
    table = {
        "low": {"a": 0.2, "b": 0.5, "c": 0.1},
        "high": {"a": 0.3, "b": 0.2, "c": 0.1 + 1e-3},
        "same": {"c": 0.1 + 1e-3, "b": 0.2, "a": 0.3},
        "top": {"a": 0.9, "b": 0.9, "c": 0.9},
        "elsewhere": {"z": 1.0},
    }
    assert best_arm(table, ["high", "low", "top"]) == "top"
    assert best_arm(table, ["low", "high"]) == "low"
    assert best_arm(table, ["high", "same"]) == "high"
    assert best_arm(table, ["same", "high"]) == "same"


@given(st.permutations([0.1, 0.2, 0.3, 0.7, 0.6]))
def test_rounding_decides_no_tie(values):
    patients = "abcde"
    table = {"one": dict(zip(patients, values, strict=True)), "two": dict(zip(patients, sorted(values), strict=True))}
    assert best_arm(table, ["two", "one"]) == "two"
    assert best_arm(table, ["one", "two"]) == "one"


@pytest.mark.parametrize("among", [[], ["unknown"]])
def test_there_must_be_arms_to_choose_from(among):
    with pytest.raises(SegraftError, match=r"no arms to choose|no scores of unknown"):
        best_arm(arms(), among)
