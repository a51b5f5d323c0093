"""From the numbers of runs to what a study of shots says: hand-computed, on runs that nobody trained."""

import json
from statistics import fmean, stdev

import pandas as pd
import pytest

from segraft.evaluation.statistics import paired
from segraft.studies.designs import Planned, design_of
from segraft.studies.few_shot import judge_shots
from segraft.studies.planning import PLAN, Plan
from segraft.studies.reading import checked
from segraft.studies.report import as_json, results_of, tables_of, write_study_report
from segraft.studies.run import FAILED, FINISHED, Runs, write_json
from segraft.studies.scores import collect
from segraft.studies.spec import arms_of

PATIENTS = ("a", "b", "c", "d")
SEEDS, SHOTS = (0, 1, 4), (2, 5)
LABELS = ("liver", "spleen")
LORA, ARENA, HEAD, NONE = "lora 8 (swin)", "arena 8 (swin)", "head (swin)", "none (swin)"


def study(**changes):
    content = {
        "name": "toy",
        "title": "Toy",
        "shots": SHOTS,
        "seeds": SEEDS,
        "bases": {"swin": {"network": "swin_unetr"}},
        "arms": [
            {"base": "swin", "methods": ["lora", "arena"], "ranks": [8, 32]},
            {"base": "swin", "strategies": ["none", "head"]},
        ],
        "reference": LORA,
    }
    return checked({**content, **changes}, "toy")


def dice_of(arm, shots, seed, patient, label):
    """Whole thousandths, so that sums by hand are exact."""
    level = {NONE: 300, HEAD: 400, LORA: 500, "lora 32 (swin)": 480, ARENA: 560, "arena 32 (swin)": 570}[arm]
    place = PATIENTS.index(patient)
    more = 0 if arm == NONE else 30 * (shots == 5) + (0, 6, -3)[SEEDS.index(seed)] + place**2 * (arm == ARENA)
    return (level + more + 10 * place + (100 if label == "spleen" else 0)) / 1000


def written(tmp_path, asked=None, *, without=(), failed=(), patients=PATIENTS):
    """A study's folder with results of every run but some."""
    asked = asked or study()
    arms = {arm.name: arm for group in asked.arms for arm in arms_of(group)}
    planned = [Planned("base", "swin")]
    for name, arm in arms.items():
        for seed in (0,) if arm.trains_nothing else asked.seeds:
            for shots in (0,) if arm.trains_nothing else asked.shots:
                key = f"{name} {shots} {seed}".replace(" ", "_")
                planned.append(Planned(key, name, (), seed, "base", shots))
    # Two scans of the last patient, each half of what he counts for.
    cases = {f"{patient}{scan}": patient for patient in patients for scan in ("1", "2")[: 1 + (patient == "d")]}
    plan = Plan(asked, arms, tuple(planned), {}, cases)
    plan.write(tmp_path / PLAN)
    for run in planned:
        folder = Runs(tmp_path / "runs").folder(run.key)
        folder.mkdir(parents=True)
        if run.key in failed:
            write_json(folder / FAILED, {"reason": "it broke", "traceback": ""})
        if run.key in without or run.key in failed:
            continue
        rows = [
            {
                "case": case, "label": number, "name": label,
                "dice": dice_of(run.arm, run.shots, run.seed, patient, label) + (0.08 if case == "d2" else 0),
                "hausdorff95_mm": 1.0, "volume_ml": 9.0, "truth_ml": 10.0,
            }
            for case, patient in cases.items()
            for number, label in enumerate(LABELS)
        ] if run.base else []  # fmt: skip
        write_json(folder / "evaluation.json", {"cases": rows})
        ranks = [8.0, 7.0, 4.0 + SEEDS.index(run.seed)] if run.arm == ARENA else []
        training = None if not run.base or run.shots == 0 else {"seconds": 2.0 * run.shots, "ranks": ranks}
        count = 0 if run.shots == 0 else 1000 * (arms[run.arm].rank or 1) if run.base else None
        write_json(folder / FINISHED, {"trained": count, "bytes": 2000, "training": training})
    return Plan.read(tmp_path / PLAN), Runs(tmp_path / "runs")


def by_hand(arm, shots, seed, patient):
    """Mean over labels and scans; the second scan of d is 0.08 better."""
    both = fmean(dice_of(arm, shots, seed, patient, label) for label in LABELS)
    return both + (0.04 if patient == "d" else 0)


