"""What happens around the steps: history, convergence, checkpoints, progress."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from segraft.adapters import ranks_in_use
from segraft.atomic import replacing
from segraft.training.module import SegmentationTask


def has_converged(losses: Sequence[float], *, window: int = 20, tolerance: float = 0.01) -> bool:
    """The validation-free stop of ARENA.

    Whether over the last `window` epochs the training loss improved by no more than `tolerance` of (the size of) its
    value at their start.
    """
    if len(losses) < window:
        return False
    start = losses[-window]
    return start - losses[-1] <= tolerance * abs(start)


class History(Callback):
    """Mean training loss and rank in use of every epoch; seeds the global generator per step; stops on convergence.

    Its state travels in the checkpoint, and nothing random depends on what happened before a step, so that a
    resumed training continues exactly.
    """

    def __init__(self, *, seed: int, stop_when_converged: bool) -> None:
        self.losses: list[float] = []
        self.ranks: list[float] = []
        self.seed, self.stop_when_converged = seed, stop_when_converged
        self.converged = False
        self._sum, self._steps = torch.zeros(()), 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """A training that had converged when it was left does not go on (Lightning forgets that it had)."""
        trainer.should_stop = trainer.should_stop or self.converged

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Count from nothing."""
        self._sum, self._steps = torch.zeros((), device=pl_module.device), 0

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Dropout and the like depend on seed, epoch and step alone.

        Seeding the epoch would not do: a data loader draws from the same generator when it is started, which a
        resumed training does at another moment. Processes that train together draw different numbers, each for its
        part of the batch.
        """
        rank = (trainer.global_rank,) if trainer.global_rank else ()
        words = np.random.SeedSequence([self.seed, trainer.current_epoch, batch_idx], spawn_key=rank)
        torch.manual_seed(int(words.generate_state(1, np.uint64)[0]))

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Add up, without waiting for the device."""
        self._sum += outputs["reported"]
        self._steps += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch down and stop if nothing is gained any more: all processes alike, by the first one's loss."""
        self.losses.append(trainer.strategy.broadcast(float(self._sum) / max(1, self._steps)))
        used = ranks_in_use(pl_module.net) if isinstance(pl_module, SegmentationTask) else None
        if used is not None:
            self.ranks.append(used.mean)
        may_stop = not isinstance(pl_module, SegmentationTask) or pl_module.ranks.may_stop
        if self.stop_when_converged and may_stop and has_converged(self.losses):
            self.converged = trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"losses": list(self.losses), "ranks": list(self.ranks), "converged": self.converged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.losses, self.ranks = list(state_dict["losses"]), list(state_dict.get("ranks", ()))
        self.converged = bool(state_dict["converged"])


class EpochCheckpoint(Checkpoint):
    """The whole training state after every epoch, written aside and moved, so that a kill leaves the last good one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Write it: the first process does, and the others wait."""
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self.path)
            return
        with replacing(self.path) as aside:
            trainer.save_checkpoint(aside)


class ProgressBar(Callback):
    """One bar over all steps, on standard error, so that standard output stays for results."""

    def __init__(self, title: str, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.title, self.task = title, TaskID(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Show it."""
        total = int(trainer.estimated_stepping_batches)
        self.progress.start()
        self.task = self.progress.add_task(self.title, total=total, completed=trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:  # noqa: ARG002
        """Advance it."""
        self.progress.update(self.task, completed=trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Show the epoch's loss."""
        history = next(each for each in trainer.callbacks if isinstance(each, History))  # type: ignore[attr-defined]
        if history.losses:
            rank = f" · rank {history.ranks[-1]:.1f}" if history.ranks else ""
            self.progress.update(self.task, description=f"{self.title} · loss {history.losses[-1]:.3f}{rank}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Take it away, also after an error."""
        self.progress.stop()
