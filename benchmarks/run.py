"""Step time of adapted networks, as ratios within one process.

Every variant takes a training step (forward, backward, AdamW) in turn, round after round; a round's times are divided
by that round's full fine-tuning, so that a machine whose speed drifts shifts both. Printed and written: medians of the
ratios with their quartiles. *bound* is the forward pass and the input gradients of the frozen network.

    make bench            # or: python benchmarks/run.py --size 128 --rounds 7 --out benchmarks/out/steps.json
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from segraft.adapters import AdapterSpec, graft
from segraft.atomic import replacing
from segraft.jobs.run_folder import versions
from segraft.networks import UNet

METHODS = ("lora_c", "conv_lora", "cp_lora", "dora_c", "conv_dora", "cp_dora")
REFERENCE = "full fine-tuning"


def networks(rank: int) -> dict[str, Callable[[], nn.Module]]:
    """Name -> what builds the variant."""

    def frozen() -> nn.Module:
        return UNet().requires_grad_(requires_grad=False)

    def peft(*, dora: bool) -> nn.Module:
        # PEFT refuses transposed convolutions: it adapts 19 of the 23 layers.
        names = [name for name, layer in UNet().named_modules() if isinstance(layer, nn.Conv2d)]
        return get_peft_model(UNet(), LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=dora, target_modules=names))

    return {
        REFERENCE: UNet,
        "bound": frozen,
        **{name: lambda name=name: graft(UNet(), AdapterSpec(name, rank=rank)) for name in METHODS},
        "PEFT LoRA": lambda: peft(dora=False),
        "PEFT DoRA": lambda: peft(dora=True),
    }


def step(net: nn.Module, image: Tensor) -> Callable[[], None]:
    """One training step of what is trainable."""
    parameters = [value for value in net.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(parameters) if parameters else None
    image = image if parameters else image.clone().requires_grad_()

    def run() -> None:
        net(image).square().mean().backward()
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/steps.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    image = torch.rand(1, 1, arguments.size, arguments.size)

    steps = {name: step(build(), image) for name, build in networks(arguments.rank).items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(arguments.rounds + 1):
        for name, run in steps.items():
            started = time.perf_counter()
            run()
            if round_:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - started)

    table = Table("variant", "step / full, median", "quartiles", title=f"Table 3 U-Net, {arguments.size}², batch 1")
    rows = {}
    for name, times in seconds.items():
        ratios = [mine / full for mine, full in zip(times, seconds[REFERENCE], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        rows[name] = {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]], "seconds": times}
        table.add_row(name, f"{quartiles[1]:.2f}", f"{quartiles[0]:.2f} to {quartiles[2]:.2f}")
    Console().print(table)
    settings = {"size": arguments.size, "rank": arguments.rank, "threads": arguments.threads, "cores": os.cpu_count()}
    with replacing(arguments.out) as aside:
        aside.write_text(json.dumps({"settings": settings, "versions": versions(), "rows": rows}, indent=1) + "\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
