"""From a study to its runs: who is held out, who pre-trains, and what a run is known by."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segraft.data.cohort import Cohort
from segraft.errors import SegraftError
from segraft.studies.planning import PLAN, Plan, plan
from segraft.studies.run import REQUEST, Run, Runs


@pytest.fixture
def planned(tmp_path):
    """planned(study): its plan, with the runs in a folder of its own."""

    def make(study, *, device="cpu"):
        return plan(study, Runs(tmp_path / "runs"), device=device)

    return make


@pytest.fixture
def request_of(tmp_path):
    """request_of(planned run): what its folder says."""
    return lambda run: Run.read(tmp_path / "runs" / run.key)


def bases(made):
    return [run for run in made.runs if run.base is None]


def keys(made):
    """(arm, folds held out, seed) -> key."""
    return {(run.arm, run.held_out, run.seed): run.key for run in made.runs}


def patients_of(case_ids):
    return {case.partition("-")[0] for case in case_ids}


def on_one_cohort(make_study, cohorts, **changes):
    source = str(cohorts / "source" / "dataset.json")
    return make_study(data=source, pretrain_data=source, pretrain_labels=["rim"], folds=2, **changes)


def test_each_patient_is_held_out_exactly_once_by_each_trained_arm(make_study, planned, request_of):
    made = planned(make_study(seeds=[0, 5]))
    assert len(made.folds) == 9
    for arm in ("conv_lora 1 (unet)", "all (unet)"):
        for seed in (0, 5):
            outer = [run for run in made.runs if (run.arm, run.seed) == (arm, seed) and len(run.held_out) == 1]
            tested = [case for run in outer for case in request_of(run).test]
            assert sorted(tested) == sorted(made.patients)
            for run in outer:
                asked = request_of(run)
                assert patients_of(asked.test) == {p for p, fold in made.folds.items() if fold in run.held_out}
                assert patients_of(asked.train) == set(made.folds) - patients_of(asked.test)


def test_scans_of_one_patient_stay_together(make_study, planned, request_of, cohorts):
    made = planned(on_one_cohort(make_study, cohorts, patients=3))
    for run in made.runs:
        asked = request_of(run)
        assert not patients_of(asked.train) & patients_of(asked.test)
        assert len(asked.train) == 2 * len(patients_of(asked.train)), "each patient has two scans"
        assert len(asked.test) == 2 * len(patients_of(asked.test))


def test_ranks_are_chosen_by_trainings_without_each_pair_of_folds(make_study, planned, request_of):
    made = planned(make_study(folds=4))
    held = [run.held_out for run in made.runs if run.arm == "conv_lora 1 (unet)"]
    assert held == [(0,), (1,), (2,), (3,), *combinations(range(4), 2)]
    pair = next(run for run in made.runs if run.held_out == (1, 3))
    assert patients_of(request_of(pair).test) == {p for p, fold in made.folds.items() if fold in (1, 3)}
    assert patients_of(request_of(pair).train) == {p for p, fold in made.folds.items() if fold not in (1, 3)}
    assert [run.held_out for run in made.runs if run.arm == "all (unet)"] == [(0,), (1,), (2,), (3,)]


def test_without_nested_choice_or_with_two_folds_there_are_no_pairs(make_study, planned):
    for changes in ({"nested": False}, {"folds": 2}):
        made = planned(make_study(**changes))
        assert {len(run.held_out) for run in made.runs if run.arm == "conv_lora 1 (unet)"} == {1}


def test_a_base_as_it_is_is_tested_once_whatever_the_seeds(make_study, planned, request_of):
    made = planned(make_study(seeds=[1, 2, 3]))
    (run,) = [run for run in made.runs if run.arm == "none (unet)"]
    assert request_of(run).train == ()
    assert sorted(request_of(run).test) == sorted(made.patients)


def test_bases_come_first_and_adaptations_know_theirs(make_study, planned):
    unet = {"network": "unet", "arguments": {"widths": [2, 4]}}
    made = planned(
        make_study(
            bases={"a": unet, "b": {**unet, "patients": 2}},
            arms=[{"base": "b", "strategies": ["all"]}, {"base": "a", "strategies": ["all"]}],
        )
    )
    assert [run.arm for run in made.runs[:2]] == ["a", "b"]
    keys = {run.arm: run.key for run in made.runs[:2]}
    assert {(run.arm, run.base) for run in made.runs[2:]} == {("all (b)", keys["b"]), ("all (a)", keys["a"])}


@pytest.mark.parametrize("taken", [2, 3])
def test_no_patient_of_the_study_pretrains_though_the_cohort_is_the_same(
    make_study, planned, request_of, cohorts, taken
):
    made = planned(on_one_cohort(make_study, cohorts, patients=taken))
    (base,) = bases(made)
    assert len(made.folds) == taken
    assert patients_of(request_of(base).train) == {"q0", "q1", "q2", "q3"} - set(made.folds)


def test_patients_are_recognised_by_any_of_their_scans_under_other_names(
    make_study, planned, request_of, own_cohorts, save_as
):
    """q1's second scan, compressed anew and renamed, is a patient of the study: q1 must not pre-train at all."""
    save_as(own_cohorts / "source" / "imagesTr" / "q1-s1.nii.gz", own_cohorts / "target" / "imagesTr" / "p3-s0.nii.gz")
    save_as(own_cohorts / "source" / "labelsTr" / "q1-s1.nii.gz", own_cohorts / "target" / "labelsTr" / "p3-s0.nii.gz")
    (base,) = bases(planned(make_study(own_cohorts)))
    assert patients_of(request_of(base).train) == {"q0", "q2", "q3"}


