"""Where the runs of a study are done: in this process, in others beside it, on the machines of a Ray cluster.

To add an engine, add one entry to `ENGINES`: a context that is entered with the number of workers and gives a function.
That takes folders of runs that do not wait for one another, each of which any process that sees the folder can do, and
yields their outcomes as they come.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from segraft.errors import SegraftError
from segraft.networks.trusted import VARIABLE
from segraft.studies.pool import Died, Pool
from segraft.studies.run import Outcome, Run, fail, is_finished

Do = Callable[[Sequence[Path]], Iterator[Outcome]]
Engine = Callable[[int], AbstractContextManager[Do]]

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""OpenMP and BLAS look at these, but once, when they are loaded."""

RETRIES = 3
"""How often Ray begins a run again whose process or machine was lost; without an end, a run that takes more memory than
there is would go on for ever."""


@contextmanager
def local(workers: int) -> Iterator[Do]:
    """On this machine: with one worker in this process, else in processes beside it, which share the cores evenly.

    There are never more processes than cores. One that dies (out of memory, say) is a failed run; the others go on.

    Raises:
        KeyboardInterrupt: Ctrl-C, also where it reached only a process beside this one.
    """
    if workers == 1:
        from segraft.studies.executing import execute

        yield partial(map, execute)
        return
    workers = min(workers, cores())
    with ThreadPoolExecutor(workers) as threads, Pool(threads_of(cores() // workers)) as pool:

        def do(folders: Sequence[Path]) -> Iterator[Outcome]:
            futures = {threads.submit(pool.do, folder): folder for folder in folders}
            for future in as_completed(futures):
                yield _answer(future.result, futures[future], Died)

        yield do


@contextmanager
def ray(workers: int) -> Iterator[Do]:
    """On the machines of a Ray cluster, `workers` runs at a time on the smallest, more on larger ones.

    The cluster is that of `RAY_ADDRESS`, else the one running on this machine, else one that is started here and ends
    with the study. All machines must have Segraft, and see the study's folder and the scans under the same paths. A run
    whose machine is lost is done on another, from its last finished epoch.

    Raises:
        SegraftError: Ray is not installed, or there is no cluster at that address.
    """
    try:
        library: Any = import_module("ray")  # whose own types say too little
    except ImportError as error:
        raise SegraftError("the engine ray needs Ray: install segraft[ray].") from error
    from segraft.studies.worker import do as do_run

    def do(folders: Sequence[Path]) -> Iterator[Outcome]:
        nodes = [node["Resources"] for node in library.nodes() if node["Alive"]]
        share = share_of(nodes, workers, accelerated=any(_may_use_gpu(folder) for folder in folders))
        environment = {"env_vars": {**threads_of(int(share["num_cpus"])), **_trusted()}}
        task = library.remote(do_run).options(**share, max_retries=RETRIES, runtime_env=environment)
        refs = {task.remote(str(folder)): folder for folder in folders}
        waiting = list(refs)
        while waiting:
            (first, *_), waiting = library.wait(waiting, num_returns=1)
            yield _answer(partial(library.get, first), refs[first], library.exceptions.RayError)

    own = not library.is_initialized()
    if own:
        _connect(library)
    try:
        yield do
    finally:
        if own:
            library.shutdown()


def _connect(library: Any) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        library.init("auto", **quiet)  # which looks at RAY_ADDRESS, then on this machine
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address := os.environ.get("RAY_ADDRESS"):
            raise SegraftError(f"no Ray cluster is at {address} ({error}): correct RAY_ADDRESS.") from error
        library.init("local", num_cpus=cores(), include_dashboard=False, **quiet)


def share_of(nodes: Sequence[Mapping[str, float]], workers: int, *, accelerated: bool) -> dict[str, float]:
    """What of a machine each run asks of Ray.

    Args:
        nodes: the resources of each machine, such as `{"CPU": 8, "GPU": 1}`.
        workers: runs at a time on the smallest machine that serves.
        accelerated: whether runs use a GPU where there is one: then only machines with GPUs serve, if there are any.
            (From a run that asks for none, Ray hides them.)

    Raises:
        SegraftError: no machine has a core.
    """
    serving = [node for node in nodes if node.get("CPU", 0) >= 1]
    with_gpu = [node for node in serving if node.get("GPU", 0) > 0 and accelerated]
    serving = with_gpu or serving
    if not serving:
        raise SegraftError("no machine of the Ray cluster has a core to offer: add one.")
    share = {"num_cpus": max(min(node["CPU"] for node in serving) // workers, 1)}
    if with_gpu:
        share["num_gpus"] = min(min(node["GPU"] for node in with_gpu) / workers, 1)
    return share


def _may_use_gpu(folder: Path) -> bool:
    settings = Run.read(folder).identity.get("settings", {"device": "cpu"})  # weights are imported without computing
    return bool(settings["device"] != "cpu")


def _answer(get: Callable[[], Outcome], folder: Path, dead: type[Exception]) -> Outcome:
    """The outcome of a run that was done elsewhere; what went wrong there, and not in the run itself, fails it."""
    try:
        return get()
    except dead as error:
        key = Run.read(folder).key
        if is_finished(folder):
            return Outcome(key)
        cause: Any = getattr(error, "cause", None)  # of what Ray's task raised
        return Outcome(key, None, fail(folder, str(cause or error)))


def threads_of(threads: int) -> dict[str, str]:
    """Environment variables of a process that may use so many threads; no more than this one may use itself."""
    return {name: str(_fewer(os.environ.get(name), threads)) for name in THREADS}


def _trusted() -> dict[str, str]:
    """What the user vouches for here, for processes elsewhere, which have the environment of their own machine."""
    return {VARIABLE: os.environ[VARIABLE]} if os.environ.get(VARIABLE) else {}


def _fewer(own: str | None, threads: int) -> int:
    return min(int(own), threads) if own is not None and own.isdecimal() and int(own) > 0 else threads


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


ENGINES: dict[str, Engine] = {"local": local, "ray": ray}
