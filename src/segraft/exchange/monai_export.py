"""A finished adapter as a MONAI bundle, merged into its base, which MONAI alone prepares scans for and runs."""

import json
from collections.abc import Mapping, Sequence
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segraft._version import __version__
from segraft.data.labels import Labels
from segraft.data.preparation import Preparation
from segraft.errors import SegraftError
from segraft.exchange.bundle_entries import (
    HEAD_ENTRY,
    INNER_ENTRY,
    MASK,
    PROBABILITIES,
    REGIONS,
    SCORES,
    SEQUENCE,
    VALUES,
)
from segraft.exchange.bundle_page import LICENCE, readme
from segraft.exchange.bundle_preparation import INVERTIBLE, write_transforms
from segraft.exchange.formats import Finished
from segraft.networks.bases import CHANNELS
from segraft.networks.outputs import HEAD, INNER, OutputsOnTop
from segraft.networks.outputs import PATH as ON_TOP
from segraft.networks.registry import constructor

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
"""Of `metadata.json`: that of MONAI's own model zoo."""


def write_bundle(finished: Finished, folder: Path) -> tuple[str, ...]:
    """Write `configs`, `models/model.pt`, `docs` and `LICENSE` into an empty folder.

    Raises:
        SegraftError: MONAI has no transforms for the preparation, or the adapter cannot be merged.
    """
    channels, preparation = len(finished.channels), finished.preparation
    if not isinstance(preparation, Preparation):
        raise SegraftError(
            f"{finished.source} cannot become a MONAI bundle, as its scans are prepared by another tool, for "
            "which MONAI has no transforms: give it back to that tool (--format nnunet)."
        )
    try:
        transforms = write_transforms(preparation, channels)
    except SegraftError as error:
        raise SegraftError(f"{finished.source} cannot become a MONAI bundle: {error}") from error
    net = finished.merged()
    notes = []
    if getattr(net, "takes_missing_channels", False) and channels > 1:
        notes.append("scans must have all channels in a bundle: MONAI does not read scans without one.")
    if preparation.channel_grids == "resample" and channels > 1:
        notes.append("channels of a scan must lie on one grid in a bundle: MONAI does not bring them to the first's.")
    network = _network(net, finished)
    targets = [_target(part) for part in network.values()]
    needed = _needed(targets)
    inference = _inference(network, transforms, preparation, finished.labels, channels)
    described = _metadata(finished, preparation, needed | _einops(targets))
    for name, content in (("inference", inference), ("metadata", described)):
        _write(folder / "configs" / f"{name}.json", json.dumps(content, indent=4, ensure_ascii=False) + "\n")
    weights = folder / "models" / "model.pt"
    weights.parent.mkdir()
    torch.save(_state(net), weights)
    _write(folder / "docs" / "README.md", readme(finished, needs=needed, transforms=transforms))
    _write(folder / "LICENSE", LICENCE)
    notes += [
        f"{type(net).__name__} is a network of {name}, so whoever runs the bundle needs {name}." for name in needed
    ]
    return tuple(notes)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _state(net: nn.Module) -> dict[str, Tensor]:
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}
    if not isinstance(net, OutputsOnTop):
        return tensors
    place = {INNER: "0", HEAD: "1"}  # of the sequence that `_network` describes
    return {f"{place[first]}.{rest}": value for (first, _, rest), value in _parted(tensors)}


def _parted(tensors: Mapping[str, Tensor]) -> list[tuple[tuple[str, str, str], Tensor]]:
    return [(key.partition("."), value) for key, value in tensors.items()]


def _network(net: nn.Module, finished: Finished) -> dict[str, Any]:
    """Entries of a configuration that describe the network."""
    arguments = dict(finished.arguments)
    if finished.network != ON_TOP or not isinstance(net, OutputsOnTop):
        return {"network_def": _described(finished.network, arguments)}
    outputs = arguments["outputs"]
    channels = {"in_channels": arguments["in_channels"], "out_channels": outputs}
    inner = _described(arguments["network"], {**channels, **(arguments.get("arguments") or {})})
    head = {
        "_target_": f"torch.nn.{type(net.head).__name__}",
        "in_channels": outputs,
        "out_channels": arguments["out_channels"],
        "kernel_size": 1,
    }
    return {INNER_ENTRY: inner, HEAD_ENTRY: head, "network_def": SEQUENCE}


