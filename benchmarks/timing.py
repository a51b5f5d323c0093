"""Seconds of several tasks that take turns, round after round."""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch


def order(names: Sequence[str], round_: int) -> list[str]:
    """Who goes when in a round: each is first in turn, and the rest follow in a new order, the same in every run."""
    first = names[round_ % len(names)]
    rest = [name for name in names if name != first]
    return [first, *random.Random(round_).sample(rest, len(rest))]  # noqa: S311  no secret


def alternate(
    tasks: Mapping[str, Callable[[], None]], rounds: int, device: torch.device, *, warm_up: bool = False
) -> dict[str, list[float]]:
    """Seconds of every task in every round.

    A machine whose speed drifts shifts all tasks of a round alike, so that their ratios within the round stand.

    Args:
        tasks: name -> what is timed.
        rounds: how many seconds of each come back.
        device: which is waited for.
        warm_up: one more round comes first, untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(-1 if warm_up and tasks else 0, rounds if tasks else 0):
        with _collected():
            for name in order(list(tasks), round_):
                taken = _timed(tasks[name], device)
                if round_ >= 0:
                    seconds[name].append(taken)
    return seconds


def beside(
    tasks: Mapping[str, Callable[[], None]], reference: Callable[[], None], rounds: int, device: torch.device
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of every task in every round, and those of the reference beside it, after a round untimed.

    For differences of a hundredth: within a whole round, a machine's speed drifts by more. In every other round the
    reference comes first; each round starts with it once untimed, as what comes after the garbage has been collected
    is slower.
    """
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in tasks}
    for round_ in range(-1 if tasks else 0, rounds if tasks else 0):
        with _collected():
            _timed(reference, device)
            for name in order(list(tasks), round_):
                pair = [_timed(task, device) for task in (tasks[name], reference)[:: 1 if round_ % 2 else -1]]
                if round_ >= 0:
                    for kept, taken in zip(seconds[name], pair[:: 1 if round_ % 2 else -1], strict=True):
                        kept.append(taken)
    return seconds


@contextmanager
def _collected() -> Iterator[None]:
    """Garbage is collected before, not within: it would strike one task of a round and not the others."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _timed(task: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return round(time.perf_counter() - started, 6)
