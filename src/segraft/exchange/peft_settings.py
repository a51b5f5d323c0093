"""What is read of the files beside an adapter of PEFT: settings that are followed, what Segraft says of its task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from segraft.data.scan_preparation import recorded_preparation
from segraft.errors import SegraftError

Name = Annotated[str, Field(min_length=1)]
Place = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """The settings of `adapter_config.json` that are followed; what is None there is as if it were absent."""

    model_config = ConfigDict(strict=True)

    r: PositiveInt
    lora_alpha: Positive
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, Positive] = {}
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    lora_dropout: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[Name] = []

    @classmethod
    def of(cls, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """The values of a configuration, those that are followed as they are read.

        Raises:
            SegraftError: a value that PEFT would not take.
        """
        try:
            read = cls(**{name: config[name] for name in cls.model_fields if config.get(name) is not None})
        except ValidationError as error:
            raise _told(error, path) from error
        return {**config, **read.model_dump()}


class RecordedInputs(BaseModel):
    """Which channels of the base those of the images take, None where one is new, and how new ones start."""

    channels: Annotated[list[Place | None], Field(min_length=1)]
    start: Name


class RecordedBase(BaseModel):
    """What an adapter says of its base: as in adapter files, without the path."""

    network: Name
    arguments: dict[str, Any]
    fingerprint: Name
    outputs: Annotated[list[Place | None], Field(min_length=1)] | None = None
    background: Place | None = None
    inputs: RecordedInputs | None = None

    @field_validator("arguments")
    @classmethod
    def _with_channels(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in ("in_channels", "out_channels"):
            if type(arguments.get(name, 1)) is not int or arguments.get(name, 1) < 1:
                raise ValueError(f"{name} must be a number above zero")
        return arguments

    def described(self) -> dict[str, Any]:
        """For an adapter's record."""
        return {name: value for name, value in self.model_dump(mode="json").items() if value is not None}


class Record(BaseModel):
    """`segraft.json`; what it holds besides is not taken over."""

    base: RecordedBase | None = None
    labels: dict[PositiveInt, Name] | None = Field(default=None, min_length=1)
    regions: dict[PositiveInt, Annotated[list[PositiveInt], Field(min_length=1)]] | None = None
    channels: list[str] | None = Field(default=None, min_length=1)
    preparation: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _of_the_labels(self) -> "Record":
        if self.labels and len(set(self.labels.values())) < len(self.labels):
            raise ValueError("two labels have one name")
        if self.regions and set(self.regions) != set(self.labels or {}):
            raise ValueError("regions are not of the labels")
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any], path: Path) -> "Record":
        """What a file says.

        Raises:
            SegraftError: a value that does not fit, or a preparation that this version does not know.
        """
        try:
            read = cls(**{name: value for name, value in values.items() if name in cls.model_fields})
        except ValidationError as error:
            raise _told(error, path) from error
        if read.preparation is not None:
            read.preparation = recorded_preparation(read.preparation, path).model_dump(mode="json")
        return read

    def task(self) -> dict[str, Any]:
        """The part of an adapter's record that says what it segments, as far as it is known."""
        values = self.model_dump(mode="json", exclude={"base"})
        return {name: value for name, value in values.items() if value is not None}


def _told(error: ValidationError, path: Path) -> SegraftError:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(" or instance of ")[0]
    if not name:
        return SegraftError(f"{path}: {reason}: is it as it was written?")
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    what = "is missing" if first["type"] == "missing" else f"is {shown}, and {reason}"
    return SegraftError(f"{path}: {name} {what}: is it as it was written?")
