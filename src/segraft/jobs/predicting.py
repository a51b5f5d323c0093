"""Segmenting scans."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from segraft.data.channel_files import grouped, scan_name
from segraft.data.channels import plain
from segraft.data.listed import stem
from segraft.data.nifti import SUFFIXES, ends_in, list_scans
from segraft.data.preparation import prepare_scan
from segraft.data.scans import mask_name
from segraft.errors import SegraftError
from segraft.evaluation.metrics import spacing_of, volume_ml
from segraft.jobs.mask_formats import MaskFormat, format_of
from segraft.jobs.model import Model, load_model
from segraft.jobs.watching import watched


@dataclass(frozen=True)
class Predicted:
    """One scan's result: its (first) file, the mask's file and the volume of each label in mL."""

    scan: Path
    mask: Path
    volumes_ml: dict[str, float]


def predict(
    model: Model | str | Path,
    scans: Sequence[str | Path],
    out: str | Path,
    *,
    mask_format: str | None = None,
    channels: Mapping[str, str | Path] | None = None,
    base: str | Path | None = None,
    fold: str | None = None,
    device: str = "auto",
    precision: str = "32",
    console: Console | None = None,
) -> list[Predicted]:
    """Segment scans and write their masks, each on the grid, affine and orientation of its scan's first channel.

    A mask is NIfTI, or, of a DICOM series, a DICOM SEG that refers to it (of several channels, to the first).

    Where the network takes several channels, a scan is one file whose last axis is the channel, or numbered files
    (`case_0000.nii.gz`, `case_0001.nii.gz`, …) of one folder, of which the first is enough, or `channels`.

    Args:
        model: an adapter file, a base, a network of another tool (`nnunet:path`), or a loaded model.
        scans: NIfTI files, folders of a DICOM series, or folders of these.
        out: the mask's file for one scan file; a folder (masks are named as their scans) for several or a folder.
        mask_format: `nifti` or `dicom-seg` (`mask_formats.FORMATS`); None: as `out` ends, for a folder NIfTI.
        channels: of one scan, in place of `scans`: the channel's name -> its file or folder of a DICOM series.
        base: where the base is, if it is no longer where it was when the adapter was trained.
        fold: of a network of another tool that has several.
        device: `auto`, `cpu`, `cuda`, `mps`.
        precision: `32`, `bf16`, `16`.
        console: for progress; None is silent.

    Raises:
        SegraftError: a scan is not usable, is no DICOM series where a DICOM SEG is to be written, or lacks a channel
            that the network needs; two scans would have the same mask file, or a mask would lie in a folder of scans
            that is given; see also `load_model`.
    """
    if bool(scans) == bool(channels):
        raise SegraftError("there is nothing to segment, or too much: give scans, or the channels of one scan.")
    given = [Path(scan) for scan in scans]
    paths = list_scans(given)
    if not isinstance(model, Model):
        model = load_model(model, base=base, fold=fold)
    files = [_named(model, channels)] if channels else _files(model, paths)
    kind = format_of(Path(out), mask_format)
    several = model.channels if len(model.channels) > 1 else ()
    masks = _mask_paths(files, several, Path(out), kind, single=len(files) == 1 and paths == given)
    _check_outside([path for path in given if path.is_dir() and path not in paths], masks)
    names = [scan_name([None if file is None else str(file) for file in each], several) for each in files]
    cases = [model.case(name, each) for name, each in zip(names, files, strict=True)]
    # All of them before any is segmented, so that a bad one leaves no part of the masks.
    for case in watched("checking scans", console)(cases):
        scan = model.read(case)
        kind.check(model, scan)
        prepare_scan(scan, model.preparation)
    results = []
    for case, mask_path in watched("segmenting", console)(list(zip(cases, masks, strict=True))):
        found = model.segment(case, device=device, precision=precision)
        kind.write(model, found, mask_path)
        spacing = spacing_of(found.scan.grid.affine)
        volumes = {name: volume_ml(found.plane(value), spacing) for value, name in model.labels.items()}
        results.append(Predicted(case.image, mask_path, volumes))
    return results


def _files(model: Model, paths: Sequence[Path]) -> list[tuple[Path | None, ...]]:
    """The files of each scan."""
    if len(model.channels) == 1:
        return [(path,) for path in paths]
    return grouped(paths, len(model.channels))


def _named(model: Model, channels: Mapping[str, str | Path]) -> tuple[Path | None, ...]:
    """The files of one scan, whose channels are named, in the order of the network's."""
    if len(model.channels) == 1:
        raise SegraftError(f"{model.source} takes scans of one channel: give the file as a scan, without its channel.")
    named = {plain(name): Path(path) for name, path in channels.items()}
    known = [plain(name) for name in model.channels]
    unknown = [name for name in channels if plain(name) not in known]
    if unknown or len(named) < len(channels):
        raise SegraftError(
            f"{model.source} takes each of the channels {', '.join(model.channels)} once, and {', '.join(channels)} "
            "were given: name its channels."
        )
    for path in named.values():
        if not path.exists():
            raise SegraftError(f"{path} does not exist: give the file of that channel.")
    return tuple(named.get(name) for name in known)


def _mask_paths(
    files: Sequence[tuple[Path | None, ...]], channels: Sequence[str], out: Path, kind: MaskFormat, *, single: bool
) -> list[Path]:
    is_file = ends_in(out, kind.endings)
    if is_file and not single:
        raise SegraftError(f"{len(files)} scans need a folder to write to, but {out} is a file name.")
    if single and not is_file and out.suffix and not out.is_dir():
        raise SegraftError(f"{out} names no mask: let it end in {kind.endings[-1]}, or name a folder.")
    masks = [out] if is_file else [out / _mask_name(each, channels, kind) for each in files]
    for each, mask in zip(files, masks, strict=True):
        for scan in filter(None, each):
            if mask.resolve() == scan.resolve():
                raise SegraftError(f"the mask would replace its scan {scan}: choose another output path.")
            if scan.is_dir() and mask.resolve().parent == scan.resolve():
                raise SegraftError(
                    f"the mask would lie among the files of its series {scan}, which could not be read again: choose "
                    "another output path."
                )
    twice = {mask for mask in masks if masks.count(mask) > 1}
    if twice:
        raise SegraftError(
            f"several scans are named {min(twice).name}, so their masks would collide: segment them apart."
        )
    return masks


def _check_outside(folders: Sequence[Path], masks: Sequence[Path]) -> None:
    """Refuse masks beside scans, and SEGs anywhere in a folder of them: the next run would take them for scans."""
    for folder in folders:
        for mask in masks:
            within = mask.resolve().is_relative_to(folder.resolve())
            if within and (mask.resolve().parent == folder.resolve() or not ends_in(mask, SUFFIXES)):
                raise SegraftError(
                    f"the mask {mask} would lie in the folder {folder}, whose scans are to be segmented, and spoil the "
                    "next run on it: choose another output path."
                )


def _mask_name(files: tuple[Path | None, ...], channels: Sequence[str], kind: MaskFormat) -> str:
    """As the scan is called."""
    there = [file for file in files if file is not None]
    if len(files) == 1:
        name = mask_name(there[0])
    else:
        name = f"{scan_name([None if file is None else file.as_posix() for file in files], channels)}.nii.gz"
    return name if ends_in(Path(name), kind.endings) else f"{stem(name)}{kind.endings[-1]}"
