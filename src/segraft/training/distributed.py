"""One training over several processes, on one machine or several, with the results of one process.

Each process has the whole network and takes its share of every batch (`segraft.data.patches.EpochSampler`). Logits and
masks of all shares are brought together, so that each process computes the loss of the whole batch: a loss over the
batch (Dice) or over its voxels is no mean over shares. Gradients, parameters and losses are those of one process to
rounding; only dropout draws other numbers.

On one machine Lightning starts the other processes itself, by running the command (or script) again; torchrun or srun
start them on each machine, or the user does, with MASTER_ADDR, MASTER_PORT and NODE_RANK set. A script of one's own is
run again too, so what comes before and after the training runs in every process: keep it short, put it below
`if __name__ == "__main__":`, and let only one process print or write (`is_first_process`).
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from segraft.adapters import has_adapters
from segraft.data.patches import shares
from segraft.errors import SegraftError
from segraft.training.settings import TrainingSettings

Value = TypeVar("Value")

BY_HAND = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
FAILED = "segraft: why a process failed"


@dataclass(frozen=True)
class Team:
    """The processes of one training.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        environment: how they find one another; None for one process.
    """

    rank: int = 0
    size: int = 1
    environment: ClusterEnvironment | None = None

    @classmethod
    def join(cls, settings: TrainingSettings) -> "Team":
        """Find out which process of the training this is; to be called before anything is written.

        A process that Lightning started leaves Ctrl-C to the one that started it.

        Raises:
            SegraftError: the batch does not divide among the processes; devices are missing; this is not how many
                processes were started, or they cannot be.
        """
        size = settings.devices * settings.nodes
        _check_group(size)
        if size == 1:
            if TorchElasticEnvironment.detect():
                _check_launcher(TorchElasticEnvironment(), settings)
            return cls()
        if settings.volumes % size:
            raise SegraftError(
                f"{settings.volumes} volumes per step cannot be divided among {size} processes (devices × nodes): "
                f"use --volumes {-(-settings.volumes // size) * size}, or fewer processes."
            )
        _check_devices(settings)
        environment = _environment()
        _check_launcher(environment, settings)
        environment.set_global_rank(environment.node_rank() * settings.devices + environment.local_rank())
        if isinstance(environment, LightningEnvironment) and environment.local_rank():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return cls(environment.global_rank(), size, environment)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def first_does(self, work: Callable[[], Value]) -> Value:
        """Let the first process do something, and the others wait for it; to be called by all, after training.

        Returns:
            What it gives (something that can be pickled), in every process.

        Raises:
            SegraftError: it failed, in the processes that waited.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        failed: Exception | None = None
        if self.first:
            try:
                outcome[0] = work()
            except Exception as error:  # noqa: BLE001  raised again below, once the others know
                failed, outcome[1] = error, str(error)
        dist.broadcast_object_list(outcome, src=0)
        if failed is not None:
            raise failed
        if outcome[1] is not None:
            raise SegraftError(outcome[1])
        value: Value = outcome[0]
        return value

    def trainer_options(self, net: nn.Module, settings: TrainingSettings) -> dict[str, Any]:
        """Keyword arguments of Lightning's `Trainer`.

        Every trainable tensor of an adapter must take part in every step, but a plain network may have layers that it
        never calls: DDP finds them in the first step (and refuses a network that calls others later).
        """
        if self.size == 1:
            return {"devices": 1}
        return {
            "devices": settings.devices,
            "num_nodes": settings.nodes,
            "strategy": DDPStrategy(cluster_environment=self.environment, static_graph=not has_adapters(net)),
            "use_distributed_sampler": False,
        }


def is_first_process() -> bool:
    """Whether this process, of those that train together, is the one to print and write; also where it is alone."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _environment() -> ClusterEnvironment:
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        return SLURMEnvironment(auto_requeue=False)  # there is --resume
    return LightningEnvironment()


def _check_group(size: int) -> None:
    """A process that trained with others is still one of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    if dist.get_world_size() != size and not (size == 1 and dist.get_rank() == 0):
        raise SegraftError(
            f"{size} processes (devices × nodes) were asked for where {dist.get_world_size()} train together already: "
            "give every training of a script the same devices and nodes."
        )


def _check_devices(settings: TrainingSettings) -> None:
    if settings.device in {"auto", "cuda"} and torch.cuda.is_available():
        if torch.cuda.device_count() < settings.devices:
            raise SegraftError(
                f"{settings.devices} devices were asked for, but this machine has {torch.cuda.device_count()} GPUs: "
                "use fewer --devices, or --device cpu."
            )
    elif settings.device in {"auto", "mps"} and torch.backends.mps.is_available():
        raise SegraftError("device mps trains in one process alone: use --devices 1, or --device cpu.")


