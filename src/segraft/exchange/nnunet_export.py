"""A finished adapter as a model folder of nnU-Net v2, merged, which nnUNetv2_predict runs."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segraft.data.labels import Labels
from segraft.data.nnunet_preparation import NNUNetPreparation
from segraft.errors import SegraftError
from segraft.exchange.formats import Finished
from segraft.exchange.nnunet import FINAL, NETWORK, Checkpoint
from segraft.networks.heads import BACKGROUND, Outputs, require_head
from segraft.networks.inputs import Inputs

USUAL_OVERLAP = 0.5


def export_nnunet(finished: Finished, folder: Path) -> tuple[str, ...]:
    """Write dataset.json, plans.json and fold_0/checkpoint_final.pth.

    Labels that exclude each other become a softmax: its output for the background is 0 everywhere, so that the others
    are at least as large just where they are labels here. Regions stay sigmoids.

    Raises:
        SegraftError: the base is no network of nnU-Net's, or the adapter cannot be merged.
    """
    preparation = finished.preparation
    if finished.network != NETWORK or not isinstance(preparation, NNUNetPreparation):
        raise SegraftError(
            f"{finished.source} adapts {finished.network}, which nnU-Net cannot build: only adapters of a base "
            "nnunet:FOLDER go back to it."
        )
    base = Checkpoint.read(finished.base)
    order = _order(finished.labels)
    plans, dataset = _descriptions(finished, base, preparation)
    content = {
        "network_weights": _weights(finished, base, order),
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": 0,
        "init_args": {
            "plans": plans,
            "configuration": base.configuration,
            "fold": 0,
            "dataset_json": dataset,
        },
        "trainer_name": base.content["trainer_name"],
        "inference_allowed_mirroring_axes": preparation.mirror_axes or None,
    }
    (folder / "fold_0").mkdir(parents=True)
    for name, values in (("plans.json", plans), ("dataset.json", dataset)):
        (folder / name).write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")
    torch.save(content, folder / "fold_0" / FINAL)
    return _notes(finished, preparation, order)


def _order(labels: Labels) -> list[int]:
    """Values of the outputs in nnU-Net's order: as regions are painted, or as label values count."""
    return list(labels.regions) if labels.regions else sorted(labels)


def _notes(finished: Finished, preparation: NNUNetPreparation, order: Sequence[int]) -> tuple[str, ...]:
    notes, names = [], finished.labels
    if not names.regions and order != list(range(1, len(order) + 1)):
        told = ", ".join(f"{names[value]} {place} (here {value})" for place, value in enumerate(order, start=1))
        notes.append(f"nnU-Net numbers labels from 1 without gaps; in its masks they are: {told}.")
    if preparation.overlap != USUAL_OVERLAP:
        notes.append(
            f"patches overlap by {preparation.overlap:g} here: give nnUNetv2_predict -step_size "
            f"{1 - preparation.overlap:g}."
        )
    return tuple(notes)


def _descriptions(
    finished: Finished, base: Checkpoint, preparation: NNUNetPreparation
) -> tuple[dict[str, Any], dict[str, Any]]:
    """plans.json and dataset.json: the base's, with the patch, the labels and the number of cases of the adapter."""
    arguments, labels = base.content["init_args"], finished.labels
    plans, dataset = deepcopy(dict(arguments["plans"])), deepcopy(dict(arguments["dataset_json"]))
    flat = len(preparation.spacing) == 2
    plans["configurations"][base.configuration]["patch_size"] = list(preparation.patch[: 2 if flat else 3])
    if Inputs.of(finished.header.record["base"]) is not None:  # other channels than those of its plans
        each = preparation.normalization
        plans["configurations"][base.configuration] |= {
            "normalization_schemes": [channel.scheme for channel in each],
            "use_mask_for_norm": [channel.masked for channel in each],
        }
        statistics = {str(place): channel.statistics for place, channel in enumerate(each)}
        plans["foreground_intensity_properties_per_channel"] = statistics
        dataset["channel_names"] = {str(place): name for place, name in enumerate(finished.channels)}
    order = _order(labels)
    dataset.pop("regions_class_order", None)
    if labels.regions:
        covers = {labels[value]: list(labels.covers(value)) for value in order}
        if all(len(values) == 1 for values in covers.values()):  # a list of one, nnU-Net takes for a label
            covers = {name: values * 2 for name, values in covers.items()}
        dataset["labels"] = {BACKGROUND: 0, **covers}
        dataset["regions_class_order"] = order
    else:
        dataset["labels"] = {BACKGROUND: 0, **{labels[value]: place for place, value in enumerate(order, start=1)}}
    dataset["numTraining"] = len(finished.header.record.get("cases", ()))
    return plans, dataset


def _weights(finished: Finished, base: Checkpoint, order: Sequence[int]) -> dict[str, Tensor]:
    """All tensors under nnU-Net's names, those of deep supervision's heads as near the base's as the labels allow."""
    net = finished.merged()
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}
    places = [list(finished.labels).index(value) for value in order]
    head = require_head(net, len(places))
    for key in head.keys:
        tensors[key] = _stacked([tensors[key][place] for place in places], tensors[key], finished.labels)
    known = Outputs.of(finished.header.record["base"])
    rows = known.rows if known else tuple(range(len(places)))
    prefix, _, last = head.layer.rpartition(".")
    for key, value in _plain(base.content["network_weights"]).items():
        if key in tensors or not key.startswith(f"{prefix}."):
            continue
        place, _, tensor = key.removeprefix(f"{prefix}.").partition(".")
        if int(place) >= int(last) or f"{head.layer}.{tensor}" not in head.keys:
            continue
        theirs = [None if rows[each] is None else value[rows[each]] for each in places]
        mine = [torch.zeros_like(value[0]) if row is None else row for row in theirs]
        ground = None if known is None or known.background is None else value[known.background]
        tensors[key] = _stacked(mine, value, finished.labels, ground)
    return tensors


def _stacked(rows: Sequence[Tensor], like: Tensor, labels: Labels, background: Tensor | None = None) -> Tensor:
    """Rows of a head, behind the background's, where there is a softmax."""
    if labels.regions:
        return torch.stack(list(rows)).to(like)
    return torch.stack([torch.zeros_like(like[0]) if background is None else background, *rows]).to(like)


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers put before every key."""
    return {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in weights.items()}
