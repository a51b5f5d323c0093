"""Model folders of nnU-Net v2 (`<trainer>__<plans>__<configuration>`) as bases."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from segraft.data.channels import numbered
from segraft.data.labels import Labels
from segraft.data.nnunet_preparation import preparation_of_plans
from segraft.errors import SegraftError
from segraft.exchange.opening import Opened
from segraft.networks.checkpoints import unpickled

NETWORK = "nnunet"
FINAL, BEST = "checkpoint_final.pth", "checkpoint_best.pth"

_READERS = {"SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"}
"""Readers of NIfTI."""

_USUAL = {"label_manager": "LabelManager", "preprocessor_name": "DefaultPreprocessor"}
"""Parts of nnU-Net that plans may replace by classes of their own, which are not run here."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of nnU-Net's, read without running code of its.

    Attributes:
        path: of the file.
        content: what nnU-Net saved.
    """

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read it.

        Raises:
            SegraftError: it is damaged, holds more than data, or was not written by nnU-Net v2.
        """
        content = unpickled(path)
        needed = {"network_weights", "init_args", "trainer_name"}
        if not isinstance(content, dict) or not needed <= set(content) or "configuration" not in content["init_args"]:
            raise SegraftError(
                f"{path} is no checkpoint of nnU-Net v2, as it lacks {', '.join(sorted(needed))}: give the folder that "
                "nnUNetv2_train wrote."
            )
        return cls(path, content)

    @property
    def configuration(self) -> str:
        """Such as 3d_fullres."""
        return str(self.content["init_args"]["configuration"])

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """Along which it may be mirrored."""
        return tuple(int(axis) for axis in self.content.get("inference_allowed_mirroring_axes") or ())


def open_nnunet(folder: Path, fold: str | None) -> Opened:
    """Open a model folder.

    Args:
        folder: such as `Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres`.
        fold: `0` to `4`, or `all`; None: 0, or the only one there is.

    Raises:
        SegraftError: it is no such folder, a file of it is damaged, or it needs what is not done here.
    """
    dataset, plans = (_read_json(folder, name) for name in ("dataset.json", "plans.json"))
    path, notes = _checkpoint(folder, fold)
    checkpoint = Checkpoint.read(path)
    try:
        configuration = _configuration(plans, checkpoint.configuration)
        _refuse_what_is_not_done(folder, plans, configuration)
        labels, background = labels_of(dataset)
        names = dataset.get("channel_names") or dataset["modality"]
        channels = tuple(str(names[place]) for place in sorted(names, key=int))
        architecture = configuration["architecture"]
        settings = dict(architecture["arch_kwargs"])
        classes = {name: settings.pop(name) for name in architecture["_kw_requires_import"]}
        preparation = preparation_of_plans(plans, configuration, checkpoint.mirror_axes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise SegraftError(
            f"the plans or the dataset.json of {folder} cannot be followed ({type(error).__name__}: {reason}): were "
            "they written by nnU-Net v2 itself?"
        ) from error
    unique = len(set(channels)) == len(channels) > 1
    return Opened(
        network=NETWORK,
        arguments={
            "in_channels": len(channels),
            "architecture": architecture["network_class_name"],
            "settings": settings,
            "classes": classes,
        },
        weights=path,
        labels=labels,
        background=background,
        channels=channels if unique else numbered(len(channels)) if len(channels) > 1 else ("",),
        preparation=preparation,
        notes=notes,
    )


def labels_of(dataset: Mapping[str, Any]) -> tuple[Labels, bool]:
    """The labels of a dataset.json in the order of the network's outputs, and whether the background's comes first.

    Raises:
        KeyError, TypeError, ValueError: they are not as nnU-Net has them.
    """
    values = {name: value for name, value in dataset["labels"].items() if name != "ignore"}
    if any(isinstance(value, list) and len(value) > 1 for value in values.values()):
        covers = {name: tuple(value) if isinstance(value, list) else (int(value),) for name, value in values.items()}
        regions = {name: covered for name, covered in covers.items() if set(covered) != {0}}
        painted = dict(zip(regions, dataset["regions_class_order"], strict=True))
        names = {int(painted[name]): name for name in regions}
        if len(names) != len(regions):
            raise ValueError("two regions are painted with one value")
        return Labels(names, {int(painted[name]): covered for name, covered in regions.items()}), False
    numbers = {int(value[0] if isinstance(value, list) else value): name for name, value in values.items()}
    if sorted(numbers) != list(range(len(values))):
        raise ValueError(f"label values {sorted(numbers)} are not consecutive")
    return Labels({number: numbers[number] for number in sorted(numbers) if number}), True


def _checkpoint(folder: Path, fold: str | None) -> tuple[Path, tuple[str, ...]]:
    """The checkpoint of a fold, and what the user should know of the choice."""
    there = {
        path.name.removeprefix("fold_"): path
        for path in sorted(folder.glob("fold_*"))
        if any((path / name).is_file() for name in (FINAL, BEST))
    }
    if not there:
        raise SegraftError(
            f"{folder} has no fold_0/{FINAL} (nor another fold, nor {BEST}): give the folder of one configuration, "
            "such as …/nnUNetTrainer__nnUNetPlans__3d_fullres."
        )
    chosen = fold or ("0" if "0" in there else next(iter(there)))
    if chosen not in there:
        raise SegraftError(f"{folder} has no trained fold {chosen}: choose one of {', '.join(there)} with --fold.")
    notes = []
    if len(there) > 1:
        notes.append(
            f"of the trained folds {', '.join(there)} fold {chosen} is taken (nnU-Net by itself averages folds; here "
            "one network is adapted)."
        )
    path = there[chosen] / FINAL
    if not path.is_file():
        path = there[chosen] / BEST
        notes.append(f"fold {chosen} has no {FINAL}, as its training did not end: {BEST} is taken.")
    return path, tuple(notes)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        hint = (
            f"give {folder.parent} with --fold {folder.name[5:]}"
            if folder.name.startswith("fold_")
            else ("give the folder of one configuration, such as …/nnUNetTrainer__nnUNetPlans__3d_fullres")
        )
        raise SegraftError(f"{path} does not exist: {hint}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SegraftError(f"{path} cannot be read ({error}): copy the folder again.") from error
    if not isinstance(content, dict):
        raise SegraftError(f"{path} is no JSON object: copy the folder again.")
    return content


def _configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what it inherits, plans of older versions brought up to date, by nnU-Net's own reader."""
    try:
        reader = import_module("nnunetv2.utilities.plans_handling.plans_handler")
    except ImportError as error:
        raise SegraftError(
            f"plans are read by nnU-Net itself, and a package is not there ({error.name}): pip install "
            "'segraft[nnunet]'."
        ) from error
    try:
        return dict(reader.PlansManager(dict(plans)).get_configuration(name).configuration)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _refuse_what_is_not_done(folder: Path, plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    if configuration.get("previous_stage") is not None:
        raise SegraftError(
            f"{folder} is the second stage of a cascade, whose network also takes the masks of the first: take "
            "3d_fullres or 3d_lowres."
        )
    reader = plans["image_reader_writer"]
    if reader not in _READERS:
        raise SegraftError(
            f"{folder} is for images that {reader} reads, and here only NIfTI and DICOM series are read."
        )
    for name, usual in _USUAL.items():
        found = configuration.get(name, plans.get(name, usual))
        if found != usual:
            raise SegraftError(
                f"the plans of {folder} name {found} as their {name}, a class of their own, and only nnU-Net's {usual} "
                "is followed: take a model without."
            )