@pytest.mark.parametrize("arm", [LORA, ARENA, HEAD])
@pytest.mark.parametrize("shots", SHOTS)
def test_a_patient_counts_with_the_mean_over_seeds(tmp_path, arm, shots):
    standing = judge_shots(collect(*written(tmp_path))).standings[shots][arm]
    assert standing.dice == pytest.approx({p: fmean(by_hand(arm, shots, s, p) for s in SEEDS) for p in PATIENTS})
    assert standing.by_seed == pytest.approx({s: fmean(by_hand(arm, shots, s, p) for p in PATIENTS) for s in SEEDS})


def test_a_number_that_was_computed_on_paper(tmp_path):
    """lora 8, 5 shots, patient b, seed 1: 500 + 30 + 6 + 10 for the liver, 100 more for the spleen: 596 on average.

    Over seeds 590, 596, 587: 591. Over patients 580, 590, 600, 610 + 40, and with the seeds 1 more: 606.
    """
    standing = judge_shots(collect(*written(tmp_path))).standings[5][LORA]
    assert standing.dice["b"] == pytest.approx(0.591)
    assert fmean(standing.by_seed.values()) == pytest.approx(0.606)
    assert stdev(standing.by_seed.values()) == pytest.approx(stdev([0, 0.006, -0.003]))
    assert fmean(standing.labels["spleen"].values()) - fmean(standing.labels["liver"].values()) == pytest.approx(0.1)


def test_what_trains_nothing_stands_for_all_shots_without_an_sd(tmp_path):
    found = results_of_written(tmp_path)
    assert found[2].standings[2][NONE] == found[2].standings[5][NONE]
    assert found[1]["2 shots"][NONE] == found[1]["5 shots"][NONE] == "0.375 (–)"
    assert found[1]["5 shots"][LORA] == "0.606 (0.005)"


def results_of_written(tmp_path, *arguments, **options):
    """(tables by caption, the one of shots by arm, the judgement)."""
    written(tmp_path, *arguments, **options)
    scores, judgement = results_of(tmp_path)
    frames = dict(tables_of(scores, judgement))
    (first,) = (frame for caption, frame in frames.items() if caption.startswith("Dice by number of shots"))
    return frames, first.set_index("Arm"), judgement


def test_tables_have_a_column_per_number_of_shots_and_one_per_label(tmp_path):
    frames, first, _ = results_of_written(tmp_path)
    assert list(first.index) == [LORA, "lora 32 (swin)", ARENA, "arena 32 (swin)", NONE, HEAD]
    assert list(first.columns) == ["Trained parameters", "Tensors (kB)", "Training (s), 5 shots", "2 shots", "5 shots"]
    assert (first.loc[LORA, "Trained parameters"], first.loc[LORA, "Training (s), 5 shots"]) == ("8,000", "10")
    for shots in SHOTS:
        (labels,) = (frame for caption, frame in frames.items() if caption.startswith(f"{shots} shots: Dice by label"))
        assert list(labels.columns) == ["Arm", *LABELS, "Average"]
        row = labels.set_index("Arm").loc[HEAD]
        assert row["Average"] == first.loc[HEAD, f"{shots} shots"]
        assert float(row["liver"][:5]) == pytest.approx(float(row["spleen"][:5]) - 0.1)


