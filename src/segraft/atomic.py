"""Writing files so that nothing half-written is ever left under the name that was asked for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from segraft.errors import SegraftError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes `path`'s place, on any error it is removed.

    The temporary name ends as `path` does (`.nii.gz`, `.safetensors`), because writers choose the format by it.
    Parent folders are made.

    Raises:
        SegraftError: the folder cannot be made or written to.
    """
    path = Path(path)
    aside = path.with_name(f".{uuid4().hex[:12]}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        aside.replace(path)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise SegraftError(f"{path} cannot be written ({error.strerror}): choose another output path.") from error
    finally:
        aside.unlink(missing_ok=True)
