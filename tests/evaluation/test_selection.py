"""Choosing the rank: by hand, against pandas, and who has a say in it."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segraft.errors import SegraftError
from segraft.evaluation.selection import COLUMNS, best_on_all, nested, scores_of_choice
from segraft.evaluation.statistics import compare

FOLDS = (0, 1, 2)


def study(dice, *, methods=("lora",), ranks=(2, 4), seeds=(0,), per_fold=2, folds=FOLDS):
    """All runs of a study; `dice(method, rank, seed, held_out, patient, fold)` is the score of a row."""
    held_out = [(k,) for k in folds] + list(combinations(folds, 2))
    rows = [
        (method, rank, seed, held, f"p{fold}{place}", fold, dice(method, rank, seed, held, f"p{fold}{place}", fold))
        for method in methods
        for rank in ranks
        for seed in seeds
        for held in held_out
        for fold in held
        for place in range(per_fold)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def noise(seed, **options):
    rng = np.random.default_rng(seed)
    return study(lambda *_: rng.uniform(0, 1), **options)


def by_pandas(frame, held_out):
    """Mean over patients of the mean over seeds, by method and rank, of the rows with these (held out, fold)."""
    kept = frame[[(held, fold) in held_out for held, fold in zip(frame["held_out"], frame["fold"], strict=True)]]
    return kept.groupby(["method", "rank", "patient"])["dice"].mean().groupby(["method", "rank"]).mean()


def test_both_choices_by_hand():
    # One patient a fold. Predicted by the outer models:   rank 2: 0.6, 0.6, 0.6   rank 4: 0.9, 0.5, 0.5
    outer = {2: (0.6, 0.6, 0.6), 4: (0.9, 0.5, 0.5)}
    # By models without two folds (patient of fold j, other fold k):
    inner = {
        2: {(0, 1): 0.5, (0, 2): 0.5, (1, 0): 0.5, (1, 2): 0.5, (2, 0): 0.5, (2, 1): 0.5},
        4: {(0, 1): 0.9, (0, 2): 0.4, (1, 0): 0.2, (1, 2): 0.4, (2, 0): 0.6, (2, 1): 0.3},
    }

    def dice(method, rank, seed, held, patient, fold):
        others = [k for k in held if k != fold]
        return inner[rank][fold, others[0]] if others else outer[rank][fold]

    frame = study(dice, per_fold=1)
    # 1.9 / 3 against 1.8 / 3
    assert best_on_all(frame) == {"lora": 4}
    # For fold 0, patients 1 and 2 without fold 0: 0.2 + 0.6 against 1.0; for 1: 0.9 + 0.3; for 2: 0.4 + 0.4.
    choice = nested(frame)
    assert choice == {("lora", 0): 2, ("lora", 1): 4, ("lora", 2): 2}
    assert scores_of_choice(frame, {"lora": 4}) == {"lora": {"p00": 0.9, "p10": 0.5, "p20": 0.5}}
    assert scores_of_choice(frame, choice) == {"lora": {"p00": 0.6, "p10": 0.5, "p20": 0.6}}


@pytest.mark.parametrize("folds", [(0, 1, 2), (3, 5, 7, 8, 9)])
def test_choices_are_those_of_pandas(folds):
    frame = noise(0, methods=("b", "a"), ranks=(8, 2, 4), seeds=(3, 1), per_fold=3, folds=folds)
    means = by_pandas(frame, {((k,), k) for k in folds})
    on_all, inside = best_on_all(frame), nested(frame)
    assert list(on_all) == ["b", "a"]
    assert on_all == {method: means[method].idxmax() for method in "ab"}
    for k in folds:
        means = by_pandas(frame, {(tuple(sorted((j, k))), j) for j in folds if j != k})
        assert [inside[method, k] for method in "ab"] == [means[method].idxmax() for method in "ab"]
    for choice, rank in ((on_all, lambda method, _: on_all[method]), (inside, lambda *key: inside[key])):
        chosen = scores_of_choice(frame, choice)
        expected = frame[frame["held_out"].map(len) == 1]
        expected = expected[
            [rank(m, k) == r for m, k, r in expected[["method", "fold", "rank"]].itertuples(index=False)]
        ]
        expected = expected.groupby(["method", "patient"])["dice"].mean()
        assert {(method, patient) for method in chosen for patient in chosen[method]} == set(expected.index)
        for method, patient in expected.index:
            assert chosen[method][patient] == pytest.approx(expected[method, patient])


@given(st.integers(0, 1000), st.sampled_from(FOLDS), st.data())
def test_no_patient_of_a_fold_has_a_say_in_its_choice(seed, k, data):
    frame = noise(seed, ranks=(2, 4, 8))
    before = nested(frame)
    inside = frame["fold"] == k
    others = st.lists(st.floats(0, 1), min_size=int(inside.sum()), max_size=int(inside.sum()))
    frame.loc[inside, "dice"] = data.draw(others)
    assert nested(frame)["lora", k] == before["lora", k]


@given(st.integers(0, 1000), st.sampled_from(FOLDS))
def test_no_model_that_saw_a_fold_has_a_say_in_its_choice(seed, k):
    frame = noise(seed, ranks=(2, 4, 8))
    before = nested(frame)
    frame.loc[[k not in held for held in frame["held_out"]], "dice"] = 0.5
    assert nested(frame)["lora", k] == before["lora", k]


def test_the_first_kind_is_optimistic_where_ranks_differ_by_chance_alone():
    reported = []
    for seed in range(150):
        frame = noise(seed, ranks=(2, 4, 8, 16), per_fold=3)
        choices = best_on_all(frame), nested(frame)
        reported.append([np.mean(list(scores_of_choice(frame, choice)["lora"].values())) for choice in choices])
    on_all, inside = np.mean(reported, axis=0)
    # Every expected score is 1/2. The best of four means of nine, each of SD √(1/12)/3 = 0.096, is 1.03 SD above it.
    error = np.sqrt(1 / 12) / 3 / np.sqrt(150)
    assert abs(inside - 0.5) < 3 * error
    assert on_all - 0.5 == pytest.approx(1.03 * np.sqrt(1 / 12) / 3, abs=3 * error)


@pytest.mark.parametrize("choose", [best_on_all, nested])
def test_of_equal_ranks_the_smaller_is_taken(choose):
    assert (0.1 + 0.2) / 2 > 0.15  # by rounding alone
    values = {16: (0.2, 0.1), 8: (0.1, 0.2), 2: (0.15, 0.15)}
    frame = study(lambda _m, rank, seed, *_: values[rank][seed], ranks=(16, 8, 2), seeds=(0, 1))
    assert set(choose(frame).values()) == {2}


def test_a_patient_with_many_scans_counts_once():
    # Rank 2: patients 0.9 and 0.1, 0.1. Rank 4: 0.4 and 0.4, 0.4. By patient 0.5 > 0.4, by row 0.37 < 0.4.
    frame = study(lambda _m, rank, *_: {2: 0.9, 4: 0.4}[rank], per_fold=2)
    second = frame["patient"].str.endswith("1")
    frame.loc[second & (frame["rank"] == 2), "dice"] = 0.1
    frame = pd.concat([frame, frame[second], frame[second]])
    assert best_on_all(frame) == {"lora": 2}
    assert set(nested(frame).values()) == {2}
    assert scores_of_choice(frame, {"lora": 2})["lora"]["p01"] == pytest.approx(0.1)


def test_held_out_may_be_sets_or_tuples_in_any_order():
    frame = noise(1)
    turned = frame.assign(held_out=[tuple(reversed(held)) for held in frame["held_out"]])
    sets = frame.assign(held_out=[frozenset(held) for held in frame["held_out"]])
    shuffled = sets.sample(frac=1, random_state=0)
    for other in (turned, sets, shuffled):
        assert best_on_all(other) == best_on_all(frame)
        assert nested(other) == nested(frame)


def test_rows_of_patients_that_a_model_was_trained_on_are_not_used():
    frame = noise(2)
    seen = frame.assign(held_out=[((fold + 1) % 3,) for fold in frame["fold"]], dice=1.0).drop_duplicates(COLUMNS[:6])
    both = pd.concat([frame, seen])
    assert (best_on_all(both), nested(both)) == (best_on_all(frame), nested(frame))


def test_a_strategy_without_ranks_needs_no_inner_runs():
    frame = pd.concat([noise(3), noise(4, methods=("decoder",), ranks=(0,))])
    frame = frame[(frame["method"] == "lora") | (frame["held_out"].map(len) == 1)]
    choice = nested(frame)
    assert {choice["decoder", k] for k in FOLDS} == {0}
    scores = scores_of_choice(frame, choice)
    assert compare(scores, "decoder").loc["lora", "n"] == 6


def test_inner_runs_may_have_fewer_seeds():
    frame = noise(5, seeds=(0, 1, 2))
    one = frame[(frame["held_out"].map(len) == 1) | (frame["seed"] == 0)]
    assert best_on_all(one) == best_on_all(frame)
    assert set(nested(one)) == set(nested(frame))


# ---- what is missing ----


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    ("held_out", "folds"), [((1,), r"\{1\}"), ((0, 2), r"\{0, 2\}")], ids=["outer run", "inner run"]
)
def test_a_failed_run_is_named(method, held_out, folds):
    frame = noise(6, methods=("lora", "dora"), seeds=(0, 1))
    run = (frame[["method", "rank", "seed"]] == [method, 4, 1]).all(axis=1) & (frame["held_out"] == held_out)
    message = rf"^Scores of {method} at rank 4 are missing.*held out are {folds} \(first: seed 1, patient p\d0\)"
    with pytest.raises(SegraftError, match=message):
        (best_on_all if len(held_out) == 1 else nested)(frame[~run])
    if len(held_out) == 1:
        with pytest.raises(SegraftError, match=message):
            scores_of_choice(frame[~run], {method: 4})


def test_a_failed_scan_is_named():
    frame = pd.concat([noise(7), noise(8)], ignore_index=True)  # two scans a patient
    rows = frame[(frame["patient"] == "p21") & (frame["rank"] == 2) & (frame["held_out"].map(len) == 1)]
    with pytest.raises(SegraftError, match=r"lora at rank 2 .* held out are \{2\} \(first: seed 0, patient p21\)"):
        best_on_all(frame.drop(rows.index[0]))


def test_a_study_without_inner_runs_has_no_nested_choice():
    frame = noise(9)
    outer = frame[frame["held_out"].map(len) == 1]
    assert best_on_all(outer) == best_on_all(frame)
    with pytest.raises(SegraftError, match=r"lora at rank 2 .* held out are \{0, 1\} and \{0, 2\}"):
        nested(outer)


def test_two_folds_cannot_be_nested():
    with pytest.raises(SegraftError, match="use 3 folds or more"):
        nested(noise(10, folds=(0, 1)))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"dora": 4}, "Scores of dora at rank 4 are missing"),
        ({"lora": 3}, "Scores of lora at rank 3 are missing"),
        ({("lora", 0): 4, ("lora", 1): 4}, r"for folds \{0, 1\}, the scores have \{0, 1, 2\}"),
        ({("lora", k): 4 for k in range(4)}, r"for folds \{0, 1, 2, 3\}"),
    ],
)
def test_a_choice_from_another_table_is_refused(choice, message):
    with pytest.raises(SegraftError, match=message):
        scores_of_choice(noise(11), choice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns=["seed", "fold"]), "no column seed, fold"),
        (lambda frame: frame[:0], "no rows"),
        (lambda frame: frame.assign(rank=frame["rank"] + 0.5), "column rank .* whole numbers"),
        (lambda frame: frame.assign(seed=None), "column seed .* whole numbers"),
        (lambda frame: frame.assign(patient=None), "column patient .* names"),
        (lambda frame: frame.assign(dice="good"), "column dice .* numbers"),
        (lambda frame: frame.assign(dice=float("nan")), "Dice of patient p00 is nan"),
        (lambda frame: frame.assign(dice=57.2), "Dice of patient p00 is 57.2, not between 0 and 1"),
        (lambda frame: frame.assign(held_out="(0,)"), "held_out is '\\(0,\\)'"),
        (lambda frame: frame.assign(held_out=[("0",)] * len(frame)), "held_out is"),
        (lambda frame: frame.assign(patient="p"), "Patient p is in 3 folds"),
    ],
)
@pytest.mark.parametrize("function", [best_on_all, nested, lambda frame: scores_of_choice(frame, {"lora": 2})])
def test_a_wrong_table_is_refused(change, message, function):
    with pytest.raises(SegraftError, match=message):
        function(change(noise(12)))
