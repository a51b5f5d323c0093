"""The same twice; interrupted and resumed; never over a result that is there."""

import json
from collections import Counter

import pytest
from safetensors.torch import load_file

from segraft.training.callbacks import EpochCheckpoint


@pytest.fixture
def adapt(segraft, work, tmp_path):
    """adapt(out, *more): a training of four epochs with dropout-free randomness of every other kind."""

    def run(out, *more):
        return segraft(
            *("adapt", "--base", work / "base", "--data", work / "D", "--labels", "2", "--shots", "2"),
            *("--epochs", "4", "--device", "cpu", "--train", "head", "--out", tmp_path / out, *more),
        )

    return run


@pytest.fixture
def interrupting(monkeypatch):
    """interrupting(epoch, error): the next trainings stop with it after that many full epochs."""

    def arrange(epochs, error):
        original, counted = EpochCheckpoint.on_train_epoch_end, Counter()

        def stop(self, trainer, pl_module):
            if counted["epochs"] == epochs:
                raise error
            original(self, trainer, pl_module)
            counted["epochs"] += 1

        monkeypatch.setattr(EpochCheckpoint, "on_train_epoch_end", stop)

    return arrange


def adapter_of(folder):
    return {key: value.numpy().tobytes() for key, value in load_file(folder / "adapter.safetensors").items()}


def test_the_same_seed_gives_the_same_bytes_and_another_others(adapt, tmp_path):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert adapt(out, "--seed", seed).code == 0
    assert adapter_of(tmp_path / "a") == adapter_of(tmp_path / "b")
    assert adapter_of(tmp_path / "a") != adapter_of(tmp_path / "c")


def test_recomputing_parts_gives_the_same_bytes(adapt, segraft, work, tmp_path):
    assert adapt("kept").code == 0
    assert adapt("recomputed", "--recompute", "decoder", "--recompute", r"encoder\.\d").code == 0
    assert adapter_of(tmp_path / "recomputed") == adapter_of(tmp_path / "kept")
    asked = json.loads((tmp_path / "recomputed" / "run.json").read_text())
    assert asked["settings"]["recompute"] == ["decoder", r"encoder\.\d"]
    bases = [
        segraft(
            *("pretrain", "--data", work / "D", "--labels", "1", "--cases", "2", "--epochs", "1", "--device", "cpu"),
            *("--network-args", '{"widths": [4, 8], "norm": "batch"}', "--out", tmp_path / out, "--json", *more),
        ).json
        for out, more in (("base", ()), ("again", ("--recompute", "encoder")))
    ]
    assert bases[0]["fingerprint"] == bases[1]["fingerprint"]


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_resumed_training_ends_as_if_it_had_not_stopped(adapt, interrupting, monkeypatch, tmp_path, epochs):
    assert adapt("whole").code == 0
    with monkeypatch.context() as patched:
        interrupting(epochs, RuntimeError("the power went"))
        with pytest.raises(RuntimeError, match="the power went"):
            adapt("parts")
        patched.undo()
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"last.ckpt", "run.json"}
    resumed = adapt("parts", "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert len(resumed.json["training"]["losses"]) == 4
    assert adapter_of(tmp_path / "parts") == adapter_of(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"adapter.safetensors", "run.json"}


def test_a_resumed_pretraining_ends_as_if_it_had_not_stopped(segraft, interrupting, monkeypatch, work, tmp_path):
    def pretrain(out, *more):
        return segraft(
            *("pretrain", "--data", work / "D", "--labels", "1", "--cases", "2", "--epochs", "3", "--device", "cpu"),
            *("--network-args", '{"widths": [4, 8], "norm": "batch"}', "--out", tmp_path / out, "--json", *more),
        )

    whole = pretrain("whole").json
    interrupting(2, RuntimeError("the power went"))
    with pytest.raises(RuntimeError, match="the power went"):
        pretrain("parts")
    monkeypatch.undo()
    assert pretrain("parts", "--resume").json["fingerprint"] == whole["fingerprint"]


def test_an_interrupt_from_the_keyboard_says_how_to_go_on(adapt, interrupting, tmp_path):
    interrupting(1, KeyboardInterrupt())
    outcome = adapt("run")
    assert outcome.code == 130
    assert outcome.err == "segraft: interrupted; a training (pretrain, adapt) goes on with --resume.\n"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"last.ckpt", "run.json"}


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (("--epochs", "5"), "settings.epochs"),
        (("--seed", "7"), "settings.seed"),
        (("--rank", "2"), "spec.rank"),
        (("--shots", "3"), "cases."),
        (("--window", "0", "300"), "preparation.intensity"),
    ],
)
def test_resume_with_other_options_is_refused(adapt, interrupting, monkeypatch, tmp_path, more, names):
    interrupting(1, RuntimeError("the power went"))
    with pytest.raises(RuntimeError):
        adapt("run")
    monkeypatch.undo()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    outcome = adapt("run", "--resume", *more)
    assert outcome.code == 2
    assert f"another {names}" in outcome.err
    assert outcome.err.count("\n") == 1
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_resume_where_nothing_is(adapt, tmp_path):
    outcome = adapt("run", "--resume")
    assert outcome.code == 2
    assert "nothing to resume" in outcome.err
    assert not (tmp_path / "run").exists()


def test_resume_of_what_is_finished(adapt):
    assert adapt("run").code == 0
    outcome = adapt("run", "--resume")
    assert outcome.code == 2
    assert "it is finished" in outcome.err


def test_a_result_is_replaced_only_when_asked(adapt, tmp_path):
    assert adapt("run").code == 0
    first = adapter_of(tmp_path / "run")
    refused = adapt("run", "--seed", "5")
    assert refused.code == 2
    assert "--overwrite" in refused.err
    assert adapter_of(tmp_path / "run") == first
    assert adapt("run", "--seed", "5", "--overwrite").code == 0
    assert adapter_of(tmp_path / "run") != first


def test_a_training_that_fails_at_once_leaves_the_earlier_result_and_its_record(adapt, interrupting, tmp_path):
    assert adapt("run").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    interrupting(0, RuntimeError("the power went"))
    with pytest.raises(RuntimeError):
        adapt("run", "--overwrite", "--seed", "9")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_what_was_asked_for_is_written_down(adapt, tmp_path):
    assert adapt("run", "--rank", "3", "--seed", "6").code == 0
    asked = json.loads((tmp_path / "run" / "run.json").read_text())
    assert asked["spec"]["rank"] == 3
    assert asked["settings"]["seed"] == 6
    assert len(asked["cases"]) == 2