def test_with_one_label_there_is_no_table_by_label(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.LABELS", ("liver",))
    frames, _, _ = results_of_written(tmp_path)
    assert not [caption for caption in frames if "by label" in caption]


def test_the_rank_in_use_stands_beside_the_initial_one(tmp_path):
    """At the end of the three seeds 4, 5 and 6; the fixed ranks of LoRA have none."""
    frames, _, judgement = results_of_written(tmp_path)
    (ranks,) = (frame for caption, frame in frames.items() if caption.startswith("Dice by initial rank"))
    assert list(zip(ranks["Method"], ranks["Initial rank"], strict=True)) == [
        ("lora (swin)", 8), ("lora (swin)", 32), ("arena (swin)", 8), ("arena (swin)", 32),
    ]  # fmt: skip
    assert list(ranks["Rank in use, 5 shots"]) == ["–", "–", "5.0", "–"]
    assert judgement.standings[2][ARENA].rank_in_use == pytest.approx(5)
    assert judgement.standings[2][LORA].rank_in_use is None


def test_every_arm_is_tested_against_the_reference_at_each_number_of_shots(tmp_path):
    judgement = judge_shots(collect(*written(tmp_path)))
    for shots in SHOTS:
        standings, tests = judgement.standings[shots], judgement.tests[shots]
        assert set(tests.index) == set(standings) - {LORA}
        ours, theirs = ([standings[arm].dice[p] for p in PATIENTS] for arm in (ARENA, LORA))
        expected = paired(ours, theirs)
        row = tests.loc[ARENA]
        assert (row["n"], row["p_t"], row["p_wilcoxon"]) == (4, expected.p_t, expected.p_wilcoxon)
        assert row["mean_difference"] == pytest.approx(0.060 + fmean([0, 1, 4, 9]) / 1000)
    assert judgement.best == dict.fromkeys(SHOTS, "arena 32 (swin)")


def test_the_reference_may_be_the_best_arm_without_an_adapter(tmp_path):
    judgement = judge_shots(collect(*written(tmp_path, study(reference="best strategy"))))
    assert judgement.references == dict.fromkeys(SHOTS, HEAD)


def test_what_is_missing_is_named_and_left_out_where_it_is_missing(tmp_path):
    gone, broken = "arena_8_(swin)_5_4", "lora_8_(swin)_2_0"
    _, first, judgement = results_of_written(tmp_path, without=[gone], failed=[broken])
    assert f"{ARENA}, 5 shots: one of its runs" in " ".join(judgement.notes)
    assert "2 shots: the tests' reference, lora 8 (swin), has no complete result" in " ".join(judgement.notes)
    assert first.loc[ARENA, "5 shots"] == first.loc[LORA, "2 shots"] == "–"
    assert "–" not in (first.loc[ARENA, "2 shots"], first.loc[LORA, "5 shots"])
    assert judgement.tests[2] is None
    assert ARENA not in judgement.tests[5].index
    report = write_study_report(tmp_path).read_text()
    assert "it broke" in report
    assert "1 runs are not done" in report
    assert json.loads((tmp_path / "results.json").read_text())["arms"][ARENA]["shots"].keys() == {"2"}


def test_one_test_patient_is_not_tested(tmp_path):
    judgement = judge_shots(collect(*written(tmp_path, patients=("a",))))
    assert judgement.tests == dict.fromkeys(SHOTS)
    assert "tests need two" in " ".join(judgement.notes)


def test_nothing_at_all_is_said_plainly(tmp_path):
    plan, _ = written(tmp_path)
    empty = collect(plan, Runs(tmp_path / "elsewhere"))
    judgement = judge_shots(empty)
    assert judgement.best == dict.fromkeys(SHOTS)
    assert len(judgement.notes) == len(SHOTS) * (len(plan.arms) + 1)
    assert as_json(empty, judgement)["waiting"] == [run.key for run in plan.runs]
    assert dict(tables_of(empty, judgement))


def test_the_report_and_its_files(tmp_path):
    written(tmp_path, study(notes=["These are toys."]))
    report = write_study_report(tmp_path).read_text()
    for text in ("These are toys.", "5 shots: arena 32 (swin) has the highest mean Dice", "one-sided", "SD over seeds"):
        assert text in report
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert (results["shots"], results["seeds"], results["test_patients"]) == ([2, 5], list(SEEDS), list(PATIENTS))
    arm = results["arms"][ARENA]
    assert (arm["family"], arm["rank"], arm["trained"], len(arm["runs"])) == ("arena (swin)", 8, 8000, 6)
    assert arm["shots"]["5"]["mean"] == pytest.approx(fmean(arm["shots"]["5"]["by_seed"].values()))
    assert arm["shots"]["5"]["sd"] == pytest.approx(stdev([0, 0.006, -0.003]))
    assert arm["shots"]["5"]["rank_in_use"] == 5
    assert set(arm["shots"]["5"]["labels"]) == set(LABELS)
    assert results["arms"][NONE]["shots"]["5"]["sd"] is None
    assert results["reference"] == {"2": LORA, "5": LORA}
    assert results["tests"]["5"][HEAD]["mean_difference"] == pytest.approx(-0.1)
    table = pd.read_csv(tmp_path / "scores.csv")
    assert set(table[table["arm"] == NONE]["shots"]) == {0}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"1.png", "2.png"}
    before = (tmp_path / "results.json").read_bytes()
    write_study_report(tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


def test_trainings_are_told_apart_by_their_shots(tmp_path):
    plan, _ = written(tmp_path)
    told = {run.shots: design_of(plan.study).told(run) for run in plan.runs if run.base}
    assert told == {0: "", 2: "2 shots", 5: "5 shots"}
