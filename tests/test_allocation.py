"""Freed memory is kept in a process of the command line, and nowhere else."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from segraft import allocation, cli
from segraft.allocation import arranged_by_user, gives_huge_pages, keep_freed_memory
from segraft.cli import train, use

SMAPS = Path("/proc/self/smaps")
FLAGS = SMAPS.is_file() and "VmFlags:" in SMAPS.read_text(encoding="utf-8")
GLIBC = sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names

CHURN = """
import json, resource, sys
import torch
from segraft.allocation import keep_freed_memory

took_effect = keep_freed_memory() if {keep} else None
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for times in range(60):
    if times == 20:  # by now small blocks have found their places between the large ones
        before = faults()
    torch.ones(10 * 2**20)
churned = faults() - before

torch.manual_seed(0)
net, image = torch.nn.Linear(8, 1), torch.randn(64, 8)
optimiser = torch.optim.AdamW(net.parameters(), lr=0.1)
losses = []
for _ in range(20):
    optimiser.zero_grad()
    loss = (net(image) - image.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
print(json.dumps([took_effect, churned, losses]))
"""


def churn(*, keep: bool, **variables: str) -> tuple[bool | None, int, list[float]]:
    """In a process of its own: the answer, page faults of allocating 40 MiB forty times, a training's losses."""
    plain = {name: value for name, value in os.environ.items() if not arranged_by_user({name: value})}
    command = [sys.executable, "-c", CHURN.format(keep=keep)]
    environment = plain | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return tuple(json.loads(done.stdout))


@pytest.fixture(scope="module")
def without() -> tuple[int, list[float]]:
    """Page faults and losses of a process that is left as it is."""
    return churn(keep=False)[1:]


@pytest.mark.skipif(not GLIBC, reason="for the GNU C library")
def test_memory_that_was_freed_is_used_again(without):
    took_effect, kept, losses = churn(keep=True)
    returned, losses_without = without
    assert took_effect is True
    assert 10 * kept < returned
    assert losses == losses_without
    assert losses[-1] < losses[0]


@pytest.mark.skipif(not GLIBC, reason="for the GNU C library")
def test_what_the_user_arranged_stays(without):
    took_effect, churned, _ = churn(keep=True, MALLOC_MMAP_MAX_="65536")  # as many as by default
    assert took_effect is False
    assert churned > without[0] / 2


ADVISED = """
import json, re, resource
from pathlib import Path
import torch
from segraft.allocation import gives_huge_pages, keep_freed_memory

{before}
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
at_first = resident()
kept = keep_freed_memory(huge_pages={huge_pages})
large = torch.ones(16 * 2**20)
grown = resident() - at_first
flags, inside = {{}}, None
for line in Path("/proc/self/smaps").read_text().splitlines():
    region = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
    if region:
        inside = int(region[1], 16) <= large.data_ptr() + 2**25 < int(region[2], 16)
    elif inside and line.startswith("VmFlags:"):
        flags = line.split()[1:]
print(json.dumps([kept, gives_huge_pages(), "hg" in flags, grown]))
"""


@pytest.mark.skipif(not (GLIBC and FLAGS), reason="for the GNU C library, where the kernel shows a mapping's flags")
@pytest.mark.parametrize(
    ("huge_pages", "before"),
    [
        (True, ""),
        (False, ""),
        (True, "resource.setrlimit(resource.RLIMIT_AS, (2**44, resource.getrlimit(resource.RLIMIT_AS)[1]))"),
    ],
    ids=["asked", "not asked", "addresses limited"],
)
def test_tensors_lie_where_huge_pages_were_asked_for(huge_pages, before):
    plain = {name: value for name, value in os.environ.items() if not arranged_by_user({name: value})}
    plain.pop("THP_MEM_ALLOC_ENABLE", None)  # torch's own
    command = [sys.executable, "-c", ADVISED.format(huge_pages=huge_pages, before=before)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain | {"OMP_NUM_THREADS": "1"})
    kept, given, advised, grown = json.loads(done.stdout)
    assert kept is True
    assert given is (gives_huge_pages() and not before)
    assert advised is (given and huge_pages)
    assert grown < 2 * 16 * 2**22  # what was set aside takes no memory


@pytest.mark.skipif(not GLIBC, reason="for the GNU C library")
def test_addresses_that_are_refused_leave_the_heap_as_it_is():
    asked = """
import mmap, sys
from unittest.mock import patch
from segraft import allocation

with patch.object(mmap, "mmap", side_effect=OSError), patch.object(allocation, "gives_huge_pages", lambda: True):
    with patch("ctypes.CDLL") as library:
        library.return_value.mallopt.return_value = 1
        kept = allocation.keep_freed_memory()
print(kept, library.return_value.malloc.called)
"""
    plain = {name: value for name, value in os.environ.items() if not arranged_by_user({name: value})}
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, env=plain)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.skipif(sys.platform != "linux", reason="for Linux")
@pytest.mark.parametrize(
    ("pages", "size", "overcommit", "given"),
    [
        ("always [madvise] never\n", 2**21, 0, True),
        ("always [madvise] never\n", 2**21, 1, True),
        ("always [madvise] never\n", 2**21, 2, False),
        ("always [madvise] never\n", 2**29, 0, False),
        ("[always] madvise never\n", 2**21, 0, False),
        ("always madvise [never]\n", 2**21, 0, False),
        (None, 2**21, 0, False),
    ],
)
def test_where_huge_pages_are_asked_for(monkeypatch, tmp_path, pages, size, overcommit, given):
    monkeypatch.setattr("resource.getrlimit", lambda _limit: (-1, -1))
    monkeypatch.setattr(allocation, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(allocation, "HUGE_PAGE", tmp_path / "size")
    monkeypatch.setattr(allocation, "OVERCOMMIT", tmp_path / "overcommit")
    if pages is not None:
        (tmp_path / "enabled").write_text(pages)
    (tmp_path / "size").write_text(f"{size}\n")
    (tmp_path / "overcommit").write_text(f"{overcommit}\n")
    assert gives_huge_pages() is given


@pytest.mark.parametrize(
    ("variables", "arranged"),
    [
        ({}, False),
        ({"MALLOC_MMAP_MAX_": "0"}, True),
        ({"MALLOC_ARENA_MAX": "1"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.top_pad=1:glibc.cpu.hwcaps=x"}, True),
        ({"GLIBC_TUNABLES": "glibc.cpu.hwcaps=x"}, False),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, True),
        ({"LD_PRELOAD": "libgomp.so.1:/opt/libtcmalloc_minimal.so.4"}, True),
        ({"LD_PRELOAD": "libgomp.so.1 libmimalloc.so"}, True),
        ({"LD_PRELOAD": "/opt/malloc/libgomp.so.1"}, False),
        ({"LD_PRELOAD": "", "PATH": "/opt/jemalloc"}, False),
    ],
)
def test_which_variables_count(monkeypatch, variables, arranged):
    assert arranged_by_user(variables) is arranged
    if arranged:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert keep_freed_memory() is False


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_left_alone(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    assert keep_freed_memory() is False


def test_another_c_library_is_left_alone(monkeypatch):
    class Musl:
        def __init__(self, _name: Any) -> None:
            pass

    monkeypatch.setattr("ctypes.CDLL", Musl)
    assert keep_freed_memory() is False


@pytest.mark.parametrize(
    ("command", "runs"),
    [
        (("pretrain", "--data", "no/where", "--out", "no/where"), True),
        (("adapt", "--base", "no/where", "--data", "no/where", "--out", "no/where"), True),
        (("demo", "--out", "{file}"), True),
        (("pretrain", "--data", "no/where", "--out", "no/where", "--recompute", "decoder"), False),
        (("adapt", "--base", "x", "--data", "no/where", "--out", "no/where", "--recompute", "decoder"), False),
        (("predict", "no/where", "no/where", "-o", "no/where"), True),
        (("evaluate", "no/where", "--data", "no/where"), True),
        (("study", "run", "smoke", "--data", "no/where", "--out", "no/where"), True),
        (("study", "run", "{file}/recomputing.yaml", "--data", "no/where", "--out", "no/where"), False),
        (("inspect", "no/where"), False),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_the_commands_that_run_networks_ask_for_it_unless_memory_is_short(monkeypatch, tmp_path, command, runs):
    asked: list[bool] = []
    # The package's own `study` is the group of commands.
    for module in (import_module("segraft.cli.study"), train, use):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: asked.append(True))
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "base").write_text("")
    (tmp_path / "file" / "recomputing.yaml").write_text("extends: smoke\ntraining: {recompute: [decoder]}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["segraft", *(word.format(file=tmp_path / "file") for word in command)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert bool(asked) is runs


def test_importing_asks_for_nothing():
    script = (
        "import ctypes\n"
        "from unittest.mock import patch\n"
        "with patch('ctypes.CDLL', side_effect=AssertionError):\n"
        "    import segraft, segraft.allocation, segraft.cli\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
