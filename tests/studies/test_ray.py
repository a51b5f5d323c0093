"""A study on a Ray cluster of two machines, one of which is lost while a run is on it."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from segraft.errors import SegraftError
from segraft.studies.engines import ENGINES
from segraft.studies.run import Runs
from segraft.studies.running import run_study

pytest.importorskip("ray", reason="Ray is not installed: segraft[ray]")

LIMIT_S = 300

SCRIPT = """
import json, os, sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from segraft.studies import engines
from segraft.studies.reading import read_study
from segraft.studies.running import run_study

study, out, odd = read_study(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
lost = cluster.add_node(**node)
os.environ["RAY_ADDRESS"] = cluster.address
print("started", flush=True)

# A run on the second machine waits in its second epoch, and is lost with the machine.
(odd / "orders.json").write_text(json.dumps({"step": 3, "kind": "wait", "node": lost.node_id}))

def lose():
    while not list(odd.glob("wait-*")):
        time.sleep(0.01)
    cluster.remove_node(lost, allow_graceful=False)

loser = threading.Thread(target=lose, daemon=True)
loser.start()
first = run_study(study, out, engine="ray", device="cpu")
loser.join()
print("studied", flush=True)

# On the machine that is left, every process dies that trains anything else.
(odd / "orders.json").write_text(json.dumps({"step": 1, "kind": "die"}))
engines.RETRIES = 0
arms = [{"base": "odd", "strategies": ["head"]}, {"base": "odd", "strategies": ["none"]}]
other = type(study).model_validate({**study.model_dump(), "folds": 2, "arms": arms})
second = run_study(other, out, engine="ray", device="cpu")
cluster.shutdown()
told = {
    "first": [first.done, first.failures],
    "lost": len(list(odd.glob("wait-*"))),
    "second": [second.done, second.before, list(second.failures.values())],
    "died": len(list(odd.glob("die-*"))),
    "plan": [[run.arm, run.key] for run in second.plan.runs],
}
Path(sys.argv[4]).write_text(json.dumps(told))
"""


@pytest.fixture
def content(make_study):
    """A study on the network that obeys orders, of eight runs."""
    base = make_study().bases["unet"].model_dump() | {"network": "odd:Odd"}
    return {"bases": {"odd": base}, "arms": [{"base": "odd", "strategies": ["none", "all", "head"]}]}


@pytest.mark.usefixtures("one_thread")
def test_a_lost_machine_and_dying_processes(content, make_study, write_study, odd, traces, tmp_path):
    expected = run_study(make_study(**content), tmp_path / "expected", device="cpu")
    assert (expected.done, expected.failures) == (8, {})

    out, told = tmp_path / "out", tmp_path / "told.json"
    arguments = [sys.executable, "-W", "error", "-c", SCRIPT, *map(str, (write_study(**content), out, odd, told))]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            arguments,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
            start_new_session=True,
        )
        try:
            code = process.wait(LIMIT_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # Ray's own watchman ends what is in other groups
            process.wait()
    assert code == 0, (tmp_path / "log").read_text()
    found = json.loads(told.read_text())

    assert found["first"] == [8, {}]
    assert found["lost"] == 1, "one run was at work on the machine that was lost"
    first = {name: digest for name, digest in traces(tmp_path / "expected").items() if "runs/" in name}
    assert first.items() <= traces(out).items()

    done, before, failures = found["second"]
    assert (done, before, len(failures)) == (0, 2, 2)
    assert found["died"] == 2
    assert all("died" in reason or "crashed" in reason for reason in failures), failures
    heads = [key for arm, key in found["plan"] if arm == "head (odd)"]
    assert all((Runs(out / "runs").folder(key) / "failed.json").is_file() for key in heads)


def test_a_cluster_that_is_not_there_is_told(monkeypatch):
    import ray

    def refuse(address, **_):
        assert address == "auto"
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with pytest.raises(SegraftError, match=r"no Ray cluster is at 192\.0\.2\.1:6379.*correct RAY_ADDRESS"):
        ENGINES["ray"](1).__enter__()


def test_without_a_cluster_one_is_started_with_this_process_cores(monkeypatch):
    import ray

    asked = []

    def init(address, **options):
        asked.append((address, options.get("num_cpus")))
        if address == "auto":
            raise ConnectionError

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: asked.append("shutdown"))
    with ENGINES["ray"](1):
        assert asked == [("auto", None), ("local", len(os.sched_getaffinity(0)))]
    assert asked[-1] == "shutdown"
