"""Writing files so that nothing half-written is ever left under the name that was asked for."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from segraft.errors import SegraftError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes `path`'s place, on any error it is removed.

    The temporary name ends as `path` does (`.nii.gz`, `.safetensors`), because writers choose the format by it.
    Parent folders are made. The file gets the permissions of any new file, whatever its writer chose.

    Raises:
        SegraftError: the folder cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    aside = path.with_name(f".{uuid4().hex[:12]}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        permissions = aside.stat().st_mode
        yield aside
        aside.chmod(permissions)
        aside.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise SegraftError(f"{path} cannot be written ({reason}): choose another output path.") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it takes `path`'s place, on any error it is removed.

    Files in it get the permissions of any new file, whatever their writers chose. Whether what is at `path` may go is
    for the caller to know. A link stays one: what it points to is replaced.

    Raises:
        SegraftError: it cannot be made or written to, or the disk is full.
    """
    shown, path = path, Path(path).resolve()
    mark = uuid4().hex[:12]
    aside, before = path.with_name(f".{mark}.{path.name}"), path.with_name(f".{mark}.before.{path.name}")
    try:
        aside.mkdir(parents=True)
        yield aside
        _as_new(aside)
        if path.exists():
            path.replace(before)
        try:
            aside.replace(path)
        except OSError:
            if before.exists():
                before.replace(path)
            raise
    except OSError as error:
        reason = error.strerror or error
        raise SegraftError(f"{shown} cannot be written ({reason}): choose another output path.") from error
    finally:
        for left in (aside, before):
            _remove(left)


def _as_new(folder: Path) -> None:
    """Give each file in a folder the permissions of any new file."""
    probe = folder / f".{uuid4().hex[:12]}"
    probe.touch()
    permissions = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(permissions)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)
