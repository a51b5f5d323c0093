"""nnU-Net v2's raw data sets: a `dataset.json` that lists no cases, as the names of the files in its folder say them.

    Dataset004_Hippocampus/dataset.json                      channel_names, labels, numTraining, file_ending
    Dataset004_Hippocampus/imagesTr/hippocampus_001_0000.nii.gz      one file per case and channel
    Dataset004_Hippocampus/labelsTr/hippocampus_001.nii.gz

Or the cases stand under "dataset": {"hippocampus_001": {"images": […], "label": "…"}}.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segraft.data.nifti import SUFFIXES
from segraft.errors import SegraftError

IMAGES, LABELS = "imagesTr", "labelsTr"
_CHANNEL = re.compile(r"(.+)_(\d{4})")

Entry = dict[str, Any]


def raw_training(content: Any, path: Path) -> dict[str, Entry] | None:
    """The training cases that such a `dataset.json` means.

    Args:
        content: of the file, whatever it is.
        path: of the file.

    Returns:
        Identifier -> {"image": one file per channel, None where it is missing; "label": its file}, files as the list
        would name them; None where the file lists "training" itself, or is of another kind.

    Raises:
        SegraftError: files of another kind than NIfTI, or not named as nnU-Net names them; labels without images;
            another number of cases than `numTraining`.
    """
    if not isinstance(content, Mapping) or "training" in content or not {"dataset", "file_ending"} & content.keys():
        return None
    found = _listed(content["dataset"], path) if "dataset" in content else _in_folder(content, path)
    count = content.get("numTraining", len(found))
    if count != len(found):
        where = '"dataset"' if "dataset" in content else IMAGES
        raise SegraftError(
            f"{path} says numTraining: {count}, and {where} has {len(found)} cases: add those that are missing, or "
            "correct the number."
        )
    return found


def _listed(given: Any, path: Path) -> dict[str, Entry]:
    entries = given.items() if isinstance(given, Mapping) else ()
    if not entries or not all(isinstance(each, Mapping) and {"images", "label"} <= each.keys() for _, each in entries):
        raise SegraftError(f'{path} lists no cases under "dataset": give each its "images" and "label".')
    return {
        str(name): {"image": [_expanded(file) for file in _several(each["images"])], "label": _expanded(each["label"])}
        for name, each in entries
    }


def _several(files: Any) -> list[Any]:
    return files if isinstance(files, list) else [files]


def _expanded(file: Any) -> Any:
    return os.path.expandvars(file) if isinstance(file, str) else file


def _in_folder(content: Mapping[str, Any], path: Path) -> dict[str, Entry]:
    ending = content["file_ending"]
    if ending not in SUFFIXES:
        raise SegraftError(
            f"{path} is of files ending in {ending!r}, and NIfTI is read: convert them to .nii.gz, and correct "
            "file_ending."
        )
    images = path.parent / IMAGES
    if not images.is_dir():
        raise SegraftError(f"{path} lists no training cases, and there is no {images}: add it, with the scans.")
    channels = content.get("channel_names", content.get("modality"))
    count = len(channels) if isinstance(channels, Mapping) else None
    numbers: dict[str, dict[int, str]] = {}
    for file in _files(images, ending):
        match = _CHANNEL.fullmatch(file.removesuffix(ending))
        if match is None:
            raise SegraftError(
                f"{images / file} is not named with its channel, such as case_0000{ending}: rename it, or move it "
                "elsewhere."
            )
        if count is not None and int(match[2]) >= count:
            raise SegraftError(
                f"{images / file} is of channel {int(match[2])}, counted from 0, and {path} names {count}: correct "
                "either."
            )
        numbers.setdefault(match[1], {})[int(match[2])] = f"{IMAGES}/{file}"
    labels = [file.removesuffix(ending) for file in _files(path.parent / LABELS, ending)]
    if alone := [name for name in labels if name not in numbers]:
        raise SegraftError(
            f"the label {path.parent / LABELS / (alone[0] + ending)} has no scan: add "
            f"{images / f'{alone[0]}_0000{ending}'}, or take it out."
        )
    channels_there = range(count or 1 + max((max(files) for files in numbers.values()), default=0))
    return {
        name: {"image": [files.get(number) for number in channels_there], "label": f"{LABELS}/{name}{ending}"}
        for name, files in numbers.items()
    }


def _files(folder: Path, ending: str) -> list[str]:
    """Names of files, sorted, hidden ones left out."""
    if not folder.is_dir():
        return []
    return sorted(file.name for file in folder.iterdir() if file.name.endswith(ending) and file.name[0] != ".")
