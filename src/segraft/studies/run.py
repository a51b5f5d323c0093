"""One training of a study, and its folder, which is named by the content of what was asked for."""

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from segraft.atomic import replacing
from segraft.errors import SegraftError

REQUEST, FINISHED, FAILED, LOCK = "request.json", "finished.json", "failed.json", "lock"


@dataclass(frozen=True)
class Run:
    """What one training is to do, complete in itself: a process on another machine needs nothing else.

    Attributes:
        kind: `pretrain`, `masked`, `import` and `random` make a base; `adapt` makes an adapter and tests it.
        identity: everything that the result depends on; its digest names the folder. Scans are in it by their content.
        data: what it reads: `dataset.json`, a list of scans, or the weights to import; empty where it reads nothing.
        patient_pattern: that its patients are told by.
        train: ids of the cases to train on; empty where nothing is trained.
        test: ids of the cases to test on.
        base: the key of the run that makes the base.
    """

    kind: Literal["pretrain", "masked", "import", "random", "adapt"]
    identity: Mapping[str, Any]
    data: str
    patient_pattern: str | None
    train: tuple[str, ...]
    test: tuple[str, ...] = ()
    base: str | None = None

    @property
    def key(self) -> str:
        """The first 16 hex digits of the SHA-256 of the identity.

        Raises:
            SegraftError: a setting is nothing that JSON can say, such as a date.
        """
        try:
            text = json.dumps(self.identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise SegraftError(f"a setting is nothing that JSON can say ({error}): correct it.") from error
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def recomputes(self) -> bool:
        """Whether its training recomputes activations instead of keeping them."""
        return bool(self.identity.get("settings", {}).get("recompute"))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The run that a folder is of.

        Raises:
            SegraftError: the folder holds none.
        """
        try:
            content = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
            return cls(**{**content, "train": tuple(content["train"]), "test": tuple(content["test"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SegraftError(f"{folder} holds no run of a study: give one of the folders under runs/.") from error


@dataclass(frozen=True)
class Outcome:
    """How a run went.

    Attributes:
        key: of the run.
        seconds: that it took; None where it was finished before, or its process died.
        failure: the reason; None if it is finished.
    """

    key: str
    seconds: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Runs:
    """The folder that holds the folders of all runs."""

    path: Path
    _made: set[str] = field(default_factory=set, compare=False)

    def folder(self, key: str) -> Path:
        """Of one run."""
        return self.path / key

    def add(self, run: Run) -> Path:
        """The run's folder, made if it is new.

        Raises:
            SegraftError: it cannot be made or written to.
        """
        folder = self.folder(run.key)
        if run.key not in self._made:
            write_json(folder / REQUEST, asdict(run))
            self._made.add(run.key)
        return folder


def is_finished(folder: Path) -> bool:
    """Whether a run needs no more doing."""
    return (folder / FINISHED).is_file()


def fail(folder: Path, reason: str, trace: str | None = None) -> str:
    """Write down why a run failed, on one line, which is returned."""
    reason = " ".join(reason.split())
    write_json(folder / FAILED, {"reason": reason, "traceback": trace})
    return reason


def failure_of(folder: Path) -> str | None:
    """Why the last try failed, if it did."""
    with suppress(FileNotFoundError):  # also where another process has just begun to try again
        return str(json.loads((folder / FAILED).read_text(encoding="utf-8"))["reason"])
    return None


def told(failures: Mapping[str, str]) -> list[str]:
    """Why runs failed, each reason once."""
    reasons: dict[str, list[str]] = {}
    for key, reason in failures.items():
        reasons.setdefault(reason, []).append(key)
    return [
        f"run {keys[0]} failed: {reason}" if len(keys) == 1 else f"{len(keys)} runs failed ({keys[0]}, …): {reason}"
        for reason, keys in reasons.items()
    ]


def write_json(path: Path, content: object) -> None:
    """Strict JSON, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def digest_of(weights: Path) -> str:
    """The SHA-256 of a file's bytes.

    Raises:
        SegraftError: it cannot be read.
    """
    try:
        with weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        reason = f"the weights {weights} cannot be read ({error.strerror})"
        raise SegraftError(f"{reason}: correct the path, or --weights.") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process works in the folder, then keep others out.

    The lock goes with the process, so a killed one leaves none behind; a worker that outlives its study is waited for.
    It works between machines where their file system locks (NFS does).

    Raises:
        SegraftError: the system or the file system has no such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise SegraftError("studies need file locks that Windows has not got: run them under Linux or WSL.") from error
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            raise SegraftError(f"the file system of {folder} has no locks: choose another --out.") from error
        yield
