"""A study of scans with two channels and two regions that overlap, from its plan to its report."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segraft.data.cohort import Cohort
from segraft.errors import SegraftError
from segraft.jobs.evaluating import measure
from segraft.jobs.model import Segmentation
from segraft.studies.planning import PLAN, Plan, plan
from segraft.studies.report import write_study_report
from segraft.studies.run import Run, Runs
from segraft.studies.running import run_study
from segraft.studies.scores import collect

SHAPE = (16, 16, 4)
REGIONS = ["all of it=1+2", "middle=2"]


@pytest.fixture
def two_channels(tmp_path: Path) -> Path:
    """`target` and `source`, as of `cohorts`, but of two channels, and label 2 within label 1."""
    rng = np.random.default_rng(0)
    for name, patients in (("target", [f"p{number}" for number in range(4)]), ("source", ["q0", "q1"])):
        entries = []
        for patient in patients:
            label = np.zeros(SHAPE, np.uint8)
            x, y = rng.integers(1, 6, 2)
            label[x : x + 8, y : y + 8], label[x + 2 : x + 6, y + 2 : y + 6] = 1, 2
            files = {channel: f"{patient}-s0_{channel}.nii.gz" for channel in ("t1", "t2")}
            arrays = {file: rng.normal(0, 1, SHAPE) + 4 * label for file in files.values()}
            (tmp_path / name).mkdir(exist_ok=True)
            for file, array in {**arrays, f"{patient}-label.nii.gz": label}.items():
                data = array.astype(np.uint8 if array.dtype == np.uint8 else np.float32)
                nib.save(nib.Nifti1Image(data, np.diag([5, 5, 10, 1])), tmp_path / name / file)
            entries.append({"image": files, "label": f"{patient}-label.nii.gz"})
        listing = {"modality": {"0": "t1", "1": "t2"}, "labels": {"1": "core", "2": "rim"}, "training": entries}
        (tmp_path / name / "dataset.json").write_text(json.dumps(listing))
    return tmp_path


def test_a_study(make_study, two_channels, tmp_path):
    changes = {
        "labels": REGIONS,
        "pretrain_labels": REGIONS,
        "folds": 2,
        "arms": [{"base": "unet", "methods": ["conv_lora"], "ranks": [1]}, {"base": "unet", "strategies": ["none"]}],
    }
    out = tmp_path / "out"
    result = run_study(make_study(two_channels, **changes), out, device="cpu")
    assert not result.failures
    runs = [Run.read(folder) for folder in sorted((out / "runs").iterdir()) if folder.is_dir()]
    for run in runs:
        assert [list(pair) for pair in run.identity["labels"]] == [
            ["all of it=1+2", "all of it"],
            ["middle=2", "middle"],
        ]
        assert [[key, list(covers)] for key, covers in run.identity["regions"]] == [["1", [1, 2]], ["2", [2]]]
    tested = next(run for run in runs if run.kind == "adapt" and run.train)
    rows = json.loads((out / "runs" / tested.key / "evaluation.json").read_text())["cases"]
    for row in rows:
        label = two_channels / "target" / f"{row['case'].removesuffix('-s0')}-label.nii.gz"
        truth = np.asanyarray(nib.load(label).dataobj)
        least = {"all of it": 1, "middle": 2}[row["name"]]
        assert row["truth_ml"] == pytest.approx((truth >= least).sum() * 0.25)
    assert {row["case"] for row in rows} <= {f"p{number}-s0" for number in range(4)}
    again = run_study(make_study(two_channels, **changes), out, device="cpu")
    assert (again.done, again.failures) == (0, {})
    write_study_report(out)
    assert (out / "report.html").is_file()
    # What regions share counts once, in the truth and in what was found.
    made = Plan.read(out / PLAN)
    annotated = collect(made, Runs(out / "runs")).annotated_ml()
    assert annotated == {
        patient: pytest.approx(np.count_nonzero(nib.load(two_channels / f"target/{patient}-label.nii.gz").dataobj) / 4)
        for patient in ("p0", "p1", "p2", "p3")
    }


def test_regions_that_overlap_count_once(two_channels):
    """Found: one region on the left half, the other, not within it, on the upper half: three quarters together."""
    cohort = Cohort.read(two_channels / "target")
    case, labels = cohort.cases[0], cohort.select_labels(REGIONS)
    left, upper = np.zeros((2, *SHAPE), bool)
    left[:8], upper[:, 8:] = True, True
    planes = dict(zip(labels, (left, upper), strict=True))
    measured = measure(case, Segmentation(labels.painted(planes), case.load(), planes), labels)
    truth = np.asanyarray(nib.load(case.label).dataobj)
    voxel_ml = 5 * 5 * 10 / 1000
    assert [row.volume_ml for row in measured.labels] == [pytest.approx(left.size / 2 * voxel_ml)] * 2
    (together,) = measured.together
    assert together.volume_ml == pytest.approx(left.size * 3 / 4 * voxel_ml)
    assert together.truth_ml == pytest.approx(np.count_nonzero(truth) * voxel_ml)
    apart = cohort.select_labels(["core"])
    assert measure(case, Segmentation(truth == 1, case.load(), {}), apart).together == ()


def test_a_result_that_counted_twice_is_not_taken(make_study, two_channels, tmp_path):
    out, arms = tmp_path / "out", [{"base": "unet", "strategies": ["none"]}]
    run_study(
        make_study(two_channels, labels=REGIONS, pretrain_labels=REGIONS, folds=2, arms=arms, reference="none (unet)"),
        out,
        device="cpu",
    )
    (file,) = out.glob("runs/*/evaluation.json")
    content = json.loads(file.read_text())
    del content["together"]
    file.write_text(json.dumps(content))
    with pytest.raises(SegraftError, match=f"{file.parent.name} does not say what its regions"):
        write_study_report(out)


def test_what_a_region_covers_is_part_of_a_run(make_study, two_channels, tmp_path):
    keys = []
    for covers in ("2", "1"):
        made = make_study(two_channels, folds=2, labels=["all of it=1+2", f"middle={covers}"], pretrain_labels=REGIONS)
        keys.append({run.key for run in plan(made, Runs(tmp_path / "runs"), device="cpu").runs})
    assert len(keys[0] & keys[1]) == 1, "the base alone is the same"


def test_a_patient_who_served_with_one_channel(make_study, two_channels, tmp_path):
    """One of its channels is a scan of another patient: they cannot be told apart."""
    shutil.copy(two_channels / "target/p1-s0_t2.nii.gz", two_channels / "target/p3-s0_t2.nii.gz")
    with pytest.raises(SegraftError, match="has the same scan for the patients p1 and p3"):
        plan(make_study(two_channels, folds=2), Runs(tmp_path / "runs"), device="cpu")