def test_when_all_patients_are_in_the_study_nobody_can_pretrain(make_study, planned, cohorts):
    with pytest.raises(SegraftError, match=r"every patient of .* is in the study"):
        planned(on_one_cohort(make_study, cohorts))


def test_a_base_draws_as_many_patients_as_asked(make_study, planned, request_of):
    made = planned(make_study(bases={"unet": {"network": "unet", "patients": 2}}))
    (base,) = bases(made)
    assert len(patients_of(request_of(base).train)) == 2
    assert len(request_of(base).train) == 4, "both scans of each"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": None}, "--data"),
        ({"pretrain_data": None}, "--pretrain-data"),
        ({"data": "/no/dataset.json"}, "/no/dataset.json"),
        ({"labels": ["tumour"]}, "tumour"),
        ({"pretrain_labels": ["tumour"]}, "tumour"),
        ({"patients": 10}, "only 9"),
        ({"folds": 10}, "9 patients"),
        ({"bases": {"unet": {"network": "unet", "patients": 5}}}, "only 4"),
        ({"patient_pattern": "^(x)"}, "does not match"),
    ],
    ids=str,
)
def test_what_the_cohorts_have_not_got_is_told(make_study, planned, changes, says):
    with pytest.raises(SegraftError, match=says):
        planned(make_study(**changes))


def test_a_label_that_is_not_there_is_told(make_study, planned, own_cohorts):
    missing = own_cohorts / "target" / "labelsTr" / "p4-s0.nii.gz"
    missing.unlink()
    with pytest.raises(SegraftError, match=f"{missing}.*add it"):
        planned(make_study(own_cohorts))


@pytest.fixture
def save_as():
    """save_as(to, source): the same voxels and header in a file that was written anew."""

    def save(to: Path, source: Path) -> None:
        image = nib.load(source)
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header), to)

    return save


