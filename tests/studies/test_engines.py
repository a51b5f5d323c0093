"""Where runs are done: that a process may die, that cores are not shared twice, that the place changes no result."""

import json
import os
import signal
import sys
import threading
from collections import Counter

import pytest

from segraft.errors import SegraftError
from segraft.studies import engines, pool
from segraft.studies.engines import ENGINES, share_of, threads_of
from segraft.studies.pool import Died, Pool
from segraft.studies.run import FINISHED, Outcome, Run, Runs, failure_of, write_json
from segraft.studies.running import run_study
from segraft.studies.worker import do as do_run

WORKER = """
import json, os, signal, sys
for line in sys.stdin:
    folder = json.loads(line)
    what = os.path.basename(folder)
    if what.startswith("die"):
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), int(what[3:]))
    if what.startswith("exit"):
        sys.exit(int(what[4:]))
    if what == "said":
        print("x" * 2_000_000, file=sys.stderr, flush=True)
    if what == "long":
        signal.pause()
    said = what if what == "bad" else None
    answer = {"key": f"{os.getpid()}", "seconds": int(os.environ["OMP_NUM_THREADS"]), "failure": said}
    print(json.dumps(answer), flush=True)
"""
"""Speaks as `segraft.studies.worker` does, without its imports: the key is the process, the seconds are its threads."""


@pytest.fixture
def quick(monkeypatch):
    """Processes of a pool do what the name of the folder says."""
    monkeypatch.setattr(pool, "COMMAND", (sys.executable, "-c", WORKER))


@pytest.fixture
def folder(tmp_path):
    """folder(name): of a run."""

    def make(name):
        run = Run("pretrain", {"name": name, "settings": {"device": "cpu"}}, "/D", None, ("a",))
        write_json(tmp_path / name / "request.json", vars(run))
        return tmp_path / name

    return make


ONE = {"OMP_NUM_THREADS": "1"}


def test_a_process_does_one_run_after_another(quick, folder):
    with Pool(ONE) as some:
        outcomes = [some.do(folder(name)) for name in ("a", "ü b\n", "said", "bad")]
    assert len({outcome.key for outcome in outcomes}) == 1
    assert [outcome.failure for outcome in outcomes] == [None, None, None, "bad"]
    assert int(outcomes[0].key) != os.getpid()


def test_callers_at_a_time_have_processes_of_their_own(quick, folder):
    found = []
    with Pool(ONE) as some:
        gate = threading.Barrier(3)

        def do():
            gate.wait(30)
            found.extend(some.do(folder("a")).key for _ in range(20))

        threads = [threading.Thread(target=do) for _ in range(3)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(60)
    assert len(found) == 60
    assert 1 < len(Counter(found)) <= 3


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("die9", r"signal 9 \(Killed\): the last words\.$"),
        ("die11", r"signal 11 \(Segmentation fault\): the last words\.$"),
        ("exit3", r"exit status 3\.$"),
    ],
)
def test_a_process_that_dies_says_how_and_another_takes_its_place(quick, folder, name, says):
    with Pool(ONE) as some:
        first = some.do(folder("a"))
        with pytest.raises(Died, match=says):
            some.do(folder(name))
        second = some.do(folder("a"))
    assert first.key != second.key


def test_ctrl_c_in_a_process_is_ctrl_c_here(quick, folder):
    with Pool(ONE) as some, pytest.raises(KeyboardInterrupt):
        some.do(folder(f"die{signal.SIGINT.value}"))


def test_leaving_ends_what_runs(quick, folder):
    ended = []

    def do(some):
        try:
            some.do(folder("long"))
        except (Died, ValueError) as error:
            ended.append(error)

    with Pool(ONE) as some:
        some.do(folder("a"))
        caller = threading.Thread(target=do, args=(some,))
        caller.start()
        while some._idle:
            pass
    caller.join(30)
    assert not caller.is_alive()
    assert len(ended) == 1
    with pytest.raises(Died, match="stopped"):
        some.do(folder("a"))


def test_what_was_being_written_to_a_process_does_not_keep_it(quick, folder):
    with Pool(ONE) as some:
        some.do(folder("a"))
        (process,) = some._all
        process._popen.stdin.write("half a line")  # as another thread may have done
        process._popen.kill()
    assert all(stream.closed for stream in (process._popen.stdin, process._popen.stdout, process._said))


