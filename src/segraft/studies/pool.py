"""Processes of this machine that do runs, one after another each."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

from segraft.studies.run import Outcome

COMMAND = (sys.executable, "-m", "segraft.studies.worker")


class Died(Exception):  # noqa: N818  a fact about a process
    """A process ended before it had said how its run went; the message says how."""


class _Process:
    """One `segraft.studies.worker`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        # A file, as a full pipe would stop the process, and one that outlives us could not write to it.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the process
        self._popen = subprocess.Popen(  # noqa: S603  our own module
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **environment},
            encoding="utf-8",
        )

    def do(self, folder: Path) -> Outcome:
        """Raises `Died`, or `KeyboardInterrupt` where that is what ended the process."""
        assert self._popen.stdin is not None and self._popen.stdout is not None  # noqa: PT018, S101
        try:
            self._popen.stdin.write(f"{json.dumps(str(folder))}\n")
            self._popen.stdin.flush()
            answer = self._popen.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return Outcome(**json.loads(answer))
        code = self._popen.wait()
        if code == -signal.SIGINT:
            raise KeyboardInterrupt
        self._said.seek(0)
        last = " ".join(self._said.read().decode(errors="replace").split()[-40:])
        how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit status {code}"
        raise Died(f"its process ended with {how}{last and f': {last}'}.")

    def stop(self) -> None:
        """At once, whatever it is at: a training goes on from its last epoch."""
        self._popen.kill()
        self._popen.wait()
        for stream in (self._popen.stdin, self._popen.stdout, self._said):
            if stream is not None:
                with suppress(BrokenPipeError):  # of what was being written to it
                    stream.close()


class Pool:
    """As many processes as there are callers at a time, each started when it is first needed.

    A process is used again, as starting one takes seconds, and replaced when it has died. Leaving the context ends all.

    Args:
        environment: variables of the processes, beside this one's.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._lock = Lock()
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        self._closed = False

    def do(self, folder: Path) -> Outcome:
        """Do the run of a folder; may be called from several threads.

        Raises:
            Died: the process did.
            KeyboardInterrupt: Ctrl-C ended it.
        """
        with self._lock:
            if self._closed:
                raise Died("the study was stopped.")
            process = self._idle.pop() if self._idle else _Process(self._environment)
            self._all.add(process)
        outcome = process.do(folder)
        with self._lock:
            self._idle.append(process)
        return outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
        for process in self._all:
            process.stop()
