"""A folder that PEFT's `save_pretrained` wrote: read without running code of it, and without PEFT."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segraft.errors import SegraftError
from segraft.exchange.peft_format import CONFIG, CONFIG_VALUES, PICKLE, PREFIX, RECORD, WEIGHTS
from segraft.exchange.peft_settings import Record, Settings
from segraft.networks.checkpoints import read_tensors

READ = {*CONFIG_VALUES, "r", "lora_alpha", "target_modules"}
"""Settings that are followed, or that say in other words what the keys of the tensors say."""

WITHOUT_EFFECT = {
    "auto_mapping",
    "peft_version",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "ensure_weight_tying",
}
"""Settings that say nothing of what a finished adapter computes, where the others are as they must be."""

STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is."""


@dataclass(frozen=True)
class PeftFolder:
    """What a folder of PEFT holds.

    Attributes:
        path: of it.
        config: `adapter_config.json`.
        tensors: by PEFT's keys, without their prefix.
        record: `segraft.json`, where Segraft wrote the folder; else nothing is known.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    record: Record


def read_peft(path: Path) -> PeftFolder:
    """Read a folder of PEFT, without running code of it.

    Raises:
        SegraftError: there is no such folder, it lacks a file, or is of a method or with a setting that Segraft has no
            counterpart of.
    """
    _require_adapter(path)
    config = _json(path / CONFIG)
    _check(config, path / CONFIG)
    config = Settings.of(config, path / CONFIG)
    record = Record.of(_json(path / RECORD), path / RECORD) if (path / RECORD).is_file() else Record()
    file = next((path / name for name in (WEIGHTS, PICKLE) if (path / name).is_file()), None)
    if file is None:
        raise SegraftError(f"{path} holds no {WEIGHTS}: give the folder that save_pretrained wrote.")
    tensors = read_tensors(file)
    strange = [key for key in tensors if not key.startswith(PREFIX)]
    if strange or not tensors:
        raise SegraftError(
            f"{file} holds no tensors under the keys that PEFT gives them ({PREFIX}…, but "
            f"{min(strange, default='none')}): save the adapter with save_pretrained."
        )
    for key, value in tensors.items():
        if value.is_complex() or not bool(torch.isfinite(value).all()):
            raise SegraftError(f"{file} holds {key}, whose values are not all finite numbers: train the adapter again.")
    return PeftFolder(path, config, {key.removeprefix(PREFIX): value for key, value in tensors.items()}, record)


def _require_adapter(path: Path) -> None:
    """Say what is at a path, if anything, where it is no adapter of PEFT.

    Raises:
        SegraftError: nothing, a file, or a folder of something else.
    """
    what = f"a folder that PEFT's save_pretrained wrote, with {CONFIG} in it"
    if not path.exists():
        raise SegraftError(f"{path} does not exist: give {what}.")
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise SegraftError(f"{path} holds no {CONFIG}, so it is no adapter of PEFT: give {what}.")
    elif (path.parent / CONFIG).is_file():
        raise SegraftError(f"{path} is one file of an adapter of PEFT: give its folder, {path.parent}.")
    else:
        raise SegraftError(
            f"{path} is a file, and --base goes with a folder of PEFT: give {what}, or leave --base out where the file "
            "holds the weights of a whole network."
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SegraftError(f"{path} is not readable as JSON ({error}): is it complete?") from error
    if not isinstance(value, dict):
        raise SegraftError(f"{path} holds no JSON object: give the folder that save_pretrained wrote.")
    return value


def _check(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SegraftError(
            f"{path} is of an adapter of PEFT's type {kind}, and of its types only LORA (with rs-LoRA and DoRA) has a "
            "counterpart in Segraft: merge it into its base in PEFT, and import the weights."
        )
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise SegraftError(
            f"{path}: init_lora_weights {start!r} changed the weights of the base: save the adapter as plain LoRA, "
            "with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)."
        )
    for name, value in config.items():
        if name not in READ and name not in WITHOUT_EFFECT and value not in (None, False, [], {}):
            raise SegraftError(
                f"{path}: Segraft has no counterpart of {name} = {json.dumps(value)}: merge the adapter into its base "
                "in PEFT, and import the weights."
            )
