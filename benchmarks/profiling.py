"""Where a training step spends its time, by kind of operation: `python -m benchmarks.profiling --out FILE`.

For the distance between a method and the bound, which `benchmarks.run` measures, to be understood.
"""

import gc
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks import cases
from benchmarks.machine import allocation, machine, source, versions
from benchmarks.subject import build
from benchmarks.timing import order
from benchmarks.variants import groups
from segraft.atomic import replacing

KINDS = {
    "convolutions backward": r"convolution_backward|_?slow_conv\w*_backward",
    "convolutions forward": r"mkldnn_convolution|_?convolution|mkldnn::_convolution_pointwise|_?slow_conv\w*",
    "matrix products": r"(b?addb?)?mm|bmm|mv|dot|addmm|baddbmm|mkldnn::_linear_pointwise",
    "activations, norms of the network, pooling": (
        r"clamp_min_|threshold_backward|relu_?|leaky_relu\w*|gelu\w*|_?softmax\w*|max_pool\w*|native_\w+"
    ),
    "element-wise and sums": (
        r"mul_?|add_?|sub_?|sum|div_?|addcmul_?|addcdiv_?|where|masked_fill_|eq|ne|abs|gt|neg_?|sqrt|square|pow|lerp_|min|mean|"
        r"linalg_vector_norm"
    ),
    "copies and fills": r"copy_|fill_|zero_|clone|cat|contiguous|flip|index",
    "between operations": r"(torch::)?autograd::.*|\w+Backward\d*|Optimizer\..*|(Adapted|Parallel|Frozen)Layer",
}
REST, BETWEEN, WHOLE = "views and other small ones", "between operations", "whole"
VARIANTS = r"bound|full|(conv_lora|lora_c|conv_dora|dora_c|PEFT DoRA) r8|(dora_c|conv_dora) r64"
WARM_UP = 2


def kind(name: str) -> str:
    """Of an operation, by its name in the profile."""
    bare = name.removeprefix("aten::")
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, bare)), REST)


def profiled(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one step by kind of operation, those between operations and all together."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        started = time.perf_counter()
        step()
        whole = 1000 * (time.perf_counter() - started)
    kinds = dict.fromkeys([*KINDS, REST], 0.0)
    for event in found.key_averages():
        kinds[kind(event.key)] += event.self_cpu_time_total / 1000
    kinds[BETWEEN] += whole - sum(kinds.values())
    return kinds | {WHOLE: whole}


def measure(case: cases.Case, variants: str, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Medians by variant, over steps that all variants take in turn; `variants` is a regular expression."""
    found = {v.name: v for group in groups(case, [4, 8, 64]) for v in (*group.references, *group.others)}
    subjects = {
        name: build(case, variant, torch.device("cpu"))
        for name, variant in found.items()
        if re.fullmatch(variants, name)
    }
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
    for round_ in range(-WARM_UP, rounds):
        for name in order(list(subjects), round_):
            kinds = profiled(subjects[name].step)
            if round_ >= 0:
                taken[name].append(kinds)
    return {
        name: {"milliseconds": {kind: round(statistics.median(step[kind] for step in steps), 1) for kind in steps[0]}}
        for name, steps in taken.items()
    }


def main(
    out: Annotated[Path, typer.Option(help="The JSON file.")] = Path("benchmarks/out/profile-cpu.json"),
    networks: Annotated[str, typer.Option(help="With commas between.")] = "unet-256,unet3d-96,swin-64",
    variants: Annotated[str, typer.Option(help="Regular expression.")] = VARIANTS,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    threads: Annotated[int, typer.Option(min=1)] = 4,
) -> None:
    """Profile some steps of each variant."""
    torch.set_num_threads(threads)
    content: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "settings": {"threads": threads, "allocation": allocation(keep=True), "rounds": rounds},
        "source": source(),
        "networks": {},
    }
    for case in (case for case in cases.CPU if case.name in networks.split(",")):
        content["networks"][case.name] = measure(case, variants, rounds)
        for name, row in content["networks"][case.name].items():
            print(case.name, name, row["milliseconds"], flush=True)
        gc.collect()
    with replacing(out) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
