"""Where the runs of a study are done: in this process, in others beside it, on the machines of a Ray cluster.

To add an engine, add one entry to `ENGINES`. An engine is given folders of runs that do not wait for one another,
each of which any process that sees the folder can do, and yields their outcomes as they come.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from segraft.errors import SegraftError
from segraft.studies.run import Outcome, Run, failure_of, is_finished

Engine = Callable[[Sequence[Path], int], Iterator[Outcome]]


def local(folders: Sequence[Path], workers: int) -> Iterator[Outcome]:
    """On this machine: with one worker in this process, else each in its own, which share the cores evenly.

    A process that dies (out of memory, say) is a failed run; the others go on.
    """
    if workers == 1:
        from segraft.studies.executing import execute

        yield from map(execute, folders)
        return
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_in_process, folder, cores() // workers or 1) for folder in folders]
        yield from _as_they_come(futures)


def _in_process(folder: Path, threads: int) -> Outcome:
    # Set before the process starts, as OpenMP and BLAS look but once.
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    command = [sys.executable, "-m", "segraft.studies.worker", str(folder)]
    done = subprocess.run(  # noqa: S603  our own module
        command, env={**os.environ, **limits}, capture_output=True, text=True, check=False
    )
    run = Run.read(folder)
    if done.returncode == 0:
        return Outcome(run.key, None, None if is_finished(folder) else failure_of(folder))
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    last = " ".join(done.stderr.split()[-40:])
    return Outcome(run.key, None, f"its process ended with {how}{last and f': {last}'}")


def ray(folders: Sequence[Path], workers: int) -> Iterator[Outcome]:
    """On the machines of a Ray cluster, each run on `workers`-th of a machine's cores.

    All machines must see the study's folder and the scans under the same paths. A run whose machine is lost is done
    on another, from its last finished epoch.

    Raises:
        SegraftError: Ray is not installed.
    """
    try:
        import ray as library
    except ImportError as error:
        raise SegraftError("the engine ray needs Ray: install segraft[ray].") from error
    from segraft.studies.executing import execute

    own = not library.is_initialized()
    if own:
        library.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
    try:
        nodes = [
            int(node["Resources"].get("CPU", 0))
            for node in library.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
        ]
        threads = max(min(cpus for cpus in nodes if cpus) // workers, 1)
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        task = library.remote(execute).options(num_cpus=threads, max_retries=-1, runtime_env={"env_vars": limits})
        waiting = [task.remote(folder) for folder in folders]
        while waiting:
            (first, *_), waiting = library.wait(waiting, num_returns=1)
            yield library.get(first)
    finally:
        if own:
            library.shutdown()


def _as_they_come(futures: Sequence[Future[Outcome]]) -> Iterator[Outcome]:
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


ENGINES: dict[str, Engine] = {"local": local, "ray": ray}
