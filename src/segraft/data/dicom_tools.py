"""pydicom and highdicom, which only those who have DICOM need, and what they warn of."""

import functools
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from segraft.errors import SegraftError

_QUOTED = re.compile(r"'.*'|\".*\"")
_log = logging.getLogger(__name__)


def load_pydicom() -> ModuleType:
    """The library, which only those who have DICOM need.

    Raises:
        SegraftError: it is not installed.
    """
    try:
        import pydicom
        import pydicom.pixels
        import pydicom.uid
    except ImportError as error:
        raise SegraftError(f"DICOM needs pydicom, which is not installed ({error}): install segraft[dicom].") from error
    return pydicom


def load_highdicom() -> ModuleType:
    """What writes and reads DICOM SEG, which only those who have DICOM need.

    Raises:
        SegraftError: it is not installed.
    """
    load_pydicom()
    try:
        import highdicom
    except ImportError as error:
        raise SegraftError(
            f"DICOM SEG needs highdicom, which is not installed ({error}): pip install 'segraft[dicom]'."
        ) from error
    return highdicom


@contextmanager
def warnings_logged(folder: Path) -> Iterator[None]:
    """Log what is warned of inside, so that it neither fails where warnings are errors nor is lost.

    pydicom warns where a value breaks the rules of its type but can be read (identifiers with letters, say), and where
    pixel data are longer than they should be or contradict their description. What it shows in quotation marks is left
    out: it may be the patient's.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for message in dict.fromkeys(" ".join(str(each.message).split()) for each in caught):
                log_once(folder, _QUOTED.sub("'…'", message))


@functools.cache
def log_once(path: Path, message: str) -> None:
    """Warn of something in a file or folder that may be read many times."""
    _log.warning("%s: %s", path, message)
