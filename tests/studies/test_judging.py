"""From the numbers of runs to what a study says: hand-computed, on runs that nobody trained."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from segraft.evaluation.statistics import paired
from segraft.studies import tables
from segraft.studies.judging import judge, strata
from segraft.studies.planning import PLAN, Plan, Planned
from segraft.studies.reading import checked
from segraft.studies.report import as_json, write_study_report
from segraft.studies.run import FAILED, FINISHED, Runs, write_json
from segraft.studies.scores import collect
from segraft.studies.spec import arms_of

PATIENTS = {f"p{i}": i % 3 for i in range(9)}
VOLUMES = {f"p{i}": 10.0 * (i + 1) for i in range(9)}


def study(**changes):
    content = {
        "name": "toy",
        "title": "Toy",
        "bases": {"unet": {"network": "unet"}, "multi_view": {"network": "multi_view_unet"}},
        "arms": [
            {"base": "unet", "methods": ["dora_c", "cp_lora"], "ranks": [2, 8]},
            {"base": "multi_view", "strategies": ["none", "decoding"]},
        ],
        "strata_ml": [30, 60],
    }
    return checked({**content, **changes}, "toy")


def dice_of(arm, patient, held_out, seed):
    """Every arm has its own level; rank 8 is better where the paper looks, rank 2 where nested selection looks."""
    level = {"dora_c 2 (unet)": 0.6, "dora_c 8 (unet)": 0.7, "cp_lora 2 (unet)": 0.5, "cp_lora 8 (unet)": 0.5}
    level |= {"none (multi_view)": 0.2, "decoding (multi_view)": 0.55}
    turned = len(held_out) == 2 and arm.startswith("dora_c")
    base = level[arm.replace(" 2 ", " 8 ") if turned and " 2 " in arm else arm.replace(" 8 ", " 2 ") if turned else arm]
    return base + 0.01 * int(patient[1:]) + (0.001 * int(patient[1:]) ** 2 if "dora" in arm else 0) + 0.02 * seed


def written(tmp_path, study=None, *, without=(), failed=()):
    """A study's folder with results of every run but some."""
    asked = study or globals()["study"]()
    arms = {arm.name: arm for group in asked.arms for arm in arms_of(group)}
    planned = [Planned(f"base-{name}", name) for name in asked.bases]
    for name, arm in arms.items():
        held = [(0, 1, 2)] if arm.trains_nothing else [(0,), (1,), (2,)]
        if asked.nested and arm.rank is not None:
            held += [(0, 1), (0, 2), (1, 2)]
        for seed in (0,) if arm.trains_nothing else asked.seeds:
            for out in held:
                key = f"{name} {'-'.join(map(str, out))} {seed}".replace(" ", "_")
                planned.append(Planned(key, name, out, seed, f"base-{arm.base}"))
    plan = Plan(asked, arms, tuple(planned), PATIENTS, {f"{p}_scan": p for p in PATIENTS})
    plan.write(tmp_path / PLAN)
    runs = Runs(tmp_path / "runs")
    for run in planned:
        folder = runs.folder(run.key)
        folder.mkdir(parents=True)
        if run.key in failed:
            write_json(folder / FAILED, {"reason": "it broke", "traceback": ""})
        if run.key in without or run.key in failed:
            continue
        cases = [
            {
                "case": f"{patient}_scan", "label": 1, "name": "blood",
                "dice": dice_of(run.arm, patient, run.held_out, run.seed), "hausdorff95_mm": 1.0,
                "volume_ml": 0.9 * VOLUMES[patient] + 2, "truth_ml": VOLUMES[patient],
            }
            for patient, fold in PATIENTS.items()
            if fold in run.held_out
        ]  # fmt: skip
        if run.base is not None:
            write_json(folder / "evaluation.json", {"cases": cases})
        write_json(folder / FINISHED, {"trained": 100, "bytes": 2000, "training": {"seconds": 3.0}, "seconds": 4.0})
    return Plan.read(tmp_path / PLAN), runs


def test_each_patient_counts_as_predicted_without_his_fold(tmp_path):
    scores = collect(*written(tmp_path))
    found = scores.dice("dora_c 8 (unet)")
    assert found == pytest.approx({p: dice_of("dora_c 8 (unet)", p, (0,), 0) for p in PATIENTS})
    assert scores.dice("none (multi_view)") == pytest.approx({p: 0.2 + 0.01 * int(p[1:]) for p in PATIENTS})
    assert scores.volumes_ml("dora_c 2 (unet)")["p3"] == pytest.approx((38.0, 40.0))
    assert not scores.missing
    assert not scores.waiting


def test_seeds_are_averaged_within_a_patient(tmp_path):
    scores = collect(*written(tmp_path, study(seeds=[0, 1])))
    assert scores.dice("cp_lora 2 (unet)")["p4"] == pytest.approx(0.5 + 0.04 + 0.01)
    assert len(scores.outer("cp_lora 2 (unet)")) == 2 * len(PATIENTS)


