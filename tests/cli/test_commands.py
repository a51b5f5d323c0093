"""The commands in the order a user needs them, what they print, and what they leave behind."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

COMMANDS = ("pretrain", "adapt", "predict", "evaluate", "params", "inspect", "demo")
TABLE_3 = (21_633, 29_441, 64_138, 71_946, 55_621, 47_813)


def test_pretrain_tells_what_it_made(work):
    told = json.loads((work / "pretrain.json").read_text())
    assert told["path"] == str(work / "base" / "base.safetensors")
    assert told["labels"] == {"1": "core"}
    assert len(told["cases"]) == 4
    assert len(told["training"]["losses"]) == 2
    with safe_open(told["path"], framework="pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys()) == told["parameters"]  # noqa: SIM118


def test_adapt_tells_what_it_made(work):
    told = json.loads((work / "adapt.json").read_text())
    adapter = work / "run" / "adapter.safetensors"
    assert told["path"] == str(adapter)
    assert told["bytes"] == adapter.stat().st_size
    assert told["labels"] == {"2": "rim"}
    assert len(told["cases"]) == 3
    with safe_open(adapter, framework="pt") as file:
        held = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert told["parameters"]["trainable"] == held


def test_a_finished_training_leaves_its_result_and_what_was_asked_for(work):
    assert {path.name for path in (work / "base").iterdir()} == {"base.safetensors", "run.json"}
    assert {"adapter.safetensors", "run.json"} <= {path.name for path in (work / "run").iterdir()}
    assert not list(work.rglob(".*"))


def test_the_commands_of_the_readme_in_their_order(segraft, work, tmp_path, tiny):
    """Once with the tables for people."""
    data, base, run = work / "D" / "dataset.json", tmp_path / "base", tmp_path / "run"
    scan = work / "D" / "imagesTr" / "p7.nii.gz"
    steps = {
        "pretrain": ("--data", data, "--labels", "1", "--network", "unet3d", "--out", base, *tiny),
        "adapt": ("--base", base, "--data", data, "--labels", "2", "--shots", "3", "--epochs", "1", "--out", run),
        "predict": (run / "adapter.safetensors", scan, "-o", tmp_path / "mask.nii.gz"),
        "evaluate": (run / "adapter.safetensors", "--data", data),
        "params": ("--network", "unet", "--network-args", '{"widths": [4, 8]}', "--method", "dora_c", "--rank", "8"),
        "inspect": (run / "adapter.safetensors",),
    }
    shown = {}
    for command, arguments in steps.items():
        outcome = segraft(command, *arguments)
        assert outcome.code == 0, outcome.err
        shown[command] = outcome.out
    assert str(base / "base.safetensors") in shown["pretrain"]
    assert str(run / "adapter.safetensors") in shown["adapt"]
    assert (tmp_path / "mask.nii.gz").is_file()
    assert "p7.nii.gz" in shown["predict"]
    assert {"evaluation.csv", "evaluation.json"} <= {path.name for path in run.iterdir()}
    assert "rim" in shown["evaluate"]
    assert "all" in shown["evaluate"]
    assert "dora_c" in shown["inspect"]


@pytest.mark.parametrize("scans", [("p6.nii.gz",), ("p6.nii.gz", "p7.nii.gz"), ("",)], ids=["file", "files", "folder"])
def test_predict_a_file_several_files_a_folder(segraft, work, tmp_path, scans):
    images = work / "D" / "imagesTr"
    told = segraft("predict", work / "run", *(images / scan for scan in scans), "-o", tmp_path / "masks", "--json").json
    expected = sorted(images.iterdir()) if scans == ("",) else [images / scan for scan in scans]
    assert [mask["scan"] for mask in told["masks"]] == [str(path) for path in expected]
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == [path.name for path in expected]
    for mask in told["masks"]:
        written = nib.load(mask["mask"])
        voxels = np.count_nonzero(np.asanyarray(written.dataobj) == 2)
        assert mask["volumes_ml"] == {"rim": pytest.approx(voxels * 1.5 / 1000)}


def test_evaluate_leaves_csv_and_json_beside_the_adapter(segraft, work):
    outcome = segraft("evaluate", work / "run", "--data", work / "D", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json == json.loads((work / "run" / "evaluation.json").read_text())
    rows = pd.read_csv(work / "run" / "evaluation.csv")
    assert list(rows["case"]) == outcome.json["record"]["cases"]
    assert rows["dice"].mean() == pytest.approx(outcome.json["summary"]["all"]["dice_mean"])
    assert (rows["name"] == "rim").all()


def test_the_scores_are_those_of_the_masks(segraft, work, tmp_path):
    """Dice of the table against the mask that `predict` wrote, by hand."""
    rows = segraft("evaluate", work / "run", "--data", work / "D", "--out", tmp_path, "--json").json["cases"]
    for row in rows:
        name = f"{row['case']}.nii.gz"
        assert segraft("predict", work / "run", work / "D" / "imagesTr" / name, "-o", tmp_path / name).code == 0
        mask = np.asanyarray(nib.load(tmp_path / name).dataobj) == 2
        truth = np.asanyarray(nib.load(work / "D" / "labelsTr" / name).dataobj) == 2
        assert row["dice"] == pytest.approx(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
        assert row["truth_ml"] == pytest.approx(truth.sum() * 1.5 / 1000)


def test_evaluate_a_base(segraft, work, tmp_path):
    outcome = segraft("evaluate", work / "base", "--data", work / "D", "--out", tmp_path / "scores", "--json")
    assert outcome.code == 0, outcome.err
    assert {row["name"] for row in outcome.json["cases"]} == {"core"}
    assert (tmp_path / "scores" / "evaluation.csv").is_file()


def test_evaluate_labels_that_stand_for_the_models(segraft, work, tmp_path):
    """The base segments label 1; on this cohort its output is held against label 2."""
    outcome = segraft("evaluate", work / "base", "--data", work / "D", "--labels", "rim", "--out", tmp_path, "--json")
    assert {(row["label"], row["name"]) for row in outcome.json["cases"]} == {(2, "rim")}


def test_params_of_the_paper(segraft):
    told = segraft("params", "--paper", "sah", "--json").json
    assert tuple(row["at_one"] for row in told["rows"]) == TABLE_3
    shown = segraft("params", "--paper", "sah").out
    assert all(f"{count:,}" in shown for count in TABLE_3)


def test_params_add_up(segraft):
    told = segraft(
        "params", "--network", "unet3d", "--network-args", '{"widths": [4, 8]}', "--train", "head", "--json"
    ).json
    assert told["trainable"] == sum(row["trainable"] for row in told["rows"])
    assert any(row["part"] == "head" and row["trainable"] for row in told["rows"])


def test_params_tell_the_state_of_a_training_beside_that_of_full_fine_tuning(segraft):
    arguments = ("params", "--network", "unet3d", "--network-args", '{"widths": [4, 8]}', "--rank", "2")
    told = segraft(*arguments, "--json").json
    state, full = told["state_bytes"], told["full_state_bytes"]
    assert state["parameters"] == state["gradients"] == 4 * told["trainable"]
    assert state["optimiser"] == 2 * 4 * told["trainable"]
    assert state["trainable"] == 4 * 4 * told["trainable"]
    assert state["frozen"] == 4 * told["frozen"]
    assert (full["trainable"], full["frozen"]) == (4 * state["frozen"], 0)
    shown = segraft(*arguments).out
    for each in (state, full):
        assert all(f"{value / 1e6:,.3f}" in shown for value in each.values())


@pytest.mark.parametrize("kind", ["adapter", "base"])
def test_inspect(segraft, work, kind):
    path = work / {"adapter": "run", "base": "base"}[kind]
    told = segraft("inspect", path, "--json").json
    fingerprint = json.loads((work / "pretrain.json").read_text())["fingerprint"]
    assert told["kind"] == kind
    assert told["base fingerprint" if kind == "adapter" else "fingerprint"] == fingerprint
    assert told["labels"] == ({"2": "rim"} if kind == "adapter" else {"1": "core"})
    assert told == segraft("inspect", path / f"{kind}.safetensors", "--json").json
    assert fingerprint[:16] in segraft("inspect", path).out


def test_inspect_tells_a_base_by_what_is_in_it(segraft, work, tmp_path):
    (tmp_path / "brain.safetensors").write_bytes((work / "base" / "base.safetensors").read_bytes())
    assert segraft("inspect", tmp_path / "brain.safetensors", "--json").json["kind"] == "base"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_the_common_options(segraft, command):
    outcome = segraft(command, "--help")
    assert outcome.code == 0
    assert "Example" in outcome.out
    assert f"segraft {command}" in outcome.out
    for option in ("--seed", "--device", "--precision", "--json"):
        assert option in outcome.out


def test_version(segraft):
    from segraft import __version__

    assert segraft("--version").out == f"{__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["adapt", "--help"], ["--version"]])
def test_help_waits_for_no_heavy_library(arguments):
    script = (
        "import sys\n"
        f"sys.argv = ['segraft', *{arguments!r}]\n"
        "from segraft.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print([name for name in ('torch', 'monai', 'lightning', 'pandas', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_json_keeps_to_one_document_when_training_prints_progress(fresh, work, tmp_path):
    outcome = fresh(
        *("adapt", "--base", work / "base", "--data", work / "D", "--labels", "2", "--shots", "2", "--epochs", "1"),
        *("--out", tmp_path / "run", "--json"),
    )
    assert outcome.json["path"] == str(tmp_path / "run" / "adapter.safetensors")
    assert outcome.err == ""


def test_json_of_an_error_is_one_document_too(segraft, tmp_path):
    outcome = segraft("inspect", tmp_path / "nothing.safetensors", "--json")
    assert outcome.code == 2
    assert f"segraft: {outcome.json['error']}\n" == outcome.err
