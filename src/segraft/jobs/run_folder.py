"""The folder of one training: what was asked for, the state to resume from, the result."""

import json
import platform
from collections.abc import Mapping
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

    Raises:
        SegraftError: a result is there already, or there is nothing to resume.
    """

    def __init__(self, path: Path, result: str, *, resume: bool, overwrite: bool) -> None:
        self.path, self.result, self.resume = path, path / result, resume
        self.asked, self.checkpoint = path / "run.json", path / "last.ckpt"
        if resume and not self.checkpoint.is_file():
            done = "it is finished" if self.result.is_file() else "no epoch of it was finished"
            raise SegraftError(f"there is nothing to resume in {path}: {done}.")
        if self.result.exists() and not (overwrite or resume):
            raise SegraftError(f"{self.result} exists: choose another --out, or pass --overwrite.")

    def open(self, asked: Mapping[str, Any]) -> None:
        """Write down what was asked for; when resuming, hold it against what was asked for then.

        Raises:
            SegraftError: it is not the same.
        """
        asked = json.loads(json.dumps(asked))
        if self.resume:
            before = json.loads(self.asked.read_text(encoding="utf-8")) if self.asked.is_file() else {}
            changed = [key for key in asked if before.get(key) != asked[key]]
            if changed:
                raise SegraftError(
                    f"{self.path} was started with another {changed[0]} ({before.get(changed[0])!r}, now "
                    f"{asked[changed[0]]!r}): resume with the same options, or start a new folder."
                )
            return
        self.checkpoint.unlink(missing_ok=True)
        with replacing(self.asked) as aside:
            aside.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """The training is done and its result written: the state to resume from has served."""
        self.checkpoint.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """What the result was made with."""
    from importlib.metadata import version

    libraries = ("torch", "monai", "lightning", "numpy", "nibabel")
    return {"segraft": __version__, "python": platform.python_version(), **{name: version(name) for name in libraries}}
