"""The command: `make bench`, or `python -m benchmarks.run` from the root of the repository."""

import gc
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import cases, store
from benchmarks.cases import Case
from benchmarks.machine import allocation, machine, source, versions
from benchmarks.memory import first_steps
from benchmarks.ratios import Network, Ratio
from benchmarks.subject import Subject, build
from benchmarks.timing import alternate, beside
from benchmarks.variants import BOUND, EAGER, FULL, Group, Variant, groups
from segraft.errors import SegraftError

console = Console()


class Device(StrEnum):
    """Where to run."""

    CPU = "cpu"
    CUDA = "cuda"


class Malloc(StrEnum):
    """What becomes of freed memory: kept by the process, as in Segraft's commands, in huge pages where the kernel gives
    them or in small ones; or as the system does it.
    """

    KEPT = "kept"
    SMALL = "kept-small"
    DEFAULT = "default"


class Timed(StrEnum):
    """What is timed; memory is measured always."""

    ALL = "all"
    STEPS = "steps"
    EVALUATION = "evaluation"

    def of(self, group: Group) -> str:
        """Under which name a run of the group goes into the file: with what was timed, where it is not all there is."""
        whole = self == Timed.ALL or (self == Timed.STEPS and not group.evaluated)
        return group.name if whole else f"{group.name}, {self}"