def _check_launcher(environment: ClusterEnvironment, settings: TrainingSettings) -> None:
    """Hold what was started against what was asked for."""
    asked = f"--devices {settings.devices} and --nodes {settings.nodes}"
    try:
        environment.validate_settings(num_devices=settings.devices, num_nodes=settings.nodes)
    except ValueError as error:
        raise SegraftError(
            f"{asked} do not fit the processes that were started ({error}): start one per device and node."
        ) from error
    if not isinstance(environment, LightningEnvironment):
        return
    missing = [name for name in BY_HAND if name not in os.environ]
    if settings.nodes > 1 and missing:
        raise SegraftError(
            f"{asked} need {', '.join(BY_HAND)} in the environment ({', '.join(missing)} missing): set them on every "
            "node, or start the processes with torchrun or srun."
        )
    main = sys.modules["__main__"]
    if not environment.creates_processes_externally and not (main.__spec__ or Path(sys.argv[0]).is_file()):
        raise SegraftError(
            f"{asked} start this program again for every further process, which takes a file: write a script, or use "
            "the command line."
        )


@contextmanager
def ending_together(team: Team, trainer: Trainer) -> Iterator[None]:
    """Around a training: where one process fails, all end, and the first one says why.

    A process that fails tells the store that the first one holds, before it goes; the others then find their
    connections closed. (Where a collective operation does not see that, on GPUs, the launcher ends it.)

    Raises:
        SegraftError: another process failed.
    """
    try:
        yield
    except Exception as error:
        if team.size == 1:
            raise
        cause = _told() if _disconnected(error) else None
        if cause is None:
            _tell(f"process {team.rank} of {team.size} stopped: {error}")
        if team.first:
            children = getattr(trainer.strategy.launcher, "procs", [])
            for child in children:
                child.kill()
                child.wait()
            children.clear()  # Lightning watches them, and would kill this process too
        if cause is None:
            raise
        raise SegraftError(cause) from error


def _disconnected(error: BaseException) -> bool:
    """Whether it says that another process has gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _tell(text: str) -> None:
    with suppress(RuntimeError, ValueError):  # not connected yet, or no longer
        dist.distributed_c10d._get_default_store().set(FAILED, text)  # noqa: SLF001


def _told() -> str:
    with suppress(RuntimeError, ValueError):
        store = dist.distributed_c10d._get_default_store()  # noqa: SLF001
        if store.check([FAILED]):
            return str(store.get(FAILED).decode())
    return "another process of this training stopped: see its message."


class Together:
    """A batch that the processes of a team share, one step after another.

    Args:
        team: more than one process.
        cases: of the whole training.
        settings: of the training.
    """

    def __init__(self, team: Team, cases: int, settings: TrainingSettings) -> None:
        self.team, self._cases, self._settings = team, cases, settings
        self.begin(0)

    def begin(self, step: int) -> None:
        """Turn to a step of the epoch."""
        left = min(self._settings.volumes, self._cases - step * self._settings.volumes)
        self.sizes = tuple(size * self._settings.patches for size in shares(left, self.team.size))

    @property
    def idle(self) -> bool:
        """Whether this process has no share of the batch: what it computes, on a stand-in, must not count."""
        return not self.sizes[self.team.rank]

    def whole(self, mine: Tensor) -> Tensor:
        """The tensors of all processes, [patches of the whole batch, …], from this one's [patches of its share, …].

        The gradient of a loss that every process computes of the result arrives at each share as many times as there
        are processes, which makes up for DDP taking their mean.
        """
        gathered: Tensor = _Gathered.apply(mine, self.sizes, self.team.rank)  # type: ignore[no-untyped-call]
        return gathered

    def names(self, mine: Sequence[str]) -> list[str]:
        """The names of all processes' cases; slow, for messages."""
        found: list[Any] = [None] * self.team.size
        dist.all_gather_object(found, [] if self.idle else list(mine))
        return [name for names in found for name in names]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
        ctx.shape, ctx.sizes, ctx.rank = mine.shape, sizes, rank
        padded = mine.new_zeros(max(sizes), *mine.shape[1:])
        padded[: sizes[rank]] = mine[: sizes[rank]]
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        mine = gradients[0].new_zeros(ctx.shape)
        first, size = sum(ctx.sizes[: ctx.rank]), ctx.sizes[ctx.rank]
        mine[:size] = gradients[0][first : first + size] * len(ctx.sizes)
        return mine, None, None