def test_keys_do_not_change_when_folders_move_and_images_are_written_anew(make_study, planned, cohorts, tmp_path):
    before = keys(planned(make_study()))
    moved = shutil.copytree(cohorts, tmp_path / "else" / "where")
    (moved / "target").rename(moved / "renamed")
    listing = json.loads((moved / "renamed" / "dataset.json").read_text())
    for place, entry in enumerate(listing["training"]):
        image, label = (moved / "renamed" / entry[kind] for kind in ("image", "label"))
        if place % 2:
            image.with_suffix("").write_bytes(gzip.decompress(image.read_bytes()))
            image.unlink()
            entry["image"] = entry["image"].removesuffix(".gz")
        else:
            image.write_bytes(gzip.compress(gzip.decompress(image.read_bytes()), 1, mtime=5))
        entry["label"] = f"truth-{place}.nii.gz"
        label.rename(moved / "renamed" / entry["label"])
    listing["training"].reverse()
    (moved / "renamed" / "dataset.json").write_text(json.dumps(listing | {"name": "Another"}))
    after = make_study(data=str(moved / "renamed"), pretrain_data=str(moved / "source"), title="B", name="other")
    assert keys(planned(after)) == before


UNET = {"network": "unet", "arguments": {"widths": [2, 4], "norm": "instance"}}


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        ({"training": {"epochs": 3}}, "arms"),
        ({"training": {"learning_rate": 0.021}}, "arms"),
        ({"labels": ["rim"]}, "arms and none"),
        ({"preparation": {"patch": [16, 16, 1], "crop_foreground": True}}, "all"),
        ({"pretrain_labels": ["rim"]}, "all"),
        ({"bases": {"unet": {**UNET, "training": {"epochs": 11}}}}, "all"),
        ({"bases": {"unet": {**UNET, "patients": 3}}}, "all"),
        ({"bases": {"unet": {**UNET, "arguments": {"widths": [2, 4]}}}}, "all"),
        ({"split_seed": 4}, "arms"),
        ({"strata_ml": [3], "reference": "all (unet)", "about": "more", "notes": ["one"]}, "nothing"),
    ],
    ids=str,
)
def test_a_change_of_a_setting_is_another_run(make_study, planned, changes, anew):
    before = keys(planned(make_study()))
    if "training" in changes:
        changes = {"training": {**make_study().training, **changes["training"]}}
    after = keys(planned(make_study(**changes)))
    assert set(after) == set(before)
    changed = {arm for arm, held_out, seed in before if before[arm, held_out, seed] != after[arm, held_out, seed]}
    arms = {"conv_lora 1 (unet)", "all (unet)"}
    expected = {"arms": arms, "arms and none": arms | {"none (unet)"}, "nothing": set()}
    assert changed == expected.get(anew, {arm for arm, _, _ in before})


def test_the_device_is_part_of_the_key(make_study, planned):
    study = make_study()
    assert not set(keys(planned(study)).values()) & set(keys(planned(study, device="cuda")).values())


def test_the_order_of_labels_is_part_of_the_key(make_study, planned):
    """The outputs of the network stand for them in this order."""
    both, turned = (
        keys(planned(make_study(labels=order, pretrain_labels=["core", "rim"])))
        for order in (["core", "rim"], ["rim", "core"])
    )
    base = ("unet", (), 0)
    assert both[base] == turned[base]
    assert all(both[each] != turned[each] for each in both if each != base)


@pytest.mark.parametrize("what", ["voxel", "label", "spacing", "name"])
def test_a_change_of_one_scan_changes_just_the_runs_that_it_is_in(make_study, planned, request_of, own_cohorts, what):
    before = planned(make_study(own_cohorts))
    _change(own_cohorts / "target", "p4-s0", what)
    after = planned(make_study(own_cohorts))
    changed = {run.key for run in after.runs} - {run.key for run in before.runs}
    assert changed == {run.key for run in after.runs if run.base is not None}
    assert [run.key for run in bases(after)] == [run.key for run in bases(before)]


