"""The folder of a training, before, during and after."""

import json
from contextlib import suppress

import pytest

from segraft.errors import SegraftError
from segraft.jobs.run_folder import RunFolder

ASKED = {"settings": {"epochs": 2, "patch": (1, 2)}, "cases": {"a": "0"}}


def folder_at(path, *, resume=False, overwrite=False):
    return RunFolder(path, "result", resume=resume, overwrite=overwrite)


def stopped(path, asked=ASKED):
    """A training that stopped after an epoch."""
    with suppress(KeyboardInterrupt), folder_at(path).training(asked):
        (path / "last.ckpt").write_text("state")
        raise KeyboardInterrupt
    return path


def names(path):
    return {each.name for each in path.iterdir()}


def test_a_training_that_ends_well(tmp_path):
    folder = folder_at(tmp_path / "run")
    with folder.training(ASKED):
        folder.checkpoint.write_text("state")
        folder.result.write_text("result")
    assert names(folder.path) == {"run.json", "result"}
    assert json.loads(folder.asked.read_text())["settings"] == {"epochs": 2, "patch": [1, 2]}


def test_a_training_that_stops_after_an_epoch_can_be_resumed(tmp_path):
    path = stopped(tmp_path / "run")
    assert names(path) == {"run.json", "last.ckpt"}
    folder = folder_at(path, resume=True)
    with folder.training(ASKED):
        assert folder.checkpoint.read_text() == "state"
    assert not folder.checkpoint.exists()


def test_a_training_that_fails_before_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), folder_at(tmp_path / "run").training(ASKED):
        raise KeyError
    assert not (tmp_path / "run").exists()


def test_of_several_processes_only_the_first_checks_writes_and_removes(tmp_path):
    path = stopped(tmp_path / "run")
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    for resume in (False, True):
        with RunFolder(path, "result", resume=resume, overwrite=False, writes=False).training({"another": 1}):
            assert {each.name: each.read_bytes() for each in path.iterdir()} == before
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before


def test_a_folder_that_was_there_stays(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(KeyError), folder_at(tmp_path / "run").training(ASKED):
        raise KeyError
    assert names(tmp_path / "run") == set()


def test_a_start_from_the_beginning_forgets_the_old_state(tmp_path):
    path = stopped(tmp_path / "run")
    with pytest.raises(SegraftError, match="unfinished training: go on with --resume"):
        folder_at(path)
    folder = folder_at(path, overwrite=True)
    with folder.training({"settings": {"epochs": 9}}):
        assert not folder.checkpoint.exists()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"settings": {"epochs": 3, "patch": (1, 2)}, "cases": {"a": "0"}}, "another settings.epochs (2, now 3)"),
        ({"settings": {"epochs": 2, "patch": (1, 2)}, "cases": {"a": "1"}}, "another cases.a ('0', now '1')"),
        ({"settings": {"epochs": 2, "patch": (1, 2)}, "cases": {}}, "another cases"),
        ({"settings": {"epochs": 2, "patch": (1, 2)}, "cases": {"a": "0", "b": "0"}}, "another cases.b"),
    ],
)
def test_resume_names_what_is_different(tmp_path, asked, says):
    path = stopped(tmp_path / "run")
    folder = folder_at(path, resume=True)
    with pytest.raises(SegraftError) as error, folder.training(asked):
        pytest.fail("it must not begin")
    assert says in str(error.value)
    assert names(path) == {"run.json", "last.ckpt"}


def test_nothing_to_resume(tmp_path):
    with pytest.raises(SegraftError, match="no epoch of it was finished"):
        folder_at(tmp_path / "run", resume=True)
    (tmp_path / "result").write_text("")
    with pytest.raises(SegraftError, match="it is finished"):
        folder_at(tmp_path, resume=True)


def test_a_result_is_there(tmp_path):
    (tmp_path / "result").write_text("")
    with pytest.raises(SegraftError, match="--overwrite"):
        folder_at(tmp_path)
    folder_at(tmp_path, overwrite=True)
