"""What keeping freed memory, and laying it in huge pages, brings: `python -m benchmarks.allocating --out FILE`.

How memory is taken holds for a whole process. So each setting has processes of its own, which take turns; unlike in
`benchmarks.run`, a machine whose speed drifts shows in the ratios.
"""

import json
import os
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
from benchmarks.subject import Subject, build
from benchmarks.timing import alternate
from benchmarks.variants import FULL, groups
from segraft.atomic import replacing

ADAPTED = "conv_dora r8"
PASSES = 5


def one(network: str, malloc: Malloc, threads: int) -> dict[str, Any]:
    """In this process: how it takes memory, seconds of a prediction of the plain network and of a step of an adapted
    one (medians), and the most memory held, in GiB.
    """
    torch.set_num_threads(threads)
    told = allocation(keep=malloc != Malloc.DEFAULT, huge_pages=malloc != Malloc.SMALL)
    case, cpu = cases.by_name("cpu")[network], torch.device("cpu")
    found = {v.name: v for group in groups(case, [8]) for v in (*group.references, *group.others)}
    subjects: dict[str, Subject] = {name: build(case, found[name], cpu) for name in (FULL, ADAPTED)}
    plain, adapted = subjects.values()
    plain.net.eval()
    taken = {
        what: statistics.median(alternate({what: task}, PASSES, cpu, warm_up=True)[what])
        for what, task in (("prediction", plain.evaluate), ("step", adapted.step))
    }
    return {"allocation": told, **taken, "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def measure(network: str, rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """Medians over processes, by setting."""
    runs: dict[Malloc, list[dict[str, Any]]] = {malloc: [] for malloc in (Malloc.DEFAULT, Malloc.SMALL, Malloc.KEPT)}
    for _ in range(rounds):
        for malloc, found in runs.items():
            command = [sys.executable, "-m", "benchmarks.allocating", "--process", malloc, "--networks", network]
            command += ["--threads", str(threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        malloc.value: {"allocation": found[0]["allocation"]}
        | {key: round(statistics.median(each[key] for each in found), 4) for key in ("prediction", "step", "GiB")}
        for malloc, found in runs.items()
    }


def main(
    out: Annotated[Path, typer.Option(help="The JSON file.")] = Path("benchmarks/out/allocation-cpu.json"),
    networks: Annotated[str, typer.Option(help="With commas between.")] = "unet-256,unet3d-96,swin-64",
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each setting.")] = 3,
    threads: Annotated[int, typer.Option(min=1)] = min(4, os.cpu_count() or 1),
    process: Annotated[Malloc | None, typer.Option(help="Measure one setting in this process.")] = None,
) -> None:
    """Measure every network in turn."""
    if process is not None:
        print(json.dumps(one(networks, process, threads)))
        return
    content: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "settings": {"threads": threads, "processes": rounds, "passes": PASSES, "adapted": ADAPTED},
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
