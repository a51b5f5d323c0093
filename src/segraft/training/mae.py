"""Masked auto-encoding as a training: its settings, and one step of it."""

import math
from typing import Any, Self

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from segraft.networks.mae import MaskedAutoencoder
from segraft.training.distributed import Together
from segraft.training.module import NonFiniteLossError, SegmentationTask
from segraft.training.settings import TrainingSettings, checked_as

OF_LABELS = ("loss", "contrast_copies", "foreground")
"""Settings that mean nothing without labels."""


class MaskedSettings(TrainingSettings):
    """Settings of a masked pre-training: those of a training that need no label, and two more.

    Attributes:
        mask: share of an image's patches that the encoder does not see.
        warm_up: share of the steps in which the learning rate rises linearly to its highest.
    """

    learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    mask: float = Field(default=0.75, gt=0, lt=1)
    warm_up: float = Field(default=0.05, ge=0, lt=1)

    @model_serializer(mode="wrap")
    def _without_labels(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """In place of the serializer of `TrainingSettings`, what it does too."""
        values: dict[str, Any] = handler(self)
        idle = {*OF_LABELS, *(() if self.patches_at_once else ("patches_at_once",))}
        return {name: value for name, value in values.items() if name not in idle}

    @model_validator(mode="after")
    def _of_images_alone(self) -> Self:
        for name in OF_LABELS:
            if name in self.model_fields_set:
                raise ValueError(f"{name} is about labels, which a masked auto-encoder does not look at: leave it out")
        if self.schedule == "onecycle":
            raise ValueError("the schedule onecycle has a rise of its own: choose cosine or constant, and a warm_up")
        return self


def check_masked_settings(**values: object) -> MaskedSettings:
    """`MaskedSettings` of these values.

    Raises:
        SegraftError: as `checked_as`.
    """
    return checked_as(MaskedSettings, values)


class MaskedTask(SegmentationTask):
    """Trains a masked auto-encoder: a step's label is the image itself.

    The patches to mask are drawn from the global generator, which is seeded for every step.

    Args:
        net: a `MaskedAutoencoder`.
        settings: `MaskedSettings`.
        steps: optimiser steps of the whole training.
        together: the batch that several processes share; None for one process.

    Raises:
        SegraftError: (while training) images of another size, or a loss that is not finite.
    """

    net: MaskedAutoencoder
    settings: MaskedSettings

    def __init__(self, net: nn.Module, settings: TrainingSettings, steps: int, together: Together | None) -> None:
        if not isinstance(net, MaskedAutoencoder) or not isinstance(settings, MaskedSettings):
            raise TypeError(f"a masked auto-encoder and MaskedSettings, not {type(net)} and {type(settings)}")
        super().__init__(net, settings, steps, together)

    def _loss(self, image: Tensor, mask: Tensor, batch: dict[str, Any]) -> Tensor:  # noqa: ARG002
        """Mean loss of the images, of all processes' together."""
        losses = self._whole(self.net.losses(image, self.settings.mask))
        loss = losses.mean()
        if not torch.isfinite(loss):
            cases = batch["case"] if self.together is None else self.together.names(batch["case"])
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {self.global_step} on cases {', '.join(cases)}: lower the "
                "learning rate, use precision 32, or look at these scans."
            )
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW (0.9, 0.95); weights of layers decay, but no biases, norms, positions or mask token."""
        decaying: list[Tensor] = []
        others: list[Tensor] = []
        for name, value in self.net.named_parameters():
            if value.requires_grad:
                bare = value.ndim < 2 or name.endswith(("position_embeddings", "mask_token"))
                (others if bare else decaying).append(value)
        groups = [
            {"params": decaying, "weight_decay": self.settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=self.settings.learning_rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self._height)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _height(self, step: int) -> float:
        """The learning rate of a step, as a share of the highest."""
        rising = round(self.settings.warm_up * self.steps)
        if step < rising:
            return (step + 1) / rising
        if self.settings.schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising))) / 2