def _change(cohort, name, what):
    image, label = cohort / "imagesTr" / f"{name}.nii.gz", cohort / "labelsTr" / f"{name}.nii.gz"
    if what == "name":  # cases are told apart by it in the results, and trained in its order
        image.rename(image.with_name("p4-s1.nii.gz"))
        listing = (cohort / "dataset.json").read_text()
        (cohort / "dataset.json").write_text(listing.replace(f"imagesTr/{name}", "imagesTr/p4-s1"))
        return
    for path in (image, label):
        loaded = nib.load(path)
        data, affine = np.asanyarray(loaded.dataobj).copy(), loaded.affine
        if path is (image if what == "voxel" else label) and what != "spacing":
            data[0, 0, 0] += 1
        if what == "spacing":
            affine = affine @ np.diag([1, 1, 0.5, 1])
        nib.save(nib.Nifti1Image(data, affine), path)


def test_keys_do_not_depend_on_the_hash_seed_of_the_process(write_study, planned, make_study, tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from segraft.studies.planning import plan\n"
        "from segraft.studies.reading import read_study\n"
        "from segraft.studies.run import Runs\n"
        "made = plan(read_study(sys.argv[1]), Runs(Path(sys.argv[2])), device='cpu')\n"
        "print(*(run.key for run in made.runs))\n"
    )
    here = [run.key for run in planned(make_study()).runs]
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", code, str(write_study()), str(tmp_path / "others")],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == here
    assert sorted(path.name for path in (tmp_path / "others").iterdir()) == sorted(set(here))


def test_a_request_is_complete_in_itself(make_study, planned, tmp_path, monkeypatch, cohorts):
    """A process in another folder finds the scans: relative paths are made whole."""
    monkeypatch.chdir(cohorts)
    made = planned(make_study(data="target", pretrain_data="source"))
    for run in made.runs:
        asked = Run.read(tmp_path / "runs" / run.key)
        assert asked.key == run.key, "the identity means the same after it went through JSON"
        assert Path(asked.data).is_absolute()
        assert {case.id for case in Cohort.read(asked.data).cases} >= {*asked.train, *asked.test}
    assert made.study.data is not None
    assert made.study.data.is_absolute()


def test_a_plan_reads_as_it_was_written(make_study, planned, tmp_path):
    made = planned(make_study())
    made.write(tmp_path / PLAN)
    assert Plan.read(tmp_path / PLAN) == made


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"study": {}}', '{"study": {"name": "x"}, "runs": []}'])
def test_a_folder_without_a_plan_is_refused_in_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / PLAN).write_text(content)
    with pytest.raises(SegraftError) as refused:
        Plan.read(tmp_path / PLAN)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_planning_again_writes_the_same_requests(make_study, planned, tmp_path):
    planned(make_study())
    requests = {path: path.read_bytes() for path in tmp_path.glob(f"runs/*/{REQUEST}")}
    planned(make_study())
    assert {path: path.read_bytes() for path in tmp_path.glob(f"runs/*/{REQUEST}")} == requests
    assert len(requests) == 11


def test_one_scan_under_the_names_of_two_patients_is_refused(make_study, planned, own_cohorts):
    shutil.copy(own_cohorts / "target/imagesTr/p0-s0.nii.gz", own_cohorts / "target/imagesTr/p4-s0.nii.gz")
    with pytest.raises(SegraftError, match="the same scan for the patients p"):
        planned(make_study(own_cohorts))


def test_other_scans_of_the_studys_patients_in_the_same_folder_do_not_pretrain(
    make_study, planned, own_cohorts, request_of
):
    """Two lists of one folder, as of one hospital: a scan of each patient in either."""
    folder = own_cohorts / "source"
    content = json.loads((folder / "dataset.json").read_text())
    first = [entry for entry in content["training"] if "s0" in entry["image"]][:3]
    (folder / "first.json").write_text(json.dumps({**content, "training": first}))
    study = make_study(own_cohorts, data=str(folder / "first.json"), pretrain_data=str(folder / "dataset.json"))
    (base,) = bases(planned(study))
    assert patients_of(request_of(base).train) == {"q3"}
