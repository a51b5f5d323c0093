"""Studies of shots, called as a user calls them, on tiny cohorts; and how numbers are spread over an option."""

import json
import re

import pytest
import torch

from segraft.cli.spreading import spread
from segraft.networks import build
from segraft.studies.run import REQUEST

pytestmark = pytest.mark.usefixtures("one_thread")

SHOTS = {
    "folds": None,
    "shots": [2],
    "test_patients": 4,
    "pretrain_data": None,
    "pretrain_labels": [],
    "bases": {"unet": {"network": "unet", "arguments": {"widths": [2, 4], "norm": "instance"}, "labels": ["core"]}},
    "arms": [
        {"base": "unet", "methods": ["lora"], "ranks": [1, 2], "adapter": {"targets": ["encoder"]}},
        {"base": "unet", "strategies": ["none", "bitfit_encoder + head"]},
    ],
    "reference": "lora 1 (unet)",
}


@pytest.fixture
def weights(tmp_path):
    """Of the tiny network, with outputs for two labels."""
    path = tmp_path / "weights.pt"
    net = build("unet", in_channels=1, out_channels=2, arguments={"widths": [2, 4], "norm": "instance"})
    torch.save(net.state_dict(), path)
    return path


def refused(segraft, tmp_path, *arguments):
    """The one sentence that the command ends with; nothing was written."""
    before = set(tmp_path.rglob("*"))
    code, out, err = segraft("run", *arguments, "--device", "cpu")
    assert (code, out) == (2, ""), err
    assert re.fullmatch(r"segraft: [^\n]+\.\n", err), err
    assert set(tmp_path.rglob("*")) == before
    return err


def test_a_study_of_shots_from_weights_is_run_and_shown(segraft, write_study, weights, tmp_path, traces):
    path = write_study(**SHOTS | {"bases": {"unet": SHOTS["bases"]["unet"] | {"labels": ["x", "core"]}}})
    out = tmp_path / "out"
    options = ("--weights", weights, "--device", "cpu", "--out", out)
    code, said, progress = segraft("run", *options, "--seeds", "0", "1", "--shots", "2", "4", path)
    assert code == 0, progress
    runs = 1 + 1 + 3 * 2 * 2  # the import, what trains nothing, three arms
    assert said == f"{out / 'report.html'}: {runs} runs done, 0 before, 0 failed\n"
    assert re.search(r"13/13 bitfit_encoder \+ head \(unet\) 4 shots, seed 1 \([0-9a-f]{16}\) done", progress)
    found = traces(out)

    code, said, _ = segraft("run", *options, "--shots=4", "2", "--seeds", "1", "--seeds", "0", path)
    assert (code, said) == (0, f"{out / 'report.html'}: 0 runs done, {runs} before, 0 failed\n")
    assert {name: digest for name, digest in traces(out).items() if name.startswith("runs/")} == {
        name: digest for name, digest in found.items() if name.startswith("runs/")
    }

    code, said, _ = segraft("run", *options, "--shots", "2", "4", "--seeds", "0", "1", "2", path)
    assert (code, said) == (0, f"{out / 'report.html'}: 6 runs done, {runs} before, 0 failed\n")

    code, said, err = segraft("show", out, "--json")
    assert code == 0, err
    shown = json.loads(said, parse_constant=pytest.fail)
    assert (shown["shots"], shown["seeds"], len(shown["test_patients"])) == ([2, 4], [0, 1, 2], 4)
    assert all(set(arm["shots"]) == {"2", "4"} for arm in shown["arms"].values())
    assert shown["tests"]["4"].keys() == {"lora 2 (unet)", "none (unet)", "bitfit_encoder + head (unet)"}
    assert (shown["failures"], shown["waiting"]) == ({}, [])
    code, said, _ = segraft("show", out)
    assert code == 0
    for words in ("Initial rank", "4 shots", "Wilcoxon", "report.html"):
        assert words in said
    figures = len(list((out / "figures").iterdir()))
    assert figures == 2 + 3, "ranks, parameters, and the masks of three patients"


def test_names_of_outputs_and_arguments_are_said_on_the_command_line(segraft, write_study, weights, tmp_path):
    base = {name: value for name, value in SHOTS["bases"]["unet"].items() if name != "arguments"}
    path = write_study(**SHOTS | {"bases": {"unet": base}})
    arguments = json.dumps(SHOTS["bases"]["unet"]["arguments"])
    options = ("--weights", weights, "--base-labels", "x,core", "--network-args", arguments, "--labels", "core")
    code, _, err = segraft("run", *options, "--device", "cpu", "--out", tmp_path / "out", path)
    assert code == 0, err
    report = (tmp_path / "out" / "report.html").read_text()
    for words in ("unet: ", "tensors loaded"):  # what was loaded is said on the terminal and in the report
        assert words in err
        assert words in report
    assert "--base-labels" in refused(segraft, tmp_path, "--base-labels", "x", "--out", tmp_path / "no", path)


def test_a_base_that_fails_does_so_once_and_what_needs_it_waits(segraft, write_study, weights, tmp_path):
    path = write_study(**SHOTS | {"bases": {"unet": SHOTS["bases"]["unet"] | {"labels": ["unknown"]}}})
    code, said, err = segraft("run", "--weights", weights, "--device", "cpu", "--out", tmp_path / "out", path)
    assert code == 1
    assert "0 runs done, 0 before, 1 failed" in said
    assert re.search(r"\d+ wait for a base", said), said
    assert err.count("name all outputs, in order") == 2  # as it failed, and at the end


