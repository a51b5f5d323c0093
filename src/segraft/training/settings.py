"""How a training runs: values that a user sets, checked in one place."""

from collections.abc import Collection, Mapping
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from segraft.data.augmentation import AUGMENTATIONS
from segraft.errors import SegraftError
from segraft.training.losses import LOSSES

Precision = Literal["32", "bf16", "16"]

TABLES: dict[str, Collection[str]] = {"loss": LOSSES, "augmentation": AUGMENTATIONS}
"""Settings that are a key of a table."""


class TrainingSettings(BaseModel):
    """Settings of one training.

    Attributes:
        epochs: passes over the cases.
        learning_rate: the highest one.
        schedule: `cosine` falls to zero over all epochs; `onecycle` rises to the learning rate and falls again;
            `constant`.
        weight_decay: of AdamW.
        loss: a key of `LOSSES`.
        contrast_copies: N of equation 2 of the haemorrhage paper: copies of each patch at other contrasts, whose
            weighted losses are added (`segraft.training.contrast`); each costs as much as the patch. 0: the loss alone.
        volumes: scans per step; each gives `patches` patches.
        patches: patches per scan and step.
        patches_at_once: that go through the network together; gradients of a step's groups add up, each weighted by
            its share of the patches, so that memory is that of a group. A loss over the batch (Dice) is then of each
            group by itself. None: all of a step.
        foreground: share of the patches that are centred on a label.
        flip: mirror left and right at random; not for labels with a side.
        augmentation: a key of `AUGMENTATIONS`: `standard` (flips, small rotations, zooms, contrast), `elastic` (flips,
            elastic deformation, contrast), `none`.
        stop_when_converged: the validation-free stop of ARENA: when the training loss improved by no more than 1 % of
            its value over 20 epochs.
        seed: of the case order, patches, augmentation and initial factors.
        device: `auto`, `cpu`, `cuda`, `mps`.
        precision: `32`, or mixed `bf16` or `16`; weights are composed in float32 always.
        recompute: parts of the network, or regular expressions for module names, that recompute their activations in
            the backward pass: less memory for more time, with the same results (`segraft.training.recomputation`).
        devices: processes that train together on each machine, one per GPU (or sharing the CPU's cores).
        nodes: machines that train together. These two say who computes, not what, so they are no part of a record:
            `volumes` is what all processes take together, and the results agree to rounding
            (`segraft.training.distributed`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(default=100, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    loss: str = "dice_ce"
    contrast_copies: int = Field(default=0, ge=0)
    volumes: int = Field(default=2, ge=1)
    patches: int = Field(default=2, ge=1)
    patches_at_once: int | None = Field(default=None, ge=1)
    foreground: float = Field(default=0.5, ge=0, le=1)
    augmentation: str = "standard"
    flip: bool = True
    stop_when_converged: bool = False
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Precision = "32"
    recompute: tuple[str, ...] = ()
    devices: int = Field(default=1, ge=1, exclude=True)
    nodes: int = Field(default=1, ge=1, exclude=True)

    @model_serializer(mode="wrap")
    def _without_groups(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Records leave `patches_at_once` out where it is not set, so that what was recorded before stays the same."""
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if (name, value) != ("patches_at_once", None)}

    @model_validator(mode="after")
    def _in_groups(self) -> Self:
        if self.patches_at_once is not None and self.devices * self.nodes > 1:
            raise ValueError("patches_at_once is for one process: several share the patches of a step already")
        return self

    @field_validator(*TABLES)
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        table = TABLES[str(info.field_name)]
        if value not in table:
            raise ValueError(f"unknown {info.field_name} {value!r}: choose one of {', '.join(table)}")
        return value


Settings = TypeVar("Settings", bound=TrainingSettings)


def checked_as(kind: type[Settings], values: Mapping[str, object]) -> Settings:
    """Settings of a kind with these values.

    Raises:
        SegraftError: one sentence on the first value that does not fit, or on values that do not fit together.
    """
    try:
        return kind(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        what = f"training setting {name} = {first['input']!r}" if name else "training settings"
        raise SegraftError(f"{what}: {first['msg'].removeprefix('Value error, ')}.") from error


def check_settings(**values: object) -> TrainingSettings:
    """`TrainingSettings` of these values.

    Raises:
        SegraftError: as `checked_as`.
    """
    return checked_as(TrainingSettings, values)
