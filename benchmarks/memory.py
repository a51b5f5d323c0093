"""Peak memory of a training step.

Counted are the bytes that PyTorch's allocator has handed out and not got back since before the network was built, so
that parameters, gradients, optimiser states, activations and whatever a layer keeps are all in it, and nothing that
belongs to another network. On a GPU the allocator tells. On a CPU its single allocations are read from the profiler;
what libraries below PyTorch allocate by themselves (oneDNN's scratch space) is not in it.
"""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.subject import Subject

# The profiler otherwise announces every start and stop on standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

MARK = "benchmarks: the measured step begins"


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        resident: between two steps: network, optimiser, image.
        peak: the most during a step, with what is resident.
    """

    resident: int
    peak: int


def first_steps(build: Callable[[], Subject], device: torch.device) -> tuple[Subject, Memory]:
    """Build a subject and take two steps with it: the first makes the optimiser's state, the second is measured."""
    gc.collect()
    return _on_cuda(build, device) if device.type == "cuda" else _on_cpu(build)


def _on_cuda(build: Callable[[], Subject], device: torch.device) -> tuple[Subject, Memory]:
    torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)  # cuBLAS takes its workspace once, for all
    before = torch.cuda.memory_allocated(device)
    subject = build()
    subject.step()
    torch.cuda.synchronize(device)
    resident = torch.cuda.memory_allocated(device) - before
    torch.cuda.reset_peak_memory_stats(device)
    subject.step()
    torch.cuda.synchronize(device)
    return subject, Memory(resident, torch.cuda.max_memory_allocated(device) - before)


def _on_cpu(build: Callable[[], Subject]) -> tuple[Subject, Memory]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        subject = build()
        subject.step()
        with record_function(MARK):
            pass
        subject.step()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    allocated, resident, peak = 0, 0, None
    for event in events:
        if event.name() == MARK:
            resident = peak = allocated
        elif event.name() == "[memory]":
            allocated += event.nbytes()  # negative where memory is given back
            peak = None if peak is None else max(peak, allocated)
    if not peak:
        raise RuntimeError("the profiler recorded no memory: is this PyTorch built with Kineto?")
    return subject, Memory(resident, peak)
