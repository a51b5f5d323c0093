"""The formats that masks are written in."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from segraft.data.channels import Scan
from segraft.data.dicom_files import SEG_SUFFIX
from segraft.data.dicom_seg_writing import Found, Origin, require_writable, write_segmentation
from segraft.data.nifti import SUFFIXES, ends_in, write_mask
from segraft.errors import SegraftError
from segraft.jobs.model import Model, Segmentation


@dataclass(frozen=True)
class MaskFormat:
    """One format.

    Attributes:
        endings: of its files, in lower case; the last is what a mask's name gets.
        check: refuses a scan whose mask could not be written, before any is segmented.
        write: writes what a model found.
    """

    endings: tuple[str, ...]
    check: Callable[[Model, Scan], None]
    write: Callable[[Model, Segmentation, Path], None]


def format_of(out: Path, asked: str | None) -> MaskFormat:
    """The format asked for, else that of a file's ending, else NIfTI.

    Raises:
        SegraftError: no such format, or a file that ends as another's.
    """
    if asked is not None and asked not in FORMATS:
        raise SegraftError(f'"{asked}" is no format of masks: choose among {", ".join(FORMATS)}.')
    ended = next((name for name, each in FORMATS.items() if ends_in(out, each.endings)), None)
    if asked and ended and asked != ended and not out.is_dir():
        raise SegraftError(
            f"{out} is named as {ended}, and {asked} was asked for: let it end in {FORMATS[asked].endings[-1]}."
        )
    return FORMATS[asked or ended or "nifti"]


def _write_nifti(model: Model, found: Segmentation, path: Path) -> None:  # noqa: ARG001
    write_mask(found.mask, found.scan.grid, path)


def _check_series(model: Model, scan: Scan) -> None:
    if not scan.grid_path.is_dir():
        raise SegraftError(
            f"{scan.grid_path} is no DICOM series, and a DICOM SEG refers to one: give the folder of the series, or "
            "write NIfTI."
        )
    require_writable(scan.grid_path, model.labels, Origin.of(model.source))


def _write_series(model: Model, found: Segmentation, path: Path) -> None:
    origin = Origin.of(model.source)
    write_segmentation(Found(model.labels, found.mask, found.regions), found.scan.grid_path, path, origin=origin)


FORMATS = {
    "nifti": MaskFormat(SUFFIXES, lambda *_: None, _write_nifti),
    "dicom-seg": MaskFormat((SEG_SUFFIX,), _check_series, _write_series),
}
"""What a user calls it -> the format."""