@pytest.mark.parametrize(("cores", "workers"), [(1, 2), (2, 2), (3, 2), (4, 3), (8, 3), (8, 64), (7, 2)])
def test_processes_times_threads_are_never_more_than_cores(quick, folder, monkeypatch, cores, workers):
    for name in engines.THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(engines, "cores", lambda: cores)
    with ENGINES["local"](workers) as do:
        outcomes = list(do([folder(f"run{number}") for number in range(2 * workers)]))
    assert len(outcomes) == 2 * workers
    (threads,) = {outcome.seconds for outcome in outcomes}
    processes = len({outcome.key for outcome in outcomes})
    assert processes * threads <= cores
    assert processes <= workers
    assert threads == max(cores // workers, 1)


def test_threads_that_the_user_has_set_are_not_made_more(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("MKL_NUM_THREADS", "16")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "many")
    assert threads_of(4) == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"}


def test_cores_are_those_that_the_process_may_use():
    assert engines.cores() == len(os.sched_getaffinity(0))


def test_a_run_whose_process_dies_has_failed_and_the_others_go_on(quick, folder, monkeypatch):
    monkeypatch.setattr(engines, "cores", lambda: 2)
    folders = {name: folder(name) for name in ("die9", "a", "exit3", "b", "die11")}
    write_json(folders["die11"] / FINISHED, {})
    with ENGINES["local"](2) as do:
        outcomes = list(do(list(folders.values())))
    assert len(outcomes) == 5
    failed = {outcome.key: outcome for outcome in outcomes if outcome.failure}
    for name in ("die9", "exit3"):
        assert failed.pop(Run.read(folders[name]).key).failure == failure_of(folders[name])
    assert not failed, "who dies after the run is finished takes nothing back"
    assert Outcome(Run.read(folders["die11"]).key) in outcomes


NODE = {"CPU": 8.0, "memory": 1e9}


@pytest.mark.parametrize(
    ("nodes", "workers", "accelerated", "share"),
    [
        ([NODE], 1, False, {"num_cpus": 8}),
        ([NODE], 3, False, {"num_cpus": 2}),
        ([NODE], 30, False, {"num_cpus": 1}),
        ([NODE, {"CPU": 4.0}], 2, False, {"num_cpus": 2}),
        ([{}, {"CPU": 0.0}, NODE], 1, True, {"num_cpus": 8}),  # a head node that does no work
        ([{**NODE, "GPU": 2.0}], 1, False, {"num_cpus": 8}),
        ([{**NODE, "GPU": 1.0}], 2, True, {"num_cpus": 4, "num_gpus": 0.5}),
        ([{**NODE, "GPU": 4.0}], 2, True, {"num_cpus": 4, "num_gpus": 1}),  # one run uses one
        ([{**NODE, "GPU": 1.0}, {"CPU": 2.0}], 1, True, {"num_cpus": 8, "num_gpus": 1}),
    ],
)
def test_what_a_run_asks_of_ray(nodes, workers, accelerated, share):
    assert share_of(nodes, workers, accelerated=accelerated) == share


def test_a_cluster_without_cores_is_told():
    with pytest.raises(SegraftError, match="no machine of the Ray cluster has a core"):
        share_of([{"memory": 1e9}, {"CPU": 0.5}], 1, accelerated=True)


def test_a_machine_that_does_not_see_the_folder_says_so(tmp_path):
    with pytest.raises(SegraftError, match=r"nowhere is not there on the machine .* under the same paths\.$"):
        do_run(str(tmp_path / "nowhere"))


def test_without_ray_the_engine_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SegraftError, match=r"install segraft\[ray\]"), ENGINES["ray"](1):
        pass


@pytest.mark.parametrize(
    ("options", "says"), [({"engine": "slurm"}, "unknown engine 'slurm'"), ({"workers": 0}, "at least 1")]
)
def test_what_cannot_run_is_told_before_anything_is_planned(make_study, tmp_path, options, says):
    with pytest.raises(SegraftError, match=says):
        run_study(make_study(), tmp_path / "out", device="cpu", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_bases(make_study):
    """The study with a second base, on the network that obeys orders, and one arm of it."""
    study = make_study()
    unet = study.bases["unet"].model_dump()
    arms = [*(each.model_dump() for each in study.arms), {"base": "odd"}]
    return make_study(bases={"odd": {**unet, "network": "odd:Odd"}, "unet": unet}, arms=arms)


@pytest.mark.usefixtures("one_thread")
def test_processes_beside_find_what_one_process_finds(two_bases, odd, undisturbed, traces, tmp_path, monkeypatch):
    """One base dies while it trains: its arm waits, all else is as if nothing had been; then it does not die."""
    monkeypatch.setattr(engines, "cores", lambda: 2)
    (odd / "orders.json").write_text(json.dumps({"step": 3, "kind": "die"}))
    out = tmp_path / "out"
    first = run_study(two_bases, out, workers=2, device="cpu")
    keys = {run.arm: run.key for run in first.plan.runs}
    assert (first.done, first.before) == (11, 0)
    assert first.failures.keys() == {keys["odd"]}
    assert "signal 9" in first.failures[keys["odd"]]
    assert first.waiting == 1
    assert failure_of(Runs(out / "runs").folder(keys["none (odd)"])) is None
    assert {key: failure_of(Runs(out / "runs").folder(key)) for key in first.failures} == first.failures
    assert len(list(odd.glob("die-*"))) == 1
    expected = {name: digest for name, digest in traces(undisturbed).items() if name.startswith("runs/")}
    assert expected.items() <= traces(out).items()

    (odd / "orders.json").unlink()
    again = run_study(two_bases, out, device="cpu")
    assert (again.done, again.before, again.failures) == (2, 11, {})
