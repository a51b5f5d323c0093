"""What a benchmark runs on, and how its process takes memory."""

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import segraft
from segraft._version import __version__
from segraft.allocation import arranged_by_user, gives_huge_pages, keep_freed_memory


def allocation(*, keep: bool, huge_pages: bool = True) -> str:
    """How this process takes memory, in words; with `keep`, and `huge_pages` where there are, as Segraft's commands do.

    By default glibc maps each large block when it is asked for and unmaps it when it is freed, and the kernel clears
    every page again at each step. How often that happens depends on sizes more than on methods, and can be half of a
    step.
    """
    if keep and keep_freed_memory(huge_pages=huge_pages):
        return "freed memory is kept" + (", in huge pages" if huge_pages and gives_huge_pages() else "")
    return "as the environment says" if arranged_by_user(os.environ) else "default"


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def machine(device: torch.device) -> dict[str, object]:
    """The hardware."""
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """The software."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "segraft": __version__}
    for package in ("peft", "lycoris-lora", "monai"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def source() -> str:
    """A digest of Segraft's own source: pieces of one file may be measured before and after a change of it."""
    root = Path(segraft.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
