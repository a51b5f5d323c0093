"""Data sets of nnU-Net v2, whose dataset.json lists no cases: they are what lies in imagesTr and labelsTr."""

from pathlib import Path
from typing import Any

from segraft.data.nifti import SUFFIXES
from segraft.errors import SegraftError

IGNORED = "ignore"


def with_cases(folder: Path, content: Any) -> Any:
    """A dataset.json with the cases of its folder as "training", where it is nnU-Net v2's and lists none.

    They are those under its "dataset" (`{"case": {"images": […], "label": …}}`), else `imagesTr/case_0000.nii.gz` (and
    `_0001` … where it has several channels) with `labelsTr/case.nii.gz`.

    Raises:
        SegraftError: files that are not NIfTI, no images, or a label of voxels that do not count.
    """
    if not isinstance(content, dict) or "training" in content or "file_ending" not in content:
        return content
    where, ending, labels = folder / "dataset.json", content["file_ending"], content.get("labels")
    if ending not in SUFFIXES:
        raise SegraftError(f"{where} is for {ending} files, and only NIfTI is read here: convert them to .nii.gz.")
    if isinstance(labels, dict) and IGNORED in labels:
        raise SegraftError(
            f'{where} has the label "{IGNORED}" for voxels that do not count, which training here does not know: '
            "annotate them, or leave out the label and the cases with it."
        )
    if isinstance(content.get("dataset"), dict):
        entries = [
            {"image": _one(case.get("images", [])), "label": case.get("label")}
            for case in content["dataset"].values()
            if isinstance(case, dict)
        ]
    else:
        names = sorted(path.name.removesuffix(f"_0000{ending}") for path in folder.glob(f"imagesTr/*_0000{ending}"))
        channels = range(len(content.get("channel_names") or content.get("modality") or "0"))
        entries = [
            {
                "image": _one([f"imagesTr/{name}_{place:04}{ending}" for place in channels]),
                "label": f"labelsTr/{name}{ending}" if (folder / f"labelsTr/{name}{ending}").is_file() else None,
            }
            for name in names
        ]
    if not entries:
        raise SegraftError(f"{where} lists no cases, and there is no {folder / 'imagesTr'}/*_0000{ending}: add scans.")
    return {**content, "training": entries}


def _one(files: Any) -> Any:
    """The only file of a list."""
    return files[0] if isinstance(files, list) and len(files) == 1 else files
