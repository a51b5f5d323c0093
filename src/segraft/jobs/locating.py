"""Which file is meant by a path, and whether it is an adapter or a base."""

from pathlib import Path

from segraft.adapters import AdapterHeader, read_header
from segraft.errors import SegraftError
from segraft.networks import Base, read_base
from segraft.networks.bases import FILE_NAME
from segraft.networks.records import record_problem

ADAPTER_FILE = "adapter.safetensors"


def file_in(path: Path) -> Path:
    """The file meant by a folder: its adapter, else its base."""
    if path.is_dir():
        return path / (ADAPTER_FILE if (path / ADAPTER_FILE).is_file() else FILE_NAME)
    return path


def holds_base(path: Path) -> bool:
    """Whether a file is a base by what is in it: a copy under another name still knows the cases that trained it."""
    try:
        read_base(path)
    except SegraftError:
        return False
    return True


def read_adapter(path: Path) -> AdapterHeader:
    """What an adapter file says about itself, with a record that may be relied on.

    Raises:
        SegraftError: as `segraft.adapters.read_header`; the record does not hold what Segraft writes.
    """
    header = read_header(path)
    problem = record_problem(header.record)
    if problem is not None:
        raise SegraftError(f"{path} cannot be used: {problem}, as segraft writes it.")
    return header


def header_of(path: Path) -> AdapterHeader | Base:
    """What a file of Segraft says about itself, whatever its name.

    Raises:
        SegraftError: it is neither an adapter nor a base, or not readable.
    """
    path = file_in(path)
    return read_base(path) if path.name == FILE_NAME or holds_base(path) else read_adapter(path)