def _described(network: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A network by its class and arguments, as `build` makes it."""
    rest = {name: value for name, value in arguments.items() if name not in CHANNELS}
    channels = {name: arguments[name] for name in CHANNELS}
    factory, given = constructor(network, **channels, arguments=rest)
    return {"_target_": f"{factory.__module__}.{factory.__qualname__}", **given}


def _target(described: Any) -> str:
    return str(described.get("_target_", "")) if isinstance(described, Mapping) else ""


_INVERT = {
    "_target_": "Invertd",
    "keys": "pred",
    "transform": "@preprocessing",
    "orig_keys": "image",
    "nearest_interp": False,
    "to_tensor": True,
}


def _inference(
    network: Mapping[str, Any],
    transforms: list[dict[str, Any]],
    preparation: Preparation,
    labels: Labels,
    channels: int,
) -> dict[str, Any]:
    flat, logits = preparation.patch[2] == 1, preparation.average == "logit"
    return {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": _scans(channels),
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        **network,
        "network": "$@network_def.to(@device).eval()",
        "preprocessing": {"_target_": "Compose", "transforms": transforms},
        "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {
            "_target_": "SliceInferer" if flat else "SlidingWindowInferer",
            "roi_size": list(preparation.patch[:2] if flat else preparation.patch),
            **({"spatial_dim": 2} if flat else {}),
            "sw_batch_size": 4,
            "overlap": preparation.overlap,
            "mode": preparation.weights,
        },
        SCORES: "@network" if logits else PROBABILITIES,
        VALUES: list(labels),
        **({REGIONS: {str(value): list(covers) for value, covers in labels.regions.items()}} if labels.regions else {}),
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                *([{"_target_": "Activationsd", "keys": "pred", "sigmoid": True}] if logits else []),
                *([_INVERT] if any(step["_target_"] in INVERTIBLE for step in transforms) else []),
                {"_target_": "Lambdad", "keys": "pred", "func": mask_expression(labels)},
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "mask",
                    "output_ext": ".nii.gz",
                    "output_dtype": f"${'np.uint16' if max(labels) > np.iinfo(np.uint8).max else 'np.uint8'}",
                    "resample": False,
                    "separate_folder": False,
                },
            ],
        },
        # for tools that ask for it; needs pytorch-ignite
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@scores",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "amp": False,
        },
        "segment": (
            "$torch.no_grad()(lambda item: @postprocessing({**item, "
            "'pred': @inferer(item['image'][None].to(@device), @scores)[0]}))"
        ),
        "initialize": (
            "$@network.load_state_dict(torch.load(@bundle_root + '/models/model.pt', map_location=@device, "
            "weights_only=True))"
        ),
        "run": ["$[bool(@segment(item)) for item in @dataset]"],
    }


def _scans(channels: int) -> str:
    if channels == 1:
        return "$sorted(glob.glob(glob.escape(@dataset_dir) + '/*.nii*'))"
    # a file per channel, else files with the channel last
    return (
        f"$[[first.replace('_0000.nii', '_%04d.nii' % place) for place in range({channels})] "
        "for first in sorted(glob.glob(glob.escape(@dataset_dir) + '/*_0000.nii*'))] "
        "or sorted(glob.glob(glob.escape(@dataset_dir) + '/*.nii*'))"
    )


def mask_expression(labels: Labels) -> str:
    """From probabilities [L, X, Y, Z] to a label map [1, X, Y, Z], as `segraft predict` does it."""
    if not labels.regions:
        return MASK
    place = {value: at for at, value in enumerate(labels)}
    painted = "0"
    for value in labels.regions:  # what is painted last lies above
        painted = f"torch.where(p[[{place[value]}]] >= 0.5, {value}, {painted})"
    return f"$lambda p: {painted}"


def _needed(targets: Sequence[str]) -> dict[str, str]:
    """Packages beside MONAI and torch that these classes are of, and their versions where they are installed so."""
    tops = dict.fromkeys(target.partition(".")[0] for target in targets if target)
    by_module = packages.packages_distributions()
    names = [by_module.get(top, [top])[0] for top in tops if top not in ("monai", "torch")]
    return {name: _version(name) for name in names}


def _version(package: str) -> str:
    try:
        return __version__ if package == "segraft" else packages.version(package)
    except packages.PackageNotFoundError:  # a module of its maker's own
        return "not stated"


def _einops(targets: Sequence[str]) -> dict[str, str]:
    """What networks of MONAI with transformers need beside it."""
    return {"einops": packages.version("einops")} if any("unetr" in target.casefold() for target in targets) else {}


def _metadata(finished: Finished, preparation: Preparation, needed: Mapping[str, str]) -> dict[str, Any]:
    patch = list(preparation.patch)
    shape = patch[:2] if patch[2] == 1 else patch
    names = list(finished.labels.values())
    scaled = all(each.kind != "z_score" for each in preparation.intensities(len(finished.channels)))
    tensor = {"type": "image", "spatial_shape": shape, "dtype": "float32", "is_patch_data": True}
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"written by segraft {__version__}"},
        "monai_version": packages.version("monai"),
        "pytorch_version": packages.version("torch").partition("+")[0],
        "numpy_version": packages.version("numpy"),
        "required_packages_version": {"nibabel": packages.version("nibabel"), **needed},
        "name": f"Segmentation of {', '.join(names)}",
        "task": f"Segmentation of {', '.join(names)}",
        "description": f"A network adapted by Segraft ({finished.header.spec.method}), merged into its base.",
        "authors": "not stated",
        "copyright": "not stated",
        "intended_use": "Research; not a medical device.",
        "network_data_format": {
            "inputs": {
                "image": {
                    **tensor,
                    "format": "magnitude",
                    "modality": "n/a",
                    "num_channels": len(finished.channels),
                    "value_range": [0, 1] if scaled else [],
                    "channel_def": {str(at): name or "image" for at, name in enumerate(finished.channels)},
                }
            },
            "outputs": {
                "pred": {
                    **tensor,
                    "format": "classes" if finished.labels.regions else "segmentation",
                    "num_channels": len(names),
                    "value_range": [],
                    "channel_def": {str(at): name for at, name in enumerate(names)},
                }
            },
        },
    }
