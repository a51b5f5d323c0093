"""One variant, built on one network: a training step of it, and an evaluation."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.variants import Variant, memory_format


@dataclass
class Subject:
    """A network that can take steps.

    Attributes:
        net: as the variant made it, on its device.
        image: what it is run on.
        autocast: whether forward passes run in bf16 autocast.
        optimiser: AdamW of what is trainable; None where nothing is.
        note: what the variant leaves out of the network.
    """

    net: nn.Module
    image: Tensor
    autocast: bool
    optimiser: torch.optim.Optimizer | None
    note: str

    @property
    def trainable(self) -> int:
        """How many numbers are trained."""
        return sum(value.numel() for value in self.net.parameters() if value.requires_grad)

    def logits(self) -> Tensor:
        """The forward pass."""
        with torch.autocast(self.image.device.type, torch.bfloat16, enabled=self.autocast):
            logits: Tensor = self.net(self.image)
        return logits

    def step(self) -> None:
        """Forward, backward and the optimiser's step."""
        self.logits().float().square().mean().backward()
        self.image.grad = None
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad()

    @torch.no_grad()
    def evaluate(self) -> None:
        """The forward pass alone; the network has been put into evaluation mode."""
        self.logits()


def build(case: Case, variant: Variant, device: torch.device) -> Subject:
    """The variant on a new network; every variant starts from the same weights and sees the same image."""
    torch.manual_seed(0)
    image = torch.rand(case.shape).to(device)
    net = case.build()
    note = variant.note(net)
    if variant.channels_last:
        # Before the adapter comes: its factors have other dimensions than the weights.
        net = net.to(memory_format=memory_format(case.shape))
        image = image.contiguous(memory_format=memory_format(case.shape))
    net = variant.adapt(net).to(device).train()
    parameters = [value for value in net.parameters() if value.requires_grad]
    return Subject(
        torch.compile(net) if variant.compiled else net,
        image.requires_grad_(variant.image_gradient),
        (variant.precision or case.precision) == "bfloat16",
        torch.optim.AdamW(parameters) if parameters else None,
        note,
    )
