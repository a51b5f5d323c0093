"""Where a training step spends its time, by kind of operation: `python -m benchmarks.profiling --out FILE`.

For the distance between a method and the bound, which `benchmarks.run` measures, to be understood.
"""

import json
import re
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks import cases
from benchmarks.machine import allocation, machine, source, versions
from benchmarks.subject import build
from benchmarks.variants import groups
from segraft.atomic import replacing

KINDS = {
    "convolutions backward": r"convolution_backward|slow_conv\w*_backward",
    "convolutions forward": r"mkldnn_convolution|_convolution|convolution|slow_conv\w*",
    "matrix products": r"(b?addb?)?mm|bmm|mv|dot|addmm|baddbmm|mkldnn::_linear_pointwise",
    "norms": r"linalg_vector_norm",
    "element-wise and sums": (
        r"mul_?|add_?|sum|native_batch_norm_backward|div_?|addcmul_?|where|abs|gt|neg|sqrt|square|pow|lerp_|min|mean"
    ),
    "copies and fills": r"copy_|fill_|zero_|clone|cat|contiguous",
    "activations and pooling": r"clamp_min_|threshold_backward|max_pool\w*|relu_?|gelu\w*|native_\w+",
}
STEPS = 3


def kind(name: str) -> str:
    """Of an operation, by its name in the profile."""
    bare = name.removeprefix("aten::")
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, bare)), "the rest")


def main(
    out: Annotated[Path, typer.Option(help="The JSON file.")] = Path("benchmarks/out/profile-cpu.json"),
    networks: Annotated[str, typer.Option(help="With commas between.")] = "unet-256,unet3d-96",
    variants: Annotated[
        str, typer.Option(help="Regular expression.")
    ] = r"bound|(conv_lora|lora_c|conv_dora|dora_c) r8",
    threads: Annotated[int, typer.Option(min=1)] = 4,
) -> None:
    """Profile a few steps of each variant."""
    torch.set_num_threads(threads)
    allocated = allocation(keep=True)
    content = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "settings": {"threads": threads, "allocation": allocated, "steps": STEPS},
        "source": source(),
        "networks": {},
    }
    for case in (case for case in cases.CPU if case.name in networks.split(",")):
        rows = content["networks"][case.name] = {}
        found = {v.name: v for group in groups(case, [8]) for v in (*group.references, *group.others)}
        for name, variant in found.items():
            if not re.fullmatch(variants, name):
                continue
            subject = build(case, variant, torch.device("cpu"))
            for _ in range(STEPS):
                subject.step()
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                for _ in range(STEPS):
                    subject.step()
            kinds = dict.fromkeys([*KINDS, "the rest"], 0.0)
            for event in profiled.key_averages():
                kinds[kind(event.key)] += event.self_cpu_time_total / 1000 / STEPS
            rows[name] = {"milliseconds": {k: round(v, 1) for k, v in kinds.items()}}
            print(case.name, name, rows[name]["milliseconds"], flush=True)
    with replacing(out) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
