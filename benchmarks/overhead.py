"""What evaluation spends in its layers beside their arithmetic: `python -m benchmarks.overhead --out FILE`.

Adapted and plain layers call the same functions of torch's on tensors of the same shapes. So what tells an unmerged
network from the plain one is the time that its layers take around those calls, a hundredth of the whole: in ratios of
whole passes, which `benchmarks.run` takes, that is less than a shared machine's noise.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn import functional

from benchmarks import cases
from benchmarks.machine import allocation, machine, source, versions
from benchmarks.subject import build
from benchmarks.timing import order
from benchmarks.variants import FULL, groups
from segraft.adapters.layers import weight_slots
from segraft.atomic import replacing

ARITHMETIC = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


class Clock:
    """Seconds in layers that can be adapted, and of these the ones in torch's functions."""

    def __init__(self) -> None:
        self.layers = self.arithmetic = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the `with` block, layers and functions are timed."""
        call, functions = nn.Module.__call__, {name: getattr(functional, name) for name in ARITHMETIC}

        def layer(module: nn.Module, *inputs: Any, **named: Any) -> Any:
            if not weight_slots(module):
                return call(module, *inputs, **named)
            started = time.perf_counter()
            found = call(module, *inputs, **named)
            self.layers += time.perf_counter() - started
            return found

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*inputs: Any, **named: Any) -> Any:
                started = time.perf_counter()
                found = function(*inputs, **named)
                self.arithmetic += time.perf_counter() - started
                return found

            return run

        try:
            nn.Module.__call__ = layer  # type: ignore[method-assign]
            for name, function in functions.items():
                setattr(functional, name, timed(function))
            yield
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]
            for name, function in functions.items():
                setattr(functional, name, function)


def measure(case: cases.Case, names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a whole evaluation, and of it in layers beside their arithmetic: medians, by variant."""
    found = {v.name: v for group in groups(case, [8]) for v in (*group.references, *group.others)}
    subjects = {name: build(case, found[name], torch.device("cpu")) for name in names}
    for subject in subjects.values():
        subject.net.eval()
        subject.evaluate()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for round_ in range(rounds):
        for name in order(names, round_):
            clock, started = Clock(), time.perf_counter()
            with clock.running():
                subjects[name].evaluate()
            taken[name].append((time.perf_counter() - started, clock.layers - clock.arithmetic))
    return {
        name: {
            key: round(1000 * statistics.median(values), 3)
            for key, values in zip(("whole", "beside"), zip(*taken[name], strict=True), strict=True)
        }
        for name in names
    }


def main(
    out: Annotated[Path, typer.Option(help="The JSON file.")] = Path("benchmarks/out/overhead-cpu.json"),
    networks: Annotated[str, typer.Option(help="With commas between.")] = ",".join(case.name for case in cases.CPU),
    variants: Annotated[str, typer.Option(help="With commas between.")] = "conv_lora r8,dora_c r8,cp_dora r8",
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    threads: Annotated[int, typer.Option(min=1)] = 4,
) -> None:
    """Measure every network in turn."""
    torch.set_num_threads(threads)
    content: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "settings": {"threads": threads, "allocation": allocation(keep=True), "rounds": rounds},
        "source": source(),
        "networks": {},
    }
    for name in networks.split(","):
        content["networks"][name] = measure(cases.by_name("cpu")[name], [FULL, *variants.split(",")], rounds)
        print(name, content["networks"][name], flush=True)
    with replacing(out) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
