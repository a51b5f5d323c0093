"""The folder of one training: what was asked for, the state to resume from, the result."""

import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segraft._version import __version__
from segraft.atomic import replacing
from segraft.errors import SegraftError


class RunFolder:
    """`run.json` (what was asked for), `last.ckpt` (state after the last epoch, until the training is done), result.

    Args:
        path: of the folder.
        result: file name of what the training makes.
        resume: go on with what is there.
        overwrite: replace a result that is there.
        writes: False in all but the first of several processes: nothing is checked, written or removed.

    Raises:
        SegraftError: a result or an unfinished training is there already, or there is nothing to resume.
    """

    def __init__(self, path: Path, result: str, *, resume: bool, overwrite: bool, writes: bool = True) -> None:
        self.path, self.result, self.resume = path, path / result, resume
        self.asked, self.checkpoint = path / "run.json", path / "last.ckpt"
        self.writes = writes
        if not writes:
            return
        if resume and not self.checkpoint.is_file():
            done = "it is finished" if self.result.is_file() else "no epoch of it was finished"
            raise SegraftError(f"there is nothing to resume in {path}: {done}.")
        if self.result.exists() and not (overwrite or resume):
            raise SegraftError(f"{self.result} exists: choose another --out, or pass --overwrite.")
        if self.checkpoint.is_file() and not (overwrite or resume):
            raise SegraftError(f"{path} holds an unfinished training: go on with --resume, or pass --overwrite.")

    @contextmanager
    def training(self, asked: Mapping[str, Any]) -> Iterator[None]:
        """Write down what was asked for around a training; when resuming, hold it against what was asked for then.

        A training that ends before its first epoch does leaves the folder as it was. One that ends well has
        written its result, and the state to resume from has served.

        Raises:
            SegraftError: it is not the same.
        """
        if not self.writes:
            yield
            return
        asked = json.loads(json.dumps(asked))
        before = self.asked.read_text(encoding="utf-8") if self.asked.is_file() else None
        made = not self.path.exists()
        if self.resume:
            self._hold_against(json.loads(before or "{}"), asked)
        else:
            if self.checkpoint.is_file():
                self.checkpoint.unlink()
            self._write(json.dumps(asked, indent=2) + "\n")
        try:
            yield
        except BaseException:
            if not self.checkpoint.is_file():
                self._restore(before, made=made)
            raise
        self.checkpoint.unlink(missing_ok=True)

    def _write(self, text: str) -> None:
        with replacing(self.asked) as aside:
            aside.write_text(text, encoding="utf-8")

    def _hold_against(self, before: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        then, now = dict(_flat(before)), dict(_flat(asked))
        for name in [*now, *then]:
            if then.get(name) != now.get(name):
                raise SegraftError(
                    f"{self.path} was started with another {name} ({then.get(name)!r}, now {now.get(name)!r}): "
                    "resume with the same options, or start a new folder."
                )

    def _restore(self, before: str | None, *, made: bool) -> None:
        if before is not None:
            self._write(before)
            return
        self.asked.unlink(missing_ok=True)
        if made and not any(self.path.iterdir()):
            self.path.rmdir()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values under dotted names, such as `settings.epochs`."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def versions() -> dict[str, str]:
    """What the result was made with."""
    from importlib.metadata import version

    libraries = ("torch", "monai", "lightning", "numpy", "nibabel")
    return {"segraft": __version__, "python": platform.python_version(), **{name: version(name) for name in libraries}}
