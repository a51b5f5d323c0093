"""Running a training to its end, on Lightning."""

import logging
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from segraft.data.patches import EpochSampler, PatchSource, collate
from segraft.errors import SegraftError
from segraft.training.batch_norms import batch_norms_together
from segraft.training.callbacks import EpochCheckpoint, History, ProgressBar
from segraft.training.distributed import Team, Together, ending_together
from segraft.training.module import SegmentationTask
from segraft.training.recomputation import recomputing
from segraft.training.scans import ScanSource
from segraft.training.settings import TrainingSettings

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


@dataclass(frozen=True)
class Fit:
    """How a training went.

    Attributes:
        losses: mean training loss of every epoch.
        converged: it stopped early by the convergence rule.
        seconds: wall time of this run (a resumed run counts its own part).
        device: what it ran on.
        peak_bytes: most memory held at a time: of this process since it began, or of the GPU in the training; None
            where the system does not tell.
        ranks: of gated adapters, after every epoch the mean number of directions in use per weight.
        processes: how many trained together.
    """

    losses: tuple[float, ...]
    converged: bool
    seconds: float
    device: str
    peak_bytes: int | None = None
    ranks: tuple[float, ...] = ()
    processes: int = 1

    def summary(self) -> str:
        """In half a line."""
        stop = "converged" if self.converged else "done"
        rank = f", rank {self.ranks[-1]:.1f} in use on average" if self.ranks else ""
        peak = f", peak memory {self.peak_bytes / 2**30:.1f} GiB" if self.peak_bytes else ""
        loss, epochs = self.losses[-1], len(self.losses)
        return f"loss {loss:.3f}, {stop} after {epochs} epochs, {self.seconds:.0f} s{rank}{peak}"


def fit(
    net: nn.Module,
    source: PatchSource | ScanSource,
    settings: TrainingSettings,
    *,
    checkpoint: Path,
    resume: bool = False,
    title: str = "training",
    console: Console | None = None,
    make_task: Callable[[nn.Module, TrainingSettings, int, Together | None], SegmentationTask] = SegmentationTask,
) -> Fit:
    """Train what of `net` requires a gradient on patches of `source`.

    With `settings.devices` or `nodes` above 1, Lightning runs the calling script again for each further process, and
    the call returns in each of them, with the same network: see `segraft.training.distributed`.

    Args:
        net: the network, changed in place.
        source: prepared cases.
        settings: of the training.
        checkpoint: file that holds the state after the last full epoch.
        resume: go on from that file, exactly; it must exist.
        title: of the progress bar.
        console: where the first process draws the progress bar; None draws none.
        make_task: what a step does, of the arguments of `SegmentationTask`.

    Raises:
        KeyboardInterrupt: Ctrl-C; the checkpoint holds the last full epoch.
        SegraftError: no checkpoint to resume from, or not a whole one; the device is not there; another process
            failed; see also `SegmentationTask`, `Team.join`, `batch_norms_together` and `recomputing`.
    """
    team = Team.join(settings)
    together = Together(team, len(source), settings) if team.size > 1 else None
    if resume:
        _check_checkpoint(checkpoint)
    loader = DataLoader(
        source,
        batch_size=settings.volumes // team.size,
        sampler=EpochSampler(len(source), seed=settings.seed, batch=settings.volumes, rank=team.rank, ranks=team.size),
        collate_fn=collate,
        drop_last=False,
    )
    task = make_task(net, settings, settings.epochs * len(loader), together)
    history = History(seed=settings.seed, stop_when_converged=settings.stop_when_converged)
    bar = [] if console is None or not team.first else [ProgressBar(title, console)]
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    started = time.perf_counter()
    with warnings.catch_warnings():
        # The patches come from memory: workers would only copy it.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning 2.6 asks torch for a name that torch 2.13 deprecates.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
        trainer = Trainer(
            **team.trainer_options(net, settings),
            accelerator=check_device(settings.device),
            precision=PRECISIONS[settings.precision],
            max_epochs=settings.epochs,
            callbacks=[history, *bar, EpochCheckpoint(checkpoint)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            deterministic="warn" if torch.cuda.is_available() else False,
        )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        net.train()  # Lightning leaves the mode as it finds it
        with (
            ending_together(team, trainer),
            _interruptible(trainer),
            batch_norms_together(net, together),
            recomputing(net, settings.recompute),
        ):
            trainer.fit(task, loader, ckpt_path=checkpoint if resume else None, weights_only=True if resume else None)
    seconds = time.perf_counter() - started
    device = trainer.strategy.root_device
    peak = peak_bytes(device)
    net.to("cpu").eval()
    losses, ranks = tuple(history.losses), tuple(history.ranks)
    return Fit(losses, history.converged, seconds, str(device), peak, ranks, team.size)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory held at a time: of the GPU since its count was reset, else of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """Lightning answers Ctrl-C by leaving the process, deaf to further ones: hand it to the caller instead."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


def _check_checkpoint(path: Path) -> None:
    if not path.is_file():
        raise SegraftError(f"{path} does not exist, so there is nothing to resume: start without --resume.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise SegraftError(f"{path} is not a readable checkpoint: start without --resume.") from error
    if not isinstance(content, dict) or not {"state_dict", "loops", "callbacks"} <= set(content):
        raise SegraftError(f"{path} is no checkpoint of a training: start without --resume.")


def check_precision(device: str, precision: str) -> None:
    """Refuse half precision on the CPU, where libraries put bf16 in its place.

    Raises:
        SegraftError: it is asked for.
    """
    if precision == "16" and not (device == "cuda" or (device == "auto" and torch.cuda.is_available())):
        raise SegraftError(f"precision 16 needs a GPU, and the device is {device!r}: use --precision bf16 or 32.")


def check_device(device: str) -> str:
    """`device` itself, once it is known to be there.

    Raises:
        SegraftError: it is not.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device, True):
        raise SegraftError(f"device {device!r} is not available on this machine: use --device cpu or auto.")
    return device
