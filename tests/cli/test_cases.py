"""Which cases serve: none twice unnoticed, always by patient, recognised by content."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

PATTERN = ("--patient-pattern", r"^(p\d+)_")


def served(path):
    return set(json.loads(path.read_text())["cases"])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, make_cohort, segraft, tiny):
    """Six patients with two scans each; a base from two of them, an adapter from two."""
    work = tmp_path_factory.mktemp("pairs")
    make_cohort(work / "D", [f"p{patient}_{scan}" for patient in range(6) for scan in "ab"], seed=1)
    common = ("--data", work / "D", *PATTERN, "--device", "cpu", "--epochs", "1", "--json")
    base = segraft("pretrain", *common, "--labels", "1", "--cases", "2", "--out", work / "base", *tiny[:2])
    run = segraft("adapt", *common, "--base", work / "base", "--labels", "2", "--shots", "2", "--out", work / "run")
    return work, base.json, run.json


def patients(cases):
    return {case.split("_")[0] for case in cases}


def test_adapt_prefers_cases_that_did_not_train_the_base(work):
    pretrained, adapted = served(work / "pretrain.json"), served(work / "adapt.json")
    assert not pretrained & adapted
    notes = json.loads((work / "adapt.json").read_text())["notes"]
    assert any("4 cases of Toy trained the base" in note for note in notes)


def test_evaluate_leaves_out_what_trained_adapter_and_base(segraft, work, tmp_path):
    told = segraft("evaluate", work / "run", "--data", work / "D", "--out", tmp_path, "--json").json["record"]
    trained = served(work / "pretrain.json") | served(work / "adapt.json")
    assert set(told["cases"]) == {f"p{number}" for number in range(8)} - trained
    assert any("3 cases of Toy trained the adapter" in note for note in told["notes"])
    assert any("trained the base" in note for note in told["notes"])


def test_notes_are_shown_to_people(segraft, work, tmp_path):
    shown = segraft("evaluate", work / "run", "--data", work / "D", "--out", tmp_path)
    assert "note: 3 cases of Toy trained the adapter" in shown.err


def test_where_too_few_others_remain_cases_of_the_base_serve_and_a_note_says_so(segraft, work, tmp_path):
    told = segraft("evaluate", work / "run", "--data", work / "D", "--cases", "4", "--out", tmp_path, "--json").json
    assert len(told["record"]["cases"]) == 4
    assert not set(told["record"]["cases"]) & served(work / "adapt.json")
    assert any("also trained the base" in note for note in told["record"]["notes"])


def test_renamed_files_are_recognised(segraft, work, tmp_path, make_cohort):
    """A copy of the cohort under other names, in another order, with one case that is new."""
    names = [f"x{7 - number}" for number in range(8)]
    make_cohort(tmp_path / "E", [*names, "fresh"], seed=5)
    for number, name in enumerate(names):
        for folder in ("imagesTr", "labelsTr"):
            shutil.copy(work / "D" / folder / f"p{number}.nii.gz", tmp_path / "E" / folder / f"{name}.nii.gz")
    told = segraft("evaluate", work / "run", "--data", tmp_path / "E", "--out", tmp_path, "--json").json["record"]
    trained = served(work / "pretrain.json") | served(work / "adapt.json")
    expected = {f"x{7 - int(case[1:])}" for case in {f"p{number}" for number in range(8)} - trained} | {"fresh"}
    assert set(told["cases"]) == expected


def test_a_base_under_another_name_still_knows_its_cases(segraft, work, tmp_path):
    (tmp_path / "b.safetensors").write_bytes((work / "base" / "base.safetensors").read_bytes())
    told = segraft(
        *("evaluate", work / "run", "--data", work / "D", "--base", tmp_path / "b.safetensors"),
        *("--out", tmp_path, "--json"),
    ).json["record"]
    assert not set(told["cases"]) & served(work / "pretrain.json")


def test_all_scans_of_a_patient_serve_together(pairs):
    _, base, run = pairs
    for told in (base, run):
        assert len(patients(told["cases"])) == 2
        assert len(told["cases"]) == 4
    assert not patients(base["cases"]) & patients(run["cases"])


def test_patients_who_trained_are_left_out_with_all_their_scans(pairs, segraft, tmp_path):
    work, base, run = pairs
    told = segraft("evaluate", work / "run", "--data", work / "D", *PATTERN, "--out", tmp_path, "--json").json
    assert patients(told["record"]["cases"]) == {f"p{n}" for n in range(6)} - patients(base["cases"] + run["cases"])


def test_one_known_scan_rules_out_the_patients_others(pairs, segraft, tmp_path, make_cohort):
    """A follow-up that no model has seen, of a patient whose first scan trained the adapter."""
    work, _, run = pairs
    known = run["cases"][0]
    patient = patients([known]).pop()
    make_cohort(tmp_path / "F", [f"{patient}_first", f"{patient}_later", "p99_new"], seed=9)
    shutil.copy(work / "D" / "imagesTr" / f"{known}.nii.gz", tmp_path / "F" / "imagesTr" / f"{patient}_first.nii.gz")
    shutil.copy(work / "D" / "labelsTr" / f"{known}.nii.gz", tmp_path / "F" / "labelsTr" / f"{patient}_first.nii.gz")
    told = segraft("evaluate", work / "run", "--data", tmp_path / "F", *PATTERN, "--out", tmp_path, "--json").json
    assert told["record"]["cases"] == ["p99_new"]


def test_the_same_seed_draws_the_same_and_another_another(segraft, work, tmp_path):
    drawn = []
    for place, seed in enumerate((1, 1, 2, 3)):
        told = segraft(
            *("pretrain", "--data", work / "D", "--labels", "1", "--cases", "3", "--seed", seed, "--epochs", "1"),
            *("--network-args", '{"widths": [4, 8]}', "--out", tmp_path / str(place), "--json"),
        )
        drawn.append(tuple(told.json["cases"]))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_evaluate_without_cases_that_may_serve(segraft, refused, work, tmp_path, make_cohort):
    trained = sorted(served(work / "adapt.json"))
    make_cohort(tmp_path / "E", trained)
    for name in trained:
        for folder in ("imagesTr", "labelsTr"):
            shutil.copy(work / "D" / folder / f"{name}.nii.gz", tmp_path / "E" / folder / f"{name}.nii.gz")
    says = ["dataset.json", "3 of its 3 cases trained the adapter"]
    refused("evaluate", work / "run", "--data", tmp_path / "E", "--out", tmp_path / "scores", says=says)


def test_evaluate_more_cases_than_may_serve(refused, work, tmp_path):
    refused(
        "evaluate", work / "run", "--data", work / "D", "--cases", "6", "--out", tmp_path / "s", says=["6", "has 5"]
    )


def test_fewer_cases_than_shots(refused, work, tmp_path):
    refused(
        *("adapt", "--base", work / "base", "--data", work / "D", "--labels", "2", "--shots", "9"),
        *("--out", tmp_path / "run"),
        says=["9", "8", "dataset.json"],
    )


def test_the_second_scan_of_a_patient_who_trained_never_serves(segraft, tmp_path, make_cohort, tiny):
    """The pattern that told patients in training tells them in evaluation too, without being given again."""
    names = [f"{patient}_{scan}" for patient in ("p1", "p2", "p3") for scan in "ab"]
    make_cohort(tmp_path / "D", names, seed=7)
    where = ("--data", tmp_path / "D", "--labels", "1")
    pattern = ("--patient-pattern", r"(p\d)_", "--cases", "1")
    made = segraft("pretrain", *where, *pattern, "--out", tmp_path / "base", *tiny, "--json")
    assert made.code == 0, made.err
    patient = made.json["cases"][0][:2]
    told = segraft("evaluate", tmp_path / "base", *where, "--out", tmp_path, "--json").json["record"]["cases"]
    assert len(told) == 4
    assert not [case for case in told if case.startswith(patient)]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, make_cohort, save_nifti):
    """One cohort of four in each layout: Decathlon, TotalSegmentator, and lists of either."""
    work = tmp_path_factory.mktemp("layouts")
    names = [f"p{number}" for number in range(4)]
    make_cohort(work / "decathlon", names, seed=3)
    lists = {"organs": "", "maps": ""}
    for name in names:
        case, label = work / "total" / name, work / "decathlon" / "labelsTr" / f"{name}.nii.gz"
        (case / "segmentations").mkdir(parents=True)
        shutil.copy(work / "decathlon" / "imagesTr" / f"{name}.nii.gz", case / "ct.nii.gz")
        mask = nib.load(label)
        for value, organ in ((1, "core"), (2, "rim")):
            file = case / "segmentations" / f"{organ}.nii.gz"
            save_nifti(file, (np.asanyarray(mask.dataobj) == value).astype(np.uint8), mask.affine)
            lists["organs"] += f"total/{name}/ct.nii.gz   total/{name}/segmentations/{organ}.nii.gz\n"
        lists["maps"] += f"decathlon/imagesTr/{name}.nii.gz\tdecathlon/labelsTr/{name}.nii.gz\n"
    for name, text in lists.items():
        (work / f"{name}.txt").write_text(text)
    return work


def test_a_training_is_the_same_in_every_layout(layouts, segraft, tmp_path, tiny):
    """Same cases, same labels, same weights; and each evaluates the other alike."""
    bases, scores = set(), []
    for data in ("decathlon", "total", "organs.txt", "maps.txt"):
        told = segraft(
            *("pretrain", "--data", layouts / data, "--labels", "RIM", "--cases", 2, "--out", tmp_path / data),
            *(*tiny, "--json"),
        )
        assert told.code == 0, told.err
        bases.add((told.json["fingerprint"], *told.json["cases"]))
        told = segraft(
            *("evaluate", tmp_path / "decathlon", "--data", layouts / data, "--labels", "rim"),
            *("--out", tmp_path / f"of_{data}", "--json"),
        )
        assert told.code == 0, told.err
        scores.append((tmp_path / f"of_{data}" / "evaluation.csv").read_text())
    assert len(bases) == 1
    assert all(each == scores[0] for each in scores[1:])


def test_more_shots_than_there_are_folders(layouts, segraft, refused, tmp_path, tiny):
    told = segraft(
        *("pretrain", "--data", layouts / "total", "--labels", "core", "--out", tmp_path / "base", *tiny, "--json")
    )
    assert told.code == 0, told.err
    refused(
        *("adapt", "--base", tmp_path / "base", "--data", layouts / "total", "--labels", "rim", "--shots", "9"),
        *("--out", tmp_path / "run"),
        says=["9", f"{layouts / 'total'} has 4"],
    )


def test_an_organ_that_a_folder_does_not_have(layouts, refused, tmp_path, tiny):
    asked = ("pretrain", "--data", layouts / "total", "--labels", "liver", "--out", tmp_path / "base", *tiny)
    refused(*asked, says=['no label "liver": choose among 1 (core), 2 (rim)'])


def test_a_folder_in_no_layout(refused, tmp_path, tiny):
    (tmp_path / "empty").mkdir()
    refused(
        *("pretrain", "--data", tmp_path / "empty", "--labels", "liver", "--out", tmp_path / "base", *tiny),
        says=["none of the layouts", "dataset.json", "TotalSegmentator", "FLARE'22", ".txt"],
    )
