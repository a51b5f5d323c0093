"""Seconds of several tasks that take turns, round after round."""

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence

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
    for round_ in range(-1 if warm_up else 0, rounds if tasks else 0):
        gc.collect()
        gc.disable()  # it would strike one task of a round and not the others
        try:
            for name in order(list(tasks), round_):
                started = time.perf_counter()
                tasks[name]()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if round_ >= 0:
                    seconds[name].append(round(time.perf_counter() - started, 6))
        finally:
            gc.enable()
    return seconds
