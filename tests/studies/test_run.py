"""A run's folder: its name, what stands in it, and who may work in it."""

import errno
import hashlib
import json
import os
import sys
from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segraft.errors import SegraftError
from segraft.studies.run import (
    FAILED,
    FINISHED,
    LOCK,
    REQUEST,
    Outcome,
    Run,
    Runs,
    fail,
    failure_of,
    is_finished,
    locked,
    write_json,
)

RUN = Run("adapt", {"b": 1, "a": {"ü": [1, 2.5, None]}}, "/D/dataset.json", None, ("x", "y"), ("z",), "0123")


def test_the_key_is_the_digest_of_the_identity():
    text = '{"a":{"ü":[1,2.5,null]},"b":1}'
    assert RUN.key == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_key_depends_on_the_identity_alone():
    elsewhere = replace(RUN, data="/E/dataset.json", patient_pattern="(.)", train=("q",), test=(), base=None)
    assert elsewhere.key == RUN.key
    assert replace(RUN, identity={**RUN.identity, "b": 2}).key != RUN.key


@pytest.mark.parametrize("value", [date(2020, 1, 1), float("nan"), {1, 2}], ids=str)
def test_a_setting_that_json_cannot_say_is_refused(value):
    with pytest.raises(SegraftError, match="a setting is nothing that JSON can say"):
        _ = replace(RUN, identity={"arguments": {"since": value}}).key


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(identity=st.dictionaries(st.text(), VALUES, max_size=4))
def test_the_key_survives_json_and_the_order_of_keys(identity):
    run = replace(RUN, identity=identity)
    turned = {name: identity[name] for name in reversed(identity)}
    assert replace(RUN, identity=turned).key == run.key
    assert replace(RUN, identity=json.loads(json.dumps(identity))).key == run.key


def test_a_run_reads_as_it_was_added(tmp_path):
    folder = Runs(tmp_path / "runs").add(RUN)
    assert folder == tmp_path / "runs" / RUN.key
    assert Run.read(folder) == RUN
    assert [path.name for path in folder.iterdir()] == [REQUEST]


def test_a_run_that_is_added_again_keeps_its_results_and_learns_where_the_scans_are_now(tmp_path):
    folder = Runs(tmp_path).add(RUN)
    write_json(folder / FINISHED, {})
    moved = replace(RUN, data="/E/dataset.json")
    assert Runs(tmp_path).add(moved) == folder
    assert is_finished(folder)
    assert Run.read(folder) == moved


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"kind": "adapt"}', '{"train": 3, "test": []}', "\xff"])
def test_a_folder_that_is_of_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / REQUEST).write_text(content, encoding="latin-1")
    with pytest.raises(SegraftError, match=f"{tmp_path} holds no run of a study"):
        Run.read(tmp_path)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(SegraftError, match="cannot be written"):
        Runs(tmp_path / "runs").add(RUN)


def test_a_reason_is_kept_on_one_line(tmp_path):
    assert failure_of(tmp_path) is None
    assert fail(tmp_path, "it went\n   wrong [so] \t much", "Traceback …") == "it went wrong [so] much"
    assert failure_of(tmp_path) == "it went wrong [so] much"
    assert json.loads((tmp_path / FAILED).read_text())["traceback"] == "Traceback …"


def test_a_failure_that_another_process_takes_away_meanwhile_is_none(tmp_path, monkeypatch):
    fail(tmp_path, "so")
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: True)
    (tmp_path / FAILED).unlink()
    assert failure_of(tmp_path) is None


def test_json_that_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_never_hold_a_lock_together(tmp_path, start, until):
    code = (
        "import json, time\n"
        "from pathlib import Path\n"
        "from segraft.studies.run import locked\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "(folder / f'ready-{os.getpid()}').touch()\n"
        "with locked(folder):\n"
        "    with (folder / 'order').open('a') as file:\n"
        "        file.write('in ')\n"
        "        file.flush()\n"
        "        time.sleep(0.05)\n"
        "        file.write('out ')\n"
    )
    with locked(tmp_path):
        others = [start(code) for _ in range(3)]
        until(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
        assert not (tmp_path / "order").exists()
    for other in others:
        assert other.wait(60) == 0, other.log.read_text()
    assert (tmp_path / "order").read_text() == "in out " * 3


def test_the_lock_of_a_killed_process_is_free(tmp_path, start, until):
    code = (
        "import signal\n"
        "from pathlib import Path\n"
        "from segraft.studies.run import locked\n"
        f"with locked(Path({str(tmp_path)!r})):\n"
        f"    Path({str(tmp_path / 'in')!r}).touch()\n"
        "    signal.pause()\n"
    )
    holder = start(code)
    until((tmp_path / "in").exists)
    holder.kill()
    with locked(tmp_path):
        assert (tmp_path / LOCK).is_file()


def test_a_system_without_such_locks_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(SegraftError, match="Windows has not got: run them under Linux or WSL"), locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(SegraftError, match="has no locks: choose another --out"), locked(tmp_path):
        pass


def test_an_outcome_goes_through_json():
    for outcome in (Outcome("k"), Outcome("k", 1.5), Outcome("k", None, "so")):
        assert Outcome(**json.loads(json.dumps(vars(outcome)))) == outcome