def test_ranks_are_chosen_as_the_paper_does_and_inside_the_training_folds(tmp_path):
    judgement = judge(collect(*written(tmp_path)))
    assert {entrant.family: entrant.ranks for entrant in judgement.methods} == {
        "dora_c (unet)": (8,),
        "cp_lora (unet)": (2,),  # of equal ranks the smaller
    }
    nested = {entrant.family: entrant for entrant in judgement.nested}
    assert nested["dora_c (unet)"].ranks == (2, 2, 2)
    assert nested["dora_c (unet)"].dice["p0"] == pytest.approx(0.6)  # of the outer run at the rank chosen inside
    assert judgement.best.name == "dora_c 8 (unet)"


def test_methods_are_tested_against_the_best_strategy(tmp_path):
    scores = collect(*written(tmp_path))
    judgement = judge(scores)
    assert judgement.reference.name == "decoding (multi_view)"
    ours, theirs = scores.dice("dora_c 8 (unet)"), scores.dice("decoding (multi_view)")
    by_hand = paired([ours[p] for p in sorted(ours)], [theirs[p] for p in sorted(ours)])
    row = judgement.tests.loc["dora_c 8 (unet)"]
    assert row["p_t"] == pytest.approx(by_hand.p_t)
    assert row["mean_difference"] == pytest.approx(0.15 + 0.001 * np.mean([i**2 for i in range(9)]))
    # Benjamini-Hochberg over two tests: the larger p stays, the smaller is at most doubled.
    other = judgement.tests.loc["cp_lora 2 (unet)"]
    assert other["p_t_adjusted"] == pytest.approx(other["p_t"])
    assert row["p_t_adjusted"] == pytest.approx(2 * row["p_t"])


@pytest.mark.parametrize(
    "reference", ["decoding (multi_view)", "none (multi_view)", "cp_lora (unet)", "cp_lora 2 (unet)"]
)
def test_the_reference_may_be_named(tmp_path, reference):
    judgement = judge(collect(*written(tmp_path, study(reference=reference))))
    assert reference in (judgement.reference.name, judgement.reference.family)
    assert judgement.reference.name not in judgement.tests.index


def test_an_arm_may_be_the_reference_at_a_rank_that_is_not_the_best(tmp_path):
    scores = collect(*written(tmp_path, study(reference="dora_c 2 (unet)")))
    judgement = judge(scores)
    assert judgement.reference.dice == scores.dice("dora_c 2 (unet)")
    assert judgement.tests.loc["dora_c 8 (unet)", "mean_difference"] == pytest.approx(0.1)


def test_a_family_as_reference_is_held_against_choices_of_its_own_kind(tmp_path):
    judgement = judge(collect(*written(tmp_path, study(reference="dora_c (unet)"))))
    assert judgement.reference.name == "dora_c 8 (unet)"
    assert list(judgement.tests.index) == ["cp_lora 2 (unet)"]
    assert judgement.nested_reference.name == "dora_c 2/2/2 (unet)"
    assert list(judgement.nested_tests.index) == ["cp_lora 2/2/2 (unet)"]


def test_the_best_is_the_best_of_all(tmp_path, monkeypatch):
    plain = dice_of
    better = lambda arm, *rest: plain(arm, *rest) + (0.2 if arm.startswith("decoding") else 0)  # noqa: E731
    monkeypatch.setitem(globals(), "dice_of", better)
    written(tmp_path)
    assert "Highest mean Dice: decoding (multi_view)" in write_study_report(tmp_path).read_text()


def test_volumes_agree_as_they_were_made(tmp_path):
    found = judge(collect(*written(tmp_path))).agreement
    assert (found.slope, found.intercept) == pytest.approx((0.9, 2.0))
    assert found.bias_ml == pytest.approx(-0.1 * 50 + 2)


def test_strata():
    volumes = {"a": 0.0, "b": 25.0, "c": 25.1, "d": 301.0}
    assert strata(volumes, [25, 50, 100, 300]) == {
        "none": ("a",), "(0, 25]": ("b",), "(25, 50]": ("c",), "(50, 100]": (), "(100, 300]": (), ">300": ("d",),
    }  # fmt: skip
    thirds = strata({str(i): float(i + 1) for i in range(9)}, "tertiles")
    assert [len(patients) for patients in thirds.values()] == [3, 3, 3]
    assert strata({}, "tertiles") == {}
    close = {str(i): 1000.1 + 0.4 * i for i in range(9)}
    for ends in ("tertiles", [1000.5, 1000.9, 1003.3]):
        assert sorted(p for patients in strata(close, ends).values() for p in patients) == sorted(close)
    assert sum(map(len, strata(dict.fromkeys("abc", 2.0), "tertiles").values())) == 3


