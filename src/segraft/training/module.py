"""One optimisation step of a segmentation network, for Lightning's loop."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from segraft.adapters import RankControlled, has_adapters, require_gradients
from segraft.errors import SegraftError
from segraft.training.contrast import ladder, with_contrast
from segraft.training.distributed import Together
from segraft.training.losses import LOSSES
from segraft.training.recomputation import require_recomputation
from segraft.training.settings import TrainingSettings


class NonFiniteLossError(SegraftError):
    """The loss became NaN or infinite."""


class SegmentationTask(LightningModule):
    """Trains whatever of `net` requires a gradient.

    Args:
        net: maps [B, C, X, Y(, Z)] to logits [B, L, X, Y(, Z)]. With patches of size 1 in Z it is given [B, C, X, Y].
        settings: of the training.
        steps: optimiser steps of the whole training, for the schedule.
        together: the batch that several processes share, each taking part of it; None for one process.

    Raises:
        SegraftError: nothing is trainable; (while training) the output's shape is not the label's, a trainable
            tensor receives no gradient, a part to recompute is never called, the loss is not finite.
    """

    def __init__(
        self, net: nn.Module, settings: TrainingSettings, steps: int, together: Together | None = None
    ) -> None:
        super().__init__()
        self.net, self.settings, self.steps, self.together = net, settings, steps, together
        self.loss = LOSSES[settings.loss]()
        self.contrasts = ladder(settings.contrast_copies)
        self.trained = {name for name, value in net.named_parameters() if value.requires_grad}
        if not self.trained:
            raise SegraftError("nothing would be trained: choose an adapter method, or parts to train whole.")
        # A checkpoint leaves out the frozen base; `on_load_checkpoint` holds the rest to be complete.
        self.strict_loading = False
        self.ranks = RankControlled(net, steps)
        self.checked = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Loss of one batch of patches, whose groups (`patches_at_once`) go through the network one after another.

        Returns:
            "loss": what is still to be differentiated: of the last group, with what a rank control adds; "reported":
            of the whole batch, without that.
        """
        if self.together is not None:
            self.together.begin(batch_idx)
        image, mask = batch["image"], batch["label"].to(torch.float32)
        if image.shape[-1] == 1:
            image, mask = image.squeeze(-1), mask.squeeze(-1)
        size = self.settings.patches_at_once or len(image)
        groups = list(zip(image.split(size), mask.split(size), strict=True))
        reported = torch.zeros((), device=image.device)
        if self.settings.patches_at_once is not None:
            self.trainer.optimizers[0].zero_grad()  # Lightning does so after this step, too late for all but the last
        for images, masks in groups[:-1]:
            part = self._loss(images, masks, batch) * (len(images) / len(image))
            self.trainer.strategy.backward(part, None)
            reported += part.detach()
        images, masks = groups[-1]
        loss = self._loss(images, masks, batch) * (len(images) / len(image))
        penalty = self.ranks.penalty()
        return {"loss": loss if penalty is None else loss + penalty, "reported": reported + loss.detach()}

    def _loss(self, image: Tensor, mask: Tensor, batch: dict[str, Any]) -> Tensor:
        """Loss of patches, over the image and its copies at other contrasts (`contrast.ladder`).

        The copies go through the network one after another rather than as one batch, for memory: a kernel's workspace,
        and what is recomputed in the backward pass, are those of one copy at a time (what is kept for that pass is the
        same). It also gives a batch norm, and a loss over the batch, one contrast at a time.

        Several processes compute the loss of the whole batch, each with the gradient of its own part.
        """
        whole = self._whole(mask)
        losses = [
            contrast.weight
            * self.loss(self._whole(self._logits(with_contrast(image, contrast.gamma), mask.shape)), whole)
            for contrast in self.contrasts
        ]
        loss: Tensor = torch.stack(losses).sum()
        if not torch.isfinite(loss):
            cases = batch["case"] if self.together is None else self.together.names(batch["case"])
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {self.global_step} on cases {', '.join(cases)}: lower the "
                "learning rate, use precision 32, or look at these scans."
            )
        return loss

    def _whole(self, mine: Tensor) -> Tensor:
        """A tensor of the whole batch, from that of this process's share."""
        return mine if self.together is None else self.together.whole(mine)

    def _logits(self, image: Tensor, wanted: torch.Size) -> Tensor:
        """What the network makes of the patches, in float32 and of the shape of their labels."""
        try:
            logits = self.net(image)
        except ValueError as error:
            if isinstance(error, SegraftError):
                raise
            raise SegraftError(
                f"{type(self.net).__name__} cannot train on {len(image)} patches of {tuple(image.shape[2:])} voxels "
                f"({error}): use larger or more patches."
            ) from error
        if not isinstance(logits, Tensor) or logits.shape != wanted:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise SegraftError(
                f"{type(self.net).__name__} gives {shape} for patches whose labels are {tuple(wanted)}: "
                "it must return one logit per label on the grid of its input, as one tensor, also in training (deep "
                "supervision must be off)."
            )
        return logits.float()

    def on_after_backward(self) -> None:
        """After the first backward pass every trainable tensor of an adapter must have a gradient.

        And what was to be recomputed must have been called.
        A plain network may have layers that it never calls (newer ViTs of MONAI do): they just stay as they are.
        """
        if self.checked:
            return
        if has_adapters(self.net):
            require_gradients(self.net)
        require_recomputation(self.net)
        self.checked = True

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Between the step's last forward and backward pass; the groups before have left their gradients by then."""
        if self.settings.patches_at_once is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """The optimiser's step, then that of the rank controls, with the same learning rate."""
        rate = optimizer.param_groups[0]["lr"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.ranks.step(rate)

    def configure_optimizers(self) -> Any:
        """AdamW over what is trainable, with the schedule stepping once per step.

        Gates that a rank control moves by itself get no rate, but stay with the optimiser, which clears (and in mixed
        precision scales) their gradients.
        """
        moved = {id(gate) for gate in self.ranks.gates}
        parameters = [value for value in self.net.parameters() if value.requires_grad and id(value) not in moved]
        rate, steps = self.settings.learning_rate, self.steps
        groups: list[dict[str, Any]] = [{"params": parameters, "lr": rate}]
        if moved:
            groups.append({"params": self.ranks.gates, "lr": 0.0})
        optimiser = torch.optim.AdamW(groups, weight_decay=self.settings.weight_decay)
        if self.settings.schedule == "constant":
            return optimiser
        schedule: torch.optim.lr_scheduler.LRScheduler
        if self.settings.schedule == "cosine":
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        else:
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [g["lr"] for g in groups], total_steps=steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _kept(self) -> dict[str, torch.Size]:
        """Keys and shapes of what training changes: the trained tensors and all buffers."""
        kept = self.trained | {name for name, _ in self.net.named_buffers()}
        return {f"net.{name}": value.shape for name, value in self.net.state_dict().items() if name in kept}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen base out; keep what the rank controls remember."""
        kept = self._kept()
        checkpoint["rank_control"] = self.ranks.state_dict()
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network or adapter."""
        if {key: value.shape for key, value in checkpoint["state_dict"].items()} != self._kept():
            raise SegraftError("the checkpoint belongs to another network or adapter: start without --resume.")
        self.ranks.load_state_dict(checkpoint.get("rank_control", {}))
