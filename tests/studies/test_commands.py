"""`segraft study run` and `segraft study show`, called as a user calls them."""

import json
import re
import shutil
import time

import nibabel as nib
import numpy as np
import pytest

from segraft.studies.planning import PLAN, Plan, plan
from segraft.studies.run import Runs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def refused(segraft, tmp_path):
    """refused(*arguments): the one sentence that the command ends with; nothing was written."""

    def call(*arguments):
        before = set(tmp_path.rglob("*"))
        code, out, err = segraft(*arguments)
        assert (code, out) == (2, ""), err
        assert re.fullmatch(r"segraft: [^\n]+\.\n", err), err
        assert set(tmp_path.rglob("*")) == before
        return err

    return call


def test_a_study_is_run_and_shown(segraft, write_study, tmp_path, undisturbed, traces):
    out = tmp_path / "out"
    code, said, progress = segraft("run", write_study(), "--out", out, "--device", "cpu")
    assert code == 0, progress
    assert said == f"{out / 'report.html'}: 11 runs done, 0 before, 0 failed\n"
    assert re.search(r"10/10 all \(unet\) without fold 3, seed 0 \([0-9a-f]{16}\) done, \d+ s", progress)
    assert traces(out) == traces(undisturbed)
    results = (out / "results.json").read_bytes()

    code, said, progress = segraft("run", write_study(), "--out", out, "--device", "cpu")
    assert (code, said) == (0, f"{out / 'report.html'}: 0 runs done, 11 before, 0 failed\n")
    assert "done" not in progress
    assert (out / "results.json").read_bytes() == results

    code, said, err = segraft("show", out, "--json")
    assert (code, err) == (0, "")
    shown = json.loads(said, parse_constant=pytest.fail)  # no NaN
    assert shown == json.loads(results)
    assert shown["study"] == "tiny"
    assert set(shown["arms"]) == {"conv_lora 1 (unet)", "none (unet)", "all (unet)"}
    assert all(set(arm["dice"]) == {f"p{i}" for i in range(9)} for arm in shown["arms"].values())
    assert (shown["failures"], shown["waiting"]) == ({}, [])
    assert shown["reference"] in {"none (unet)", "all (unet)"}
    assert shown["tests"].keys() == {"conv_lora 1 (unet)"}

    code, said, err = segraft("show", out)
    assert code == 0
    for words in ("conv_lora 1", "Wilcoxon", "mL", "report.html"):
        assert words in said