def test_by_volume_gives_mean_and_deviation_of_the_patients_of_a_stratum(tmp_path):
    scores = collect(*written(tmp_path))
    judgement = judge(scores)
    frame = tables.by_volume(judgement, judgement.strategies).set_index("")
    assert list(frame.columns) == ["(0, 30] mL, n = 3", "(30, 60] mL, n = 3", ">60 mL, n = 3", "All, n = 9"]
    assert frame.loc["none (multi_view)", "(0, 30] mL, n = 3"] == "0.210 (0.01)"


def test_what_is_missing_is_named_and_left_out_of_the_comparison(tmp_path):
    gone, broken = "dora_c_8_(unet)_1_0", "decoding_(multi_view)_0_0"
    scores = collect(*written(tmp_path, without=[gone], failed=[broken]))
    assert scores.waiting == (gone,)
    assert scores.failures == {broken: "it broke"}
    judgement = judge(scores)
    assert [entrant.name for entrant in judgement.methods] == ["dora_c 2 (unet)", "cp_lora 2 (unet)"]
    assert [entrant.name for entrant in judgement.strategies] == ["none (multi_view)"]
    assert [entrant.family for entrant in judgement.nested] == ["cp_lora (unet)"]
    said = " ".join(judgement.notes)
    assert all(name in said for name in ("dora_c 8 (unet)", "decoding (multi_view)", "dora_c (unet): its rank"))
    report = write_study_report(tmp_path).read_text()
    assert "it broke" in report
    assert "1 runs are not done" in report


def test_a_missing_inner_run_leaves_the_papers_choice_standing(tmp_path):
    judgement = judge(collect(*written(tmp_path, without=["dora_c_8_(unet)_0-2_0"])))
    assert {entrant.family for entrant in judgement.methods} == {"dora_c (unet)", "cp_lora (unet)"}
    assert [entrant.family for entrant in judgement.nested] == ["cp_lora (unet)"]


def test_nothing_at_all_is_said_plainly(tmp_path):
    plan, _ = written(tmp_path)
    empty = collect(plan, Runs(tmp_path / "elsewhere"))
    judgement = judge(empty)
    assert judgement.best is None
    assert judgement.tests is None
    assert as_json(empty, judgement)["best"] is None
    assert len(empty.waiting) == len(plan.runs)


def test_without_methods_or_nested_runs(tmp_path):
    only = study(arms=[{"base": "multi_view", "strategies": ["none", "decoding"]}], nested=False)
    judgement = judge(collect(*written(tmp_path, only)))
    assert judgement.tests is None
    assert judgement.nested == ()
    assert judgement.best.name == "decoding (multi_view)"


def test_the_report_and_its_files(tmp_path):
    written(tmp_path, study(notes=["These are phantoms."]))
    report = write_study_report(tmp_path).read_text()
    for text in (
        "These are phantoms.",
        "decoding (multi_view)",
        "dora_c 2/2/2 (unet)",
        "optimistic",
        "one-sided",
        "M1.4, M1.5, M3",
    ):
        assert text in report
    assert "The masks are not drawn" not in report  # no cohort was named, so there is nothing to draw
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arms"]["cp_lora 2 (unet)"]["runs"][0] == "cp_lora_2_(unet)_0_0"
    assert results["tests"]["dora_c 8 (unet)"]["n"] == 9
    table = pd.read_csv(tmp_path / "scores.csv")
    row = table[(table["arm"] == "dora_c 8 (unet)") & (table["patient"] == "p4")]
    assert set(row["run"]) == {"dora_c_8_(unet)_1_0", "dora_c_8_(unet)_0-1_0", "dora_c_8_(unet)_1-2_0"}
    assert (tmp_path / "figures" / "1.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "results.json").read_bytes()
    write_study_report(tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


def test_p_values_are_marked():
    frame = pd.DataFrame(
        {
            "mean_difference": [0.1] * 4, "ci_low": [0.0] * 4, "ci_high": [0.2] * 4, "n": [9] * 4,
            "p_t_adjusted": [0.05, 0.0499, 0.009, 0.00001], "p_wilcoxon_adjusted": [0.5, 0.01, 0.001, 0.0009],
        },
        index=list("abcd"),
    )  # fmt: skip
    shown = tables.tests(frame)
    assert list(shown["p, t-test"]) == ["0.0500", "0.0499*", "0.0090**", "<0.0001***"]
    assert list(shown["p, Wilcoxon"]) == ["0.5000", "0.0100*", "0.0010**", "0.0009***"]


def test_of_another_plan_the_study_is_the_same(tmp_path):
    plan, _ = written(tmp_path)
    assert Plan.read(tmp_path / PLAN) == plan
    assert replace(plan, folds={}) != plan
