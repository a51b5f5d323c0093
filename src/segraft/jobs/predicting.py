"""Segmenting scans."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from segraft.data.nifti import list_scans, write_mask
from segraft.data.preparation import prepare_image
from segraft.data.scans import mask_name
from segraft.errors import SegraftError
from segraft.evaluation.metrics import spacing_of, volume_ml
from segraft.jobs.model import Model, load_model
from segraft.jobs.watching import watched


@dataclass(frozen=True)
class Predicted:
    """One scan's result: the mask's file and the volume of each label in mL."""

    scan: Path
    mask: Path
    volumes_ml: dict[str, float]


def predict(
    model: Model | str | Path,
    scans: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    precision: str = "32",
    console: Console | None = None,
) -> list[Predicted]:
    """Segment scans and write their masks, each on its scan's own grid, affine and orientation.

    Args:
        model: an adapter file, a base, or a loaded model.
        scans: NIfTI files, folders of a DICOM series, or folders of these.
        out: the mask's file for one scan file; a folder (masks are named as their scans) for several or a folder.
        base: where the base is, if it is no longer where it was when the adapter was trained.
        device: `auto`, `cpu`, `cuda`, `mps`.
        precision: `32`, `bf16`, `16`.
        console: for progress; None is silent.

    Raises:
        SegraftError: a scan is not usable; two scans would have the same mask file; see also `load_model`.
    """
    out = Path(out)
    paths = list_scans([Path(scan) for scan in scans])
    masks = _mask_paths(paths, out, single=paths == [Path(scan) for scan in scans][:1])
    if not isinstance(model, Model):
        model = load_model(model, base=base)
    # All of them before any is segmented, so that a bad one leaves no part of the masks.
    for path in watched("checking scans", console)(paths):
        prepare_image(path, model.preparation)
    results = []
    for scan, mask_path in watched("segmenting", console)(list(zip(paths, masks, strict=True))):
        mask, image = model.segment(scan, device=device, precision=precision)
        write_mask(mask, image, mask_path)
        spacing = spacing_of(image.affine)
        volumes = {name: volume_ml(mask == value, spacing) for value, name in model.labels.items()}
        results.append(Predicted(scan, mask_path, volumes))
    return results


def _mask_paths(scans: Sequence[Path], out: Path, *, single: bool) -> list[Path]:
    is_file = out.name.endswith((".nii", ".nii.gz"))
    if is_file and not single:
        raise SegraftError(f"{len(scans)} scans need a folder to write to, but {out} is a file name.")
    if single and not is_file and out.suffix and not out.is_dir():
        raise SegraftError(f"{out} is no NIfTI name: let the mask end in .nii.gz, or name a folder.")
    masks = [out] if is_file else [out / mask_name(scan) for scan in scans]
    for scan, mask in zip(scans, masks, strict=True):
        if mask.resolve() == scan.resolve():
            raise SegraftError(f"the mask would replace its scan {scan}: choose another output path.")
    twice = {mask for mask in masks if masks.count(mask) > 1}
    if twice:
        raise SegraftError(
            f"several scans are named {min(twice).name}, so their masks would collide: segment them apart."
        )
    return masks
