"""Which files of a folder are DICOM."""

from pathlib import Path

from segraft.errors import SegraftError

SEG_SUFFIX = ".dcm"
_MAGIC_AT, _MAGIC = 128, b"DICM"
_ASIDE_NAMES = {"DICOMDIR", "LICENSE", "README", "LOCKFILE", "VERSION"}
_ASIDE_SUFFIXES = {
    ".txt",
    ".md",
    ".json",
    ".xml",
    ".csv",
    ".html",
    ".pdf",
    ".jpg",
    ".jpeg",
    ".png",
    ".ini",
    ".inf",
    ".db",
}


def is_dicom(file: Path) -> bool:
    """Whether a file begins as DICOM files do (PS3.10, section 7.1)."""
    try:
        with file.open("rb") as stream:
            return stream.read(_MAGIC_AT + len(_MAGIC))[_MAGIC_AT:] == _MAGIC
    except OSError as error:
        raise SegraftError(f"{file} cannot be read ({error.strerror}): correct the path or its permissions.") from error


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files in a folder, sorted; `DICOMDIR`, hidden files and what is in folders inside it do not count.

    Raises:
        SegraftError: the folder or a file cannot be read.
    """
    return [file for file in _candidates(folder) if is_dicom(file)]


def series_files(folder: Path) -> list[Path]:
    """The DICOM files in a folder, which must hold nothing else but what is plainly no part of a series.

    Raises:
        SegraftError: a file that is no DICOM; there are none; the folder or a file cannot be read.
    """
    found = _candidates(folder)
    for file in found:
        if not is_dicom(file):
            raise SegraftError(f"{file} is not a DICOM file (no DICM at byte {_MAGIC_AT}): move it out of the folder.")
    if not found:
        raise SegraftError(f"the folder {folder} holds no DICOM files: give the folder of one series.")
    return found


def holds_series(folder: Path) -> bool:
    """Whether a folder has DICOM files in it (folders inside it do not count)."""
    return any(is_dicom(file) for file in _candidates(folder))


def _candidates(folder: Path) -> list[Path]:
    """All but what is plainly something else: `DICOMDIR`, text, pictures, hidden files."""
    try:
        inside = sorted(file for file in folder.iterdir() if not file.is_dir())
    except OSError as error:
        raise SegraftError(f"the folder {folder} cannot be read ({error.strerror}): correct the path.") from error
    return [file for file in inside if not _is_aside(file)]


def _is_aside(file: Path) -> bool:
    return file.name.startswith(".") or file.name in _ASIDE_NAMES or file.suffix.lower() in _ASIDE_SUFFIXES
