"""Tables, summaries and files of results."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segraft.errors import SegraftError
from segraft.evaluation.results import (
    CaseResult,
    by_stratum,
    evaluate_case,
    mean_sd,
    readable,
    save_results,
    summary,
    table,
)

AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])


def result(case, label, dice, *, name=None, distance=1.0, truth=10.0):
    return CaseResult(case, label, name or f"organ {label}", dice, distance, truth, truth)


UNEQUAL = [result("a", 2, 0.9), result("a", 1, 0.5), result("b", 1, 0.7)]


# ---- one case ----


def test_every_label_is_measured_apart():
    truth = np.zeros((4, 4, 4), dtype=np.uint8)
    truth[0, :, 0], truth[1, :, 0] = 1, 3
    prediction = truth.copy()
    prediction[0, 2:, 0] = 0
    first, second, third = evaluate_case("a", prediction, truth, {3: "c", 1: "a", 2: "b"}, AFFINE)
    assert first == CaseResult("a", 3, "c", 1.0, 0.0, pytest.approx(0.08), pytest.approx(0.08))
    assert second.dice == pytest.approx(2 * 2 / (2 * 2 + 2))
    assert second.hausdorff95_mm == pytest.approx(np.percentile([0, 0, 2, 4], 95))
    assert (second.volume_ml, second.truth_ml) == (pytest.approx(0.04), pytest.approx(0.08))
    assert (third.dice, third.hausdorff95_mm, third.truth_ml) == (1.0, 0.0, 0.0)  # absent in both


def test_label_maps_may_be_floats_on_disk():
    labels = np.random.default_rng(0).integers(0, 3, (4, 4, 4))
    names = {1: "a", 2: "b"}
    assert evaluate_case("a", labels.astype(np.float32), labels, names, AFFINE) == evaluate_case(
        "a", labels, labels, names, AFFINE
    )


BLANK = np.zeros((3, 3, 3), dtype=int)


@pytest.mark.parametrize(
    ("prediction", "truth", "labels", "affine"),
    [
        (BLANK[:2], BLANK, {1: "a"}, AFFINE),
        (BLANK[0], BLANK[0], {1: "a"}, AFFINE),
        (BLANK + 0.4, BLANK, {1: "a"}, AFFINE),
        (BLANK, BLANK * math.nan, {1: "a"}, AFFINE),
        (BLANK, BLANK, {}, AFFINE),
        (BLANK, BLANK, {0: "background", 1: "a"}, AFFINE),
        (BLANK, BLANK, {1: "a", 2: "a"}, AFFINE),
        (BLANK, BLANK, {1: "all"}, AFFINE),
        (BLANK, BLANK, {1: "a"}, np.zeros((4, 4))),
    ],
    ids=["shape", "slice", "probabilities", "nan", "no labels", "background", "one name", "all", "affine"],
)
def test_bad_input_is_refused(prediction, truth, labels, affine):
    with pytest.raises(SegraftError, match=r"^[^\n]+: [^\n]+\.$"):
        evaluate_case("case 7", prediction, truth, labels, affine)


# ---- tables ----


def test_table_has_a_row_per_case_and_label():
    frame = table(UNEQUAL)
    assert list(frame.columns) == ["case", "label", "name", "dice", "hausdorff95_mm", "volume_ml", "truth_ml"]
    assert list(zip(frame["case"], frame["label"], strict=True)) == [("a", 2), ("a", 1), ("b", 1)]
    assert list(table([]).columns) == list(frame.columns)


def test_summary_is_over_rows_and_in_the_order_of_labels():
    frame = summary(UNEQUAL)
    assert list(frame.index) == ["organ 1", "organ 2", "all"]
    assert list(frame["n"]) == [2, 1, 3]
    assert list(frame["dice_mean"]) == pytest.approx([0.6, 0.9, 0.7])  # a mean of label means would be 0.75
    assert frame.loc["organ 1", "dice_sd"] == pytest.approx(math.sqrt(0.02))  # n - 1: (0.1² + 0.1²) / 1
    assert math.isnan(frame.loc["organ 2", "dice_sd"])
    assert frame.loc["all", "hausdorff95_mm_sd"] == 0


def test_strata_are_by_annotated_volume():
    rows = [result("a", 1, 0.2, truth=25), result("b", 1, 0.4, truth=3), result("c", 1, 0.9, truth=120)]
    frame = by_stratum(rows)
    assert list(frame.index) == ["(0, 25]", "(25, 50]", "(50, 100]", "(100, 300]"]
    assert list(frame["n"]) == [2, 0, 0, 1]
    assert frame.loc["(0, 25]", "dice_mean"] == pytest.approx(0.3)
    assert frame["dice_mean"].isna().tolist() == [False, True, True, False]


def test_no_case_falls_out_of_the_strata():
    rows = [result(str(ml), 1, 0.5, truth=ml) for ml in (0, 10, 30, 60, 200, 1000)]
    frame = by_stratum(rows)
    assert list(frame.index) == ["none", "(0, 25]", "(25, 50]", "(50, 100]", "(100, 300]", ">300"]
    assert list(frame["n"]) == [1] * 6


@pytest.mark.parametrize("function", [summary, by_stratum])
def test_nothing_cannot_be_summarised(function):
    with pytest.raises(SegraftError, match="evaluate at least one case"):
        function([])


@pytest.mark.parametrize(
    ("values", "digits", "text"),
    [
        ([0.572 - 0.17, 0.572, 0.572 + 0.17], 3, "0.572 (0.17)"),
        ([1, 2, 3], 1, "2.0 (1.0)"),
        ([1, 2, 3], 0, "2 (1)"),
        ([0.5], 3, "0.500 (–)"),
        ([], 3, "–"),
    ],
)
def test_mean_and_sd_as_papers_print_them(values, digits, text):
    assert mean_sd(values, digits) == text


def test_readable_says_the_same_as_mean_sd():
    shown = readable(summary(UNEQUAL))
    assert list(shown.columns) == ["Label", "n", "Dice, mean (SD)", "HD95 (mm), mean (SD)"]
    assert list(shown["Dice, mean (SD)"]) == [mean_sd([0.5, 0.7]), "0.900 (–)", mean_sd([0.9, 0.5, 0.7])]
    strata = readable(by_stratum(UNEQUAL))
    assert list(strata["Dice, mean (SD)"]) == [mean_sd([0.9, 0.5, 0.7]), "–", "–", "–"]
    assert list(readable(table(UNEQUAL)).columns)[:3] == ["Case", "Label", "Structure"]


# ---- files ----


def strict(text):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_files_hold_what_was_measured(tmp_path):
    record = {
        "base": Path("base.safetensors"),
        "when": datetime(2024, 5, 1, tzinfo=UTC),
        "loss": np.float32("nan"),
        "best": np.float64(0.25),
        "rates": np.array([0.1, math.inf]),
        "seed": np.int64(3),
        "case": UNEQUAL[0],
    }
    csv, json_file = save_results(UNEQUAL, tmp_path / "new" / "folder", record=record)
    assert csv == tmp_path / "new" / "folder" / "evaluation.csv"
    assert json_file.name == "evaluation.json"
    pd.testing.assert_frame_equal(pd.read_csv(csv), table(UNEQUAL))
    content = strict(json_file.read_text("utf-8"))
    assert content["cases"] == table(UNEQUAL).to_dict(orient="records")
    assert content["summary"]["organ 2"]["dice_sd"] is None
    assert content["summary"]["all"]["dice_mean"] == pytest.approx(0.7)
    assert content["by_stratum"]["(0, 25]"]["n"] == 3
    assert content["record"]["base"] == "base.safetensors"
    assert content["record"]["when"].startswith("2024-05-01T00:00:00")
    assert (content["record"]["loss"], content["record"]["best"], content["record"]["seed"]) == (None, 0.25, 3)
    assert content["record"]["rates"] == [0.1, None]
    assert content["record"]["case"]["dice"] == 0.9
    assert sorted(path.name for path in csv.parent.iterdir()) == ["evaluation.csv", "evaluation.json"]


@given(case=st.text(min_size=1, max_size=20), dice=st.floats(0, 1), distance=st.floats(0, 1e6))
def test_numbers_and_names_survive_json(case, dice, distance, tmp_path_factory):
    try:
        case.encode()
    except UnicodeEncodeError:
        return
    folder = tmp_path_factory.mktemp("results")
    rows = [result(case, 1, dice, distance=distance)]
    _, path = save_results(rows, folder)
    assert [CaseResult(**row) for row in strict(path.read_text("utf-8"))["cases"]] == rows


def test_nothing_is_left_when_writing_fails(tmp_path):
    (tmp_path / "evaluation.json").mkdir()
    with pytest.raises(SegraftError, match="another output"):
        save_results(UNEQUAL, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_earlier_evaluation_survives_a_failed_one(tmp_path):
    csv, json_file = save_results(UNEQUAL, tmp_path)
    before = csv.read_bytes(), json_file.read_bytes()
    with pytest.raises(SegraftError):
        save_results([], tmp_path)
    with pytest.raises(Exception, match="object"):
        save_results(UNEQUAL[:1], tmp_path, record={"what": object()})
    assert (csv.read_bytes(), json_file.read_bytes()) == before


@pytest.mark.data
def test_a_real_mask_against_itself_and_against_nothing(real_data):
    import nibabel as nib

    image = nib.load(min((real_data / "hippocampus" / "labelsTr").glob("*.nii*")))
    truth = np.asarray(image.dataobj)
    labels = {1: "anterior", 2: "posterior"}
    for row in evaluate_case("same", truth, truth, labels, image.affine):
        assert (row.dice, row.hausdorff95_mm) == (1.0, 0.0)
        assert row.volume_ml == row.truth_ml
        assert 0.3 < row.truth_ml < 4  # what half a hippocampus measures
    missed = evaluate_case("missed", np.zeros_like(truth), truth, labels, image.affine)
    assert [row.dice for row in missed] == [0, 0]