def test_a_killed_study_goes_on_where_it_was(segraft, write_study, weights, tmp_path, traces):
    path = write_study(**SHOTS | {"bases": {"unet": SHOTS["bases"]["unet"] | {"labels": ["core", "rim"]}}})
    options = ("--weights", weights, "--device", "cpu", "--labels", "core,rim", path)
    assert segraft("run", *options, "--out", tmp_path / "whole")[0] == 0
    out, trained = tmp_path / "out", []
    assert segraft("run", *options, "--out", out)[0] == 0
    for folder in (out / "runs").iterdir():
        if "adapt" in (folder / REQUEST).read_text() and len(trained) < 2:
            trained.append(folder.name)
            (folder / "finished.json").unlink()
            for name in ("adapter.safetensors", "evaluation.json"):
                (folder / name).unlink(missing_ok=True)
    assert "2 runs done, 3 before" in segraft("run", *options, "--out", out)[1]
    assert traces(out) == traces(tmp_path / "whole")


def test_a_study_of_shots_may_pretrain(segraft, write_study, tmp_path, cohorts):
    path = write_study(**{
        **SHOTS, "pretrain_data": str(cohorts / "source"), "pretrain_labels": ["rim"], "labels": ["core"],
        "bases": {"unet": {"network": "unet", "arguments": {"widths": [2, 4]}, "training": {"epochs": 2}}},
    })  # fmt: skip
    code, said, err = segraft("run", path, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 0, err
    assert ": 5 runs done" in said


def test_weights_that_change_after_planning_are_not_taken(segraft, make_study, weights, tmp_path):
    from segraft.studies.executing import execute
    from segraft.studies.planning import plan
    from segraft.studies.reading import changed
    from segraft.studies.run import Runs

    runs = Runs(tmp_path / "runs")
    planned = plan(changed(make_study(**SHOTS), {}, weights=weights), runs, device="cpu")
    weights.write_bytes(b"other")
    assert "have changed since the study was planned" in execute(runs.folder(planned.runs[0].key)).failure


def test_a_label_that_the_base_has_not_got_fails_what_cannot_learn_it(segraft, write_study, weights, tmp_path):
    """Neither what trains nothing nor factors in the encoder alone; who trains the head goes on."""
    path = write_study(**SHOTS | {"bases": {"unet": SHOTS["bases"]["unet"] | {"labels": ["x", "y"]}}})
    code, said, err = segraft("run", path, "--weights", weights, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 1
    assert ": 2 runs done, 0 before, 3 failed" in said
    assert "no trained output for core" in err
    assert "leave the arm that trains nothing out" in err
    assert "--train head" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--shots", "6"], ["6 shots", "4 are tested on", "leaves 5"]),
        (["--shots", "2", "--test-patients", "8"], ["2 shots", "leaves 1"]),
        (["--shots", "0"], ["shots", "at least 1"]),
        (["--shots", "2", "2"], ["shots 2, 2 must differ"]),
        (["--shots", "few"], ["--shots", "integer"]),
        (["--seeds", "1", "1"], ["seeds", "differ"]),
        (["--test-patients", "0"], ["test_patients"]),
        (["--labels", "tumour"], ["tumour"]),
        (["--weights", "nowhere.pt"], ["nowhere.pt", "cannot be read"]),
    ],
    ids=str,
)
def test_bad_options_are_one_sentence(segraft, write_study, weights, tmp_path, options, says):
    given = [] if "--weights" in options else ["--weights", weights]
    message = refused(segraft, tmp_path, write_study(**SHOTS), "--out", tmp_path / "out", *given, *options)
    assert all(words in message for words in says), message


def test_shots_of_a_cross_validated_study_are_refused(segraft, write_study, tmp_path):
    message = refused(segraft, tmp_path, write_study(), "--out", tmp_path / "out", "--shots", "5")
    assert "3 folds and 5 shots" in message


def test_a_base_without_weights_needs_a_cohort_to_learn_from(segraft, write_study, tmp_path):
    message = refused(segraft, tmp_path, write_study(**SHOTS), "--out", tmp_path / "out")
    assert "--pretrain-data: give one, or --weights" in message


def test_weights_are_seen_from_the_studys_file(write_study, tmp_path, monkeypatch):
    from segraft.studies.reading import read_study

    path = write_study(**SHOTS | {"bases": {"unet": SHOTS["bases"]["unet"] | {"weights": "w.pt"}}})
    monkeypatch.chdir("/")
    assert read_study(path).bases["unet"].weights == tmp_path / "w.pt"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("--shots 5 10", "--shots 5 --shots 10"),
        ("--shots 5 --shots 10", "--shots 5 --shots 10"),
        ("--shots=5 10", "--shots=5 --shots 10"),
        ("--shots 5 10 few_shot --out 7 8", "--shots 5 --shots 10 few_shot --out 7 8"),
        ("few_shot --seeds 0 1 2 --shots 5", "few_shot --seeds 0 --seeds 1 --seeds 2 --shots 5"),
        ("--shots 5 10.yaml", "--shots 5 10.yaml"),
        ("--out 5 6", "--out 5 6"),
        ("--shots --out 3", "--shots --out 3"),
        ("--shots 5 -1", "--shots 5 --shots -1"),
        ("--shots 5 -- 10 --shots 5 6", "--shots 5 -- 10 --shots 5 6"),
        ("--shots few 5", "--shots few 5"),
        ("", ""),
    ],
)
def test_numbers_that_follow_an_option_are_its_own(given, read):
    assert spread(given.split(), {"--shots", "--seeds"}) == read.split()
