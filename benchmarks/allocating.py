"""What keeping freed memory, and laying it in huge pages, brings: `python -m benchmarks.allocating --out FILE`.

How memory is taken holds for a whole process. So each setting has processes of its own, which take turns; unlike in
`benchmarks.run`, a machine whose speed drifts shows in the ratios. Threads must not be bound to cores by the
environment (OMP_PROC_BIND): a process would hand its own core on to those it starts.
"""

import json
import os
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import cases
from benchmarks.machine import allocation, machine, source, versions
from benchmarks.run import Malloc
from benchmarks.subject import build
from benchmarks.timing import alternate, order
from benchmarks.variants import FULL, groups
from segraft.atomic import replacing

TASKS = {"prediction": FULL, "step": "conv_dora r8"}
"""What is timed -> the variant that does it."""

PASSES = 5


def one(network: str, task: str, malloc: Malloc, threads: int) -> dict[str, Any]:
    """In this process: how it takes memory, seconds of a pass (median), the most memory held, in GiB, and the share of
    what is held at the end that lies in huge pages.
    """
    torch.set_num_threads(threads)
    told = allocation(keep=malloc != Malloc.DEFAULT, huge_pages=malloc != Malloc.SMALL)
    case, cpu = cases.by_name("cpu")[network], torch.device("cpu")
    found = {v.name: v for group in groups(case, [8]) for v in (*group.references, *group.others)}
    subject = build(case, found[TASKS[task]], cpu)
    subject.net.train(task == "step")
    run = {"step": subject.step, "prediction": subject.evaluate}[task]
    seconds = alternate({task: run}, PASSES, cpu, warm_up=True)[task]
    held = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(encoding="ascii")))
    return {
        "allocation": told,
        "seconds": statistics.median(seconds),
        "GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "in huge pages": round(int(held["AnonHugePages"]) / int(held["Rss"]), 3),
    }


def measure(network: str, rounds: int, threads: int) -> dict[str, dict[str, dict[str, Any]]]:
    """By task and setting, what each of its processes found."""
    settings = [each.value for each in (Malloc.DEFAULT, Malloc.SMALL, Malloc.KEPT)]
    runs: dict[str, dict[str, dict[str, Any]]] = {task: {name: {} for name in settings} for task in TASKS}
    for round_ in range(rounds):
        for task in TASKS:
            for name in order(settings, round_):
                command = [sys.executable, "-m", "benchmarks.allocating", "--networks", network, "--task", task]
                command += ["--malloc", name, "--threads", str(threads)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
                found = json.loads(done.stdout.splitlines()[-1])
                told = runs[task][name]
                told["allocation"] = found.pop("allocation")
                for key, value in found.items():
                    told.setdefault(key, []).append(value)
    return runs


def main(
    out: Annotated[Path, typer.Option(help="The JSON file.")] = Path("benchmarks/out/allocation-cpu.json"),
    networks: Annotated[str, typer.Option(help="With commas between.")] = "unet-256,unet3d-96,swin-64",
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each setting.")] = 3,
    threads: Annotated[int, typer.Option(min=1)] = min(4, os.cpu_count() or 1),
    task: Annotated[str, typer.Option(help="Measure this alone, in this process.")] = "",
    malloc: Annotated[Malloc, typer.Option(help="With --task: the setting.")] = Malloc.KEPT,
) -> None:
    """Measure every network in turn."""
    if task:
        print(json.dumps(one(networks, task, malloc, threads)))
        return
    content: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "settings": {"threads": threads, "processes": rounds, "passes": PASSES, "tasks": TASKS},
        "source": source(),
        "networks": {},
    }
    for name in networks.split(","):
        content["networks"][name] = measure(name, rounds, threads)
        print(name, content["networks"][name], flush=True)
    with replacing(out) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