def measure(case: Case, group: Group, rounds: int | None, device: torch.device, timed: Timed) -> dict[str, Any]:
    """Memory, steps and evaluation of every variant of a group; rounds: by default the network's own.

    A variant that fails, for whatever reason, is a row that says so: a long benchmark goes on without it.
    """
    subjects: dict[str, Subject] = {}
    rows: dict[str, dict[str, Any]] = {}
    for variant in (*group.references, *group.others):
        row = rows[variant.name] = _about(variant)
        try:
            subject, memory = first_steps(partial(build, case, variant, device), device)
        except Exception as error:  # noqa: BLE001  peers, compilers and memory fail in many ways
            row["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            console.print(f"  {variant.name} failed: {row['failed']}", style="red", markup=False)
            continue
        subjects[variant.name] = subject
        row |= {"note": subject.note, "trainable": subject.trainable, "memory": asdict(memory)}
    steps, evaluated = timed != Timed.EVALUATION, timed != Timed.STEPS and group.evaluated
    if steps:
        tasks = {name: subject.step for name, subject in subjects.items()}
        for name, seconds in alternate(tasks, rounds or case.rounds, device).items():
            rows[name]["step"] = seconds
    evaluations = max(rounds or case.rounds, case.evaluations)
    if evaluated and FULL in subjects:
        for subject in subjects.values():
            subject.net.eval()
        # The whole of full fine-tuning is a plain network, so its evaluation is the base's.
        tasks = {name: subject.evaluate for name, subject in subjects.items() if rows[name].get("rank")}
        for name, (own, base) in beside(tasks, subjects[FULL].evaluate, evaluations, device).items():
            rows[name] |= {"evaluation": own, "base": base}
    return {
        "group": timed.of(group),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source(),
        "rounds": (rounds or case.rounds) if steps else 0,
        "evaluations": evaluations if evaluated else 0,
        "references": [variant.name for variant in group.references],
        "variants": rows,
    }


def _about(variant: Variant) -> dict[str, Any]:
    known = {"method": variant.method, "rank": variant.rank, "nearest": variant.nearest}
    return {key: value for key, value in known.items() if value}


def _release() -> None:
    """Forget the networks of a group before the next one is built."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tables(network: Network) -> Iterator[Table]:
    """What was found so far on a network."""
    columns = ("variant", "step / bound", "step / full", "memory / full", "evaluation / base")
    shown = Table(*columns, title=network.title)
    for name, _ in network.rows():
        shown.add_row(
            name,
            _text(network.over(name, BOUND)),
            _text(network.over(name, FULL)),
            _text(network.memory_over(name, FULL)),
            _text(network.evaluation_over_base(name)),
        )
    yield shown
    shown = Table("option", "step / eager", "memory / eager", title=f"{EAGER}, on the same network")
    for name, _ in network.rows(options=True):
        shown.add_row(name, _text(network.over(name, EAGER)), _text(network.memory_over(name, EAGER)))
    if shown.row_count:
        yield shown


def _text(value: Ratio | float | None) -> str:
    if isinstance(value, Ratio):
        return f"{value.median:.2f} ({value.low:.2f}-{value.high:.2f})"
    return "" if value is None else f"{value:.2f}"


def _chosen(names: str, device: str) -> Sequence[Case]:
    known = cases.by_name(device)
    if not names:
        return cases.defaults(device)
    try:
        return [known[name.strip()] for name in names.split(",")]
    except KeyError as error:
        raise SegraftError(f"unknown network {error} on {device}: choose among {', '.join(known)}.") from error


def _numbers(ranks: str) -> list[int]:
    try:
        return [int(rank) for rank in ranks.split(",")]
    except ValueError as error:
        raise SegraftError(f"ranks {ranks!r}: give whole numbers with commas between.") from error


def _settings(threads: int, malloc: Malloc, device: torch.device) -> dict[str, object]:
    settings: dict[str, object] = {
        "threads": threads,
        "malloc": allocation(keep=malloc != Malloc.DEFAULT, huge_pages=malloc != Malloc.SMALL),
        "optimiser": "AdamW",
    }
    if device.type == "cuda":
        settings["tf32"] = {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "matrix products": torch.backends.cuda.matmul.allow_tf32,
        }
        settings["cudnn_benchmark"] = torch.backends.cudnn.benchmark
    return settings


def main(
    networks: Annotated[str, typer.Option(help="Names, with commas between; all of the device by default.")] = "",
    groups_: Annotated[
        str, typer.Option("--groups", help="Regular expression on 'references', 'LoRA r4', …, 'DoRA r64', 'options'.")
    ] = "",
    variants: Annotated[str, typer.Option(help="Regular expression on names of variants; references always run.")] = "",
    ranks: Annotated[str, typer.Option(help="With commas between.")] = "4,8,64",
    rounds: Annotated[int | None, typer.Option(min=1, help="By default the network's own number.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = min(4, torch.get_num_threads()),
    device: Annotated[Device | None, typer.Option(help="By default a GPU where there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="By default benchmarks/out/performance-DEVICE.json.")] = None,
    timed: Annotated[Timed, typer.Option(help="Both, or one alone; memory always.")] = Timed.ALL,
    malloc: Annotated[Malloc, typer.Option(help="Whether freed memory goes back to the kernel.")] = Malloc.KEPT,
    only_missing: Annotated[  # noqa: FBT002  a flag
        bool, typer.Option("--only-missing", help="Skip groups that the file has.")
    ] = False,
    cudnn_benchmark: Annotated[  # noqa: FBT002  a flag
        bool, typer.Option("--cudnn-benchmark", help="Let cuDNN try its kernels.")
    ] = False,
) -> None:
    """Measure step time, peak memory and evaluation time, as ratios within rounds, into one JSON file.

    A long run can be split, by --networks and --groups or by stopping it and going on with --only-missing: the pieces
    add up in the same file.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = cudnn_benchmark
    out = out or Path(f"benchmarks/out/performance-{where.type}.json")
    header = {
        "device": where.type,
        "machine": machine(where),
        "versions": versions(),
        "settings": _settings(threads, malloc, where),
    }
    try:
        results = store.opened(out, header)
        chosen = _chosen(networks, where.type)
        for case in chosen:
            for whole in groups(case, _numbers(ranks)):
                group = whole.matching(variants)
                names = [variant.name for variant in (*group.references, *group.others)]
                done = only_missing and store.has(results, case.name, timed.of(group), names)
                told = group.others and (group.evaluated or timed != Timed.EVALUATION)
                if done or not told or not re.search(groups_, group.name):
                    continue
                _add(results, case, group, rounds, where, timed)
                store.save(out, results)
            if case.name in results["networks"]:
                console.print(*tables(Network(results["networks"][case.name])), sep="\n")
    except SegraftError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(2) from error
    console.print(str(out))


def _add(
    results: dict[str, Any], case: Case, group: Group, rounds: int | None, device: torch.device, timed: Timed
) -> None:
    started = time.perf_counter()
    run = measure(case, group, rounds, device, timed)
    network = {
        "name": case.name,
        "title": case.title,
        "family": case.family,
        "shape": case.shape,
        "precision": case.precision,
    }
    store.add_run(results, network, run)
    _release()
    took = time.perf_counter() - started
    console.print(f"{case.name}, {run['group']}: {len(run['variants'])} variants, {run['rounds']} rounds, {took:.0f} s")


if __name__ == "__main__":
    typer.run(main)
