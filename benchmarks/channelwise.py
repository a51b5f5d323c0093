"""Adapters per channel in one pass against switching between adapters: `python -m benchmarks.channelwise`.

One training step of a vision transformer on images of four channels: forward, backward and optimiser. Both have the
same base and the same factors; the one runs all channels at once, the other activates the adapter of each channel, runs
the encoder on that channel alone, and goes on to the next. They take turns in one process; before that they are held
against each other.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from monai.networks.nets.vit import ViT
from rich.console import Console
from torch import Tensor, nn

from benchmarks.machine import allocation, machine, source, versions
from benchmarks.ratios import paired
from benchmarks.timing import alternate
from segraft.adapters import AdapterSpec, activate, adapter_tensors, graft, routed, ungraft
from segraft.atomic import replacing
from segraft.errors import SegraftError

CHANNELS = 4
TARGETS = (r".*\.attn\.out_proj", r".*\.mlp\.linear1")

console = Console()


@dataclass(frozen=True)
class Case:
    """A transformer on patches of 16³ voxels, and its images.

    Attributes:
        image: their sizes.
        width: of the transformer, in heads of 64; the MLP's is four times that.
        layers: its blocks.
        batch: images in a step.
        method: of the adapters.
        rank: theirs.
    """

    image: tuple[int, int, int]
    width: int
    layers: int
    batch: int = 1
    method: str = "rs_lora"
    rank: int = 32


CASES: dict[str, Case] = {
    "small": Case((64, 64, 32), 384, 4),
    "small, two images": Case((64, 64, 32), 384, 4, batch=2),
    "small, with magnitudes": Case((64, 64, 32), 384, 4, method="dora"),
    "one block of the paper's": Case((128, 128, 48), 768, 1),
}


class InOnePass:
    """A step with an adapter per channel."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        net = ViT(1, case.image, 16, case.width, 4 * case.width, case.layers, case.width // 64)
        spec = AdapterSpec(case.method, rank=case.rank, channels=CHANNELS, targets=TARGETS)
        self.net = graft(net, spec)
        with torch.no_grad():
            for value in adapter_tensors(self.net, "default").values():
                value.add_(0.02 * torch.randn_like(value))
        self.image = torch.randn(CHANNELS, case.batch, 1, *case.image)
        self.target = torch.randn(CHANNELS * case.batch, *self.net.patch_embedding.position_embeddings.shape[1:])
        self.optimiser = torch.optim.AdamW(_trainable(self.net), lr=1e-4)

    def state(self) -> Tensor:
        """What the encoder makes of all channels: [C·B, tokens, width]."""
        with routed(range(CHANNELS)):
            encoded: Tensor = self.net(self.image.flatten(0, 1))[0]
        return encoded

    def gradients(self) -> Tensor:
        """Of a step; the state comes back."""
        self.optimiser.zero_grad()
        state = self.state()
        torch.autograd.backward(nn.functional.mse_loss(state, self.target))
        return state.detach()

    def step(self) -> None:
        """One training step."""
        self.gradients()
        self.optimiser.step()


class Switching(InOnePass):
    """The same with one ordinary adapter per channel, of the same factors."""

    def __init__(self, case: Case, other: InOnePass) -> None:
        self.net, self.image, self.target = ungraft(copy.deepcopy(other.net)), other.image, other.target
        self.names = [f"channel{channel}" for channel in range(CHANNELS)]
        for name in self.names:
            graft(self.net, AdapterSpec(case.method, rank=case.rank, targets=TARGETS), name)
            for key, value in adapter_tensors(self.net, name).items():
                value.data.copy_(adapter_tensors(other.net, "default")[_of_channel(key, name)])
        activate(self.net, None, train=self.names)
        self.optimiser = torch.optim.AdamW(_trainable(self.net), lr=1e-4)

    def state(self) -> Tensor:
        """[C·B, tokens, width]."""
        states = []
        for name, channel in zip(self.names, self.image, strict=True):
            activate(self.net, name, train=self.names)
            states.append(self.net(channel)[0])
        return torch.cat(states)


def _trainable(net: nn.Module) -> list[nn.Parameter]:
    return [value for value in net.parameters() if value.requires_grad]


def _of_channel(key: str, name: str) -> str:
    """The key of an ordinary adapter's tensor in the adapter per channel."""
    edit, _, factor = key.rpartition(".")
    return f"{edit}_{name}.{factor}"


def held_against_each_other(one: InOnePass, loop: Switching) -> float:
    """The largest difference of states and gradients, relative to the largest value of each.

    Raises:
        SegraftError: above 1e-3.
    """
    pairs = [(one.gradients(), loop.gradients())]
    ours = adapter_tensors(one.net, "default")
    for name in loop.names:
        for key, value in adapter_tensors(loop.net, name).items():
            pairs.append((_gradient(ours[_of_channel(key, name)]), _gradient(value)))
    differences = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    worst = max(differences)
    if not all(difference < 1e-3 for difference in differences):
        raise SegraftError(f"the two differ by {worst:.1e}, so their times mean nothing: find out why.")
    return worst


def _gradient(value: Tensor) -> Tensor:
    if value.grad is None:
        raise SegraftError("a factor got no gradient, so the two cannot be compared.")
    return value.grad


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of both, round by round, and their ratio."""
    one = InOnePass(case)
    loop = Switching(case, one)
    difference = held_against_each_other(one, loop)
    tasks = {"one pass": one.step, "switching": loop.step}
    seconds = alternate(tasks, rounds, torch.device("cpu"), warm_up=True)
    ratio = paired(seconds["one pass"], seconds["switching"])
    return {**asdict(case), "difference": difference, "seconds": seconds, "ratio": asdict(ratio)}


def main(
    cases: Annotated[list[str] | None, typer.Option("--case", help=f"Of {', '.join(CASES)}; all.")] = None,
    rounds: Annotated[int, typer.Option(help="Steps of each.")] = 15,
    out: Annotated[Path, typer.Option(help="File of results.")] = Path("benchmarks/out/channelwise.json"),
) -> None:
    """Time a step in one pass and by switching, and write what was found."""
    kept = allocation(keep=True)
    found: dict[str, Mapping[str, Any]] = {}
    for name in cases or CASES:
        if name not in CASES:
            raise SegraftError(f"no case {name!r}: choose of {', '.join(CASES)}.")
        result = found[name] = measure(CASES[name], rounds)
        one, loop = (sorted(result["seconds"][task])[rounds // 2] for task in ("one pass", "switching"))
        ratio = result["ratio"]
        console.print(
            f"{name}: one pass {1e3 * one:.0f} ms, switching {1e3 * loop:.0f} ms, ratio {ratio['median']:.2f} "
            f"({ratio['low']:.2f} to {ratio['high']:.2f}), numbers alike to {result['difference']:.0e}"
        )
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source(),
        "memory": kept,
    }
    about |= {"machine": machine(torch.device("cpu")), "versions": versions(), "threads": torch.get_num_threads()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as aside:
        aside.write_text(json.dumps({**about, "channels": CHANNELS, "cases": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