def test_a_study_may_move(segraft, undisturbed, tmp_path, monkeypatch):
    """Its folder and the one it is called from: what it found stands in it."""
    moved = shutil.copytree(undisturbed, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    code, said, _ = segraft("show", "moved", "--json")
    assert code == 0
    assert json.loads(said) == json.loads((undisturbed / "results.json").read_text())
    assert "cannot be read" not in (moved / "report.html").read_text()


def test_cohorts_may_be_given_on_the_command_line(segraft, write_study, cohorts, tmp_path, monkeypatch):
    """As seen from here, and not from the study's file."""
    path = write_study(data=None, pretrain_data=None, arms=[{"base": "unet"}])
    monkeypatch.chdir(cohorts)
    out = tmp_path / "deep" / "out"
    options = ("--data", "target/dataset.json", "--pretrain-data", "source", "--out", out, "--device", "cpu")
    code, said, err = segraft("run", path, *options)
    assert code == 0, err
    assert ": 2 runs done" in said
    monkeypatch.chdir("/")
    assert segraft("show", out)[0] == 0
    assert "cannot be read" not in (out / "report.html").read_text()


@pytest.fixture
def failing(write_study, own_cohorts):
    """A study of two bases, one of which draws patients with a bad label; and that label."""
    unet = {"network": "unet", "arguments": {"widths": [2, 4], "norm": "instance"}, "training": {"epochs": 2}}
    path = own_cohorts / "source" / "labelsTr" / "q3-s1.nii.gz"
    label = nib.load(path)
    good = np.asanyarray(label.dataobj)
    wrong = good.copy()
    wrong[0, 0, 0] = 7
    nib.save(nib.Nifti1Image(wrong, label.affine), path)
    return (
        write_study(
            data=str(own_cohorts / "target"),
            pretrain_data=str(own_cohorts / "source"),
            bases={"few": {**unet, "patients": 2}, "many": unet},
            arms=[
                {"base": "few", "strategies": ["none", "all"]},
                {"base": "many", "strategies": ["none"]},
                {"base": "few", "strategies": ["full"], "training": {"epochs": 30, "learning_rate": 1e30}},
            ],
        ),
        path,
        nib.Nifti1Image(good, label.affine),
    )


def test_failed_runs_are_reported_and_the_others_go_on(segraft, failing, tmp_path):
    study, path, good = failing
    out = tmp_path / "out"
    code, said, err = segraft("run", study, "--out", out, "--device", "cpu")
    assert code == 1
    assert "5 runs done, 0 before, 4 failed, 1 wait for a base" in said
    assert f"the label {path} holds the value 7" in err
    assert "lower the learning rate" in err

    code, said, _ = segraft("show", out, "--json")
    shown = json.loads(said)
    assert code == 0
    assert len(shown["failures"]) == 4
    assert any(str(path) in reason for reason in shown["failures"].values())
    assert len(shown["waiting"]) == 1  # the arm of the base that failed
    assert shown["arms"]["all (few)"]["dice"].keys() == {f"p{i}" for i in range(9)}
    assert [each["name"] for each in shown["strategies"]] == ["none (few)", "all (few)"]
    report = (out / "report.html").read_text()
    assert "holds the value 7" in report
    assert "full (few)" in report

    nib.save(good, path)
    code, said, err = segraft("run", study, "--out", out, "--device", "cpu")
    assert code == 1
    assert "2 runs done, 5 before, 3 failed" in said
    assert str(path) not in err


def test_a_study_may_be_shown_before_anything_is_done(segraft, make_study, tmp_path):
    plan(make_study(), Runs(tmp_path / "runs"), device="cpu").write(tmp_path / PLAN)
    code, said, err = segraft("show", tmp_path, "--json")
    assert code == 0, err
    shown = json.loads(said)
    assert len(shown["waiting"]) == 11
    assert shown["best"] is None
    code, said, err = segraft("show", tmp_path)
    assert code == 0, err


def test_the_smoke_study_ends_in_under_a_minute(segraft, cohorts, tmp_path):
    """Of this process's own time, so that a busy machine makes no difference."""
    before = time.process_time()
    data = ("--data", cohorts / "target", "--pretrain-data", cohorts / "source")
    code, said, err = segraft("run", "smoke", *data, "--out", tmp_path / "smoke", "--device", "cpu")
    assert time.process_time() - before < 60
    assert code == 0, err
    assert ", 0 failed" in said
    shown = json.loads(segraft("show", tmp_path / "smoke", "--json")[1])
    assert shown["study"] == "smoke"
    assert shown["methods"]
    assert shown["nested"]
    assert shown["strategies"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["smok", "--out", "{}/out"], "no study 'smok'"),
        (["{}/no.yaml", "--out", "{}/out"], "no.yaml"),
        (["smoke", "--out", "{}/out"], "--data"),
        (["smoke", "--out", "{}/out", "--data", "{}/no", "--pretrain-data", "{}/no"], "no"),
        (["smoke", "--out", "{}/out", "--engine", "slurm"], "slurm"),
        (["smoke", "--out", "{}/out", "--workers", "0"], "workers"),
        (["smoke"], "out"),
    ],
    ids=str,
)
def test_bad_input_of_run_is_one_sentence(refused, tmp_path, arguments, says):
    assert says in refused("run", *(each.format(tmp_path) for each in arguments))


def test_an_unknown_device_is_refused(refused, write_study, tmp_path):
    assert "tpu" in refused("run", write_study(), "--out", tmp_path / "out", "--device", "tpu")


def test_out_that_holds_another_study_is_refused(refused, write_study, make_study, tmp_path):
    Plan(make_study(name="another"), {}, (), {}, {}).write(tmp_path / "out" / PLAN)
    assert "holds the study another" in refused("run", write_study(), "--out", tmp_path / "out", "--device", "cpu")


def test_out_that_is_a_file_is_refused(refused, write_study, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "cannot be written" in refused("run", write_study(), "--out", tmp_path / "out", "--device", "cpu")


def test_a_folder_without_a_study_cannot_be_shown(refused, tmp_path):
    assert str(tmp_path) in refused("show", tmp_path)
    assert "nowhere" in refused("show", tmp_path / "nowhere")


def test_a_folder_without_a_study_is_refused_as_json_too(segraft, tmp_path):
    code, said, _ = segraft("show", tmp_path, "--json")
    assert code == 2
    assert str(tmp_path) in json.loads(said)["error"]
