"""A study that is killed, at whatever moment, ends with the same table when it is started again."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from segraft.studies.run import is_finished

KILLS = 10


def runs_finished(out: Path) -> int:
    return sum(is_finished(folder) for folder in out.glob("runs/*"))


def test_ten_kills_at_random_moments_change_nothing(
    start, segraft_code, write_study, undisturbed, traces, tmp_path, monkeypatch
):
    """As a power cut does it: SIGKILL to the whole process group.

    The moments are drawn within a third of what the study takes, so that the kills fall on all of it as it goes on.
    When all its runs are finished, the next one falls on a fresh study.
    """
    study = write_study()

    def begin(out: Path):
        return start(segraft_code("study", "run", study, "--out", out, "--device", "cpu"))

    whole, rng = tmp_path / "whole", np.random.default_rng(20)
    started = time.monotonic()
    assert begin(whole).wait(300) == 0
    duration = time.monotonic() - started

    finished, outs = [], []
    while len(finished) < KILLS:
        if not outs or runs_finished(outs[-1]) == 11:
            outs.append(tmp_path / f"killed-{len(outs)}")
        process = begin(outs[-1])
        if process.wait(rng.uniform(0, duration / 3)) is None:
            process.kill()
            finished.append(runs_finished(outs[-1]))
    assert any(0 < number < 11 for number in finished), "the kills fell on all parts of the study"

    for out in outs:
        again = begin(out)
        assert again.wait(300) == 0, again.log.read_text()
        assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()
        assert traces(out) == traces(whole) == traces(undisturbed)
        assert not list(out.glob("runs/*/last.ckpt"))


def gone(pid: int) -> bool:
    """Whether a process has ended, though nobody may have asked how."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_worker_that_outlives_its_study_is_waited_for(
    start, segraft_code, write_study, odd, until, tmp_path, one_thread
):
    """Only the study's own process is killed: its worker ends the run that it is at, and that is not done twice."""
    base = {"network": "odd:Odd", "arguments": {"widths": [2, 4]}, "training": {"epochs": 4, "volumes": 8}}
    study = write_study(bases={"odd": base}, arms=[{"base": "odd"}])
    out = tmp_path / "out"
    (odd / "orders.json").write_text(json.dumps({"step": 3, "kind": "wait"}))

    pooled = "import segraft.studies.engines as engines\nengines.cores = lambda: 2\n"
    first = start(pooled + segraft_code("study", "run", study, "--out", out, "--device", "cpu", "--workers", 2))
    until(lambda: list(odd.glob("wait-*")) or not first.running, 120)
    (waiting,) = odd.glob("wait-*")
    worker = int(waiting.name.removeprefix("wait-"))
    first.kill(group=False)
    assert not gone(worker)

    (out / "plan.json").unlink()
    second = start(segraft_code("study", "run", study, "--out", out, "--device", "cpu"))
    until((out / "plan.json").exists)
    assert second.running
    (odd / "go").touch()
    assert second.wait(120) == 0, second.log.read_text()
    until(lambda: gone(worker))
    said = second.log.read_text()
    assert "was done meanwhile" in said
    assert "2 runs done, 0 before, 0 failed" in said
    assert list(odd.glob("wait-*")) == [waiting], "no other process got to the third step"


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT"])
def test_a_study_that_is_asked_to_end_ends_and_goes_on_later(
    start, segraft_code, write_study, odd, until, tmp_path, one_thread, sent
):
    """At step 3 of the base, in the second epoch: the state after the first is kept, and nothing is called failed."""
    base = {"network": "odd:Odd", "arguments": {"widths": [2, 4]}, "training": {"epochs": 4, "volumes": 4}}
    study = write_study(bases={"odd": base}, arms=[{"base": "odd"}])
    out = tmp_path / "out"
    (odd / "orders.json").write_text(json.dumps({"step": 3, "kind": "wait"}))
    command = segraft_code("study", "run", study, "--out", out, "--device", "cpu")
    first = start(f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{command}")
    until(lambda: list(odd.glob("wait-*")))
    os.kill(first.process.pid, getattr(signal, sent))
    (odd / "go").touch()  # Lightning answers SIGTERM at the end of the step
    code = first.wait(60)
    assert code not in (None, 0)
    assert not list(out.glob("runs/*/failed.json")), first.log.read_text()
    assert len(list(out.glob("runs/*/last.ckpt"))) == 1
    (odd / "orders.json").unlink()
    second = start(command)
    assert second.wait(120) == 0, second.log.read_text()
