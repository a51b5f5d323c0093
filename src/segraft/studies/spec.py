"""A study as data: what a YAML file says, checked as a whole before anything runs."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from segraft.adapters import AdapterSpec
from segraft.errors import SegraftError
from segraft.training.mae import check_masked_settings
from segraft.training.settings import TrainingSettings, check_settings
from segraft.training.strategies import STRATEGIES, selectors

FOLDS = 3
"""Of a study that says neither folds nor shots."""

BEST_STRATEGY = "best strategy"
"""As a reference of the statistics: of the arms without an adapter, the one with the highest mean Dice."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Encoder(_Part):
    """The masked auto-encoder whose encoder a base starts with.

    Attributes:
        network: a key of `segraft.networks.NETWORKS` that is a `MaskedAutoencoder`.
        arguments: of it, without its `img_size`, which is the patch of the study's preparation.
    """

    network: str = "vit_base"
    arguments: dict[str, Any] = {}


Start = Literal["labels", "masked", "weights", "random"]
"""How a base comes by its weights: it learns labels, is given an encoder that was a masked auto-encoder's, or weights
from elsewhere, or is not pre-trained."""


class Base(_Part):
    """A network, and how it is pre-trained, or where its weights are.

    Attributes:
        network: a key of `segraft.networks.NETWORKS`, or `package.module:Class`.
        arguments: of the network.
        encoder: its encoder is pre-trained on single channels of scans, without labels; the rest starts at random.
        weights: a file of weights from elsewhere, relative to the study's file: then nothing is pre-trained.
        random: it starts at random as a whole, and nothing is pre-trained.
        labels: names of the outputs of such weights, in order; none where the file is known to name its own.
        patients: of the pre-training cohort to draw; None means all that are not in the study itself.
        training: settings of the pre-training (`TrainingSettings`, of an encoder `MaskedSettings`).
    """

    network: str
    arguments: dict[str, Any] = {}
    encoder: Encoder | None = None
    weights: Path | None = None
    random: bool = False
    labels: tuple[str, ...] = ()
    patients: int | None = Field(default=None, ge=1)
    training: dict[str, Any] = {}

    @model_validator(mode="after")
    def _either(self) -> Self:
        starts = self._starts()
        if len(starts) > 1:
            raise ValueError(
                f"it has {' and '.join(starts.values())}, and can begin with one of them alone: take one out"
            )
        if self.start in ("weights", "random") and (self.training or self.patients):
            raise ValueError(
                f"it has {starts[self.start]}, so nothing is pre-trained: leave its training and patients out"
            )
        if self.start in ("masked", "random") and self.labels:
            raise ValueError("labels are the names of the outputs of its weights, and it has none: leave them out")
        return self

    def _starts(self) -> dict[Start, str]:
        """What it is said to begin with, in words."""
        asked: tuple[tuple[Start, str, bool], ...] = (
            ("weights", "weights", self.weights is not None),
            ("masked", "an encoder to pre-train", self.encoder is not None),
            ("random", "a random start", self.random),
        )
        return {start: words for start, words, there in asked if there}

    @property
    def start(self) -> Start:
        """How it comes by its weights."""
        return next(iter(self._starts()), "labels")

    def settings(self) -> TrainingSettings:
        """Of its pre-training.

        Raises:
            SegraftError: as `settings_of`.
        """
        return settings_of(self.training, check_masked_settings if self.start == "masked" else check_settings)


class Phantoms(_Part):
    """Synthetic brains (`segraft.data.phantom_contrasts`) to run a study on where no cohort is given.

    Attributes:
        patients: with labels.
        unlabelled: further ones, each scanned in one contrast, to pre-train an encoder on.
        seed: of all of them.
    """

    patients: int = Field(ge=2)
    unlabelled: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)


class Arms(_Part):
    """Adaptations of one base: every method at every rank, with every strategy.

    Attributes:
        base: a key of the study's bases.
        methods: presets of `AdapterSpec`; `none` adds no factors.
        ranks: of the methods.
        strategies: what is trained whole beside the factors (`STRATEGIES`), such as `none`, or several as one:
            `bitfit_encoder + decoder`.
        adapter: further fields of `AdapterSpec`, such as `targets` or `bias`.
        training: settings that differ from the study's.
    """

    base: str
    methods: tuple[str, ...] = Field(default=("none",), min_length=1)
    ranks: tuple[int, ...] = Field(default=(8,), min_length=1)
    strategies: tuple[str, ...] = Field(default=("none",), min_length=1)
    adapter: dict[str, Any] = {}
    training: dict[str, Any] = {}


class Study(_Part):
    """What is compared, on whom, and how it is judged. It is either of `folds` or of `shots` (`studies.designs`).

    Attributes:
        name: of the study.
        title: of its report.
        about: the question, in a sentence or two.
        notes: what a reader must know, such as that the scans are phantoms.
        data: `dataset.json` of the cohort to adapt to; relative to the study's file.
        labels: of it; none means all.
        patient_pattern: regular expression whose first group, searched in a case's id, is the patient.
        patients: of it to draw; None means all.
        pretrain_data: `dataset.json` that the bases learn from, or a list of scans without labels for encoders (None:
            `data`). Where it is the same cohort, patients of the study never pre-train.
        pretrain_labels: of that.
        phantoms: to draw where there is no `data`; None draws none.
        folds: of the cross-validation, by patient; three where there are no shots.
        shots: patients to adapt to, each number for itself; all are tested on the same other patients.
        test_patients: of a study of shots; None means half of the patients, rounded down.
        seeds: of the adaptations: each is done once with each. (Of a base: `seed` in its training.) In a study of shots
            each draws patients to adapt to of its own.
        split_seed: of the draw of patients, and of the folds or the patients to test on.
        preparation: of the scans, fields of `Preparation`.
        bases: by name.
        arms: what is compared.
        training: settings of every adaptation (`TrainingSettings`).
        nested: also choose each method's rank inside the training folds, which takes n(n − 1)/2 more trainings per
            method and rank, for n folds; without meaning in a study of shots.
        reference: what methods (in a study of shots, all arms) are tested against: the name of an arm, or
            `best strategy`.
        strata_ml: upper ends of the strata of annotated volume in mL, or `tertiles`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    title: str
    about: str = ""
    notes: tuple[str, ...] = ()
    data: Path | None = None
    labels: tuple[str, ...] = ()
    patient_pattern: str | None = None
    patients: int | None = Field(default=None, ge=2)
    pretrain_data: Path | None = None
    pretrain_labels: tuple[str, ...] = ()
    phantoms: Phantoms | None = None
    folds: int | None = Field(default=None, ge=2)
    shots: tuple[int, ...] = ()
    test_patients: int | None = Field(default=None, ge=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    split_seed: int = Field(default=0, ge=0)
    preparation: dict[str, Any] = {}
    bases: dict[str, Base] = Field(min_length=1)
    arms: tuple[Arms, ...] = Field(min_length=1)
    training: dict[str, Any] = {}
    nested: bool = True
    reference: str = BEST_STRATEGY
    strata_ml: tuple[float, ...] | Literal["tertiles"] = (25, 50, 100, 300)

    @model_validator(mode="before")
    @classmethod
    def _of_folds(cls, content: Any) -> Any:
        if isinstance(content, Mapping) and not content.get("shots") and content.get("folds") is None:
            return {**content, "folds": FOLDS}
        return content

    @field_validator("shots")
    @classmethod
    def _some(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if min(shots, default=1) < 1:
            raise ValueError(f"{min(shots)} patients cannot be learned from: give shots of at least 1")
        if len(set(shots)) < len(shots):
            raise ValueError(f"the shots {', '.join(map(str, shots))} must differ")
        return shots

    @field_validator("strata_ml", mode="before")
    @classmethod
    def _rising(cls, ends: Any) -> Any:
        if ends == "tertiles":
            return ends
        numbers = isinstance(ends, list | tuple) and all(isinstance(end, int | float) for end in ends)
        if not (numbers and ends and list(ends) == sorted(set(ends)) and ends[0] > 0):
            raise ValueError("give rising volumes above 0 mL, or tertiles")
        return ends

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("seeds must differ, and none be below 0")
        return seeds

    @model_validator(mode="after")
    def _one_design(self) -> Self:
        if self.shots and self.folds is not None:
            raise ValueError(
                f"it has {self.folds} folds and {', '.join(map(str, self.shots))} shots, and can be of one of them "
                "alone: take one out (`folds: null` where they are those of an extended study)"
            )
        if self.test_patients is not None and not self.shots:
            raise ValueError("test_patients are of a study of shots, and in one of folds every patient is tested on")
        return self

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for arms in self.arms:
            if arms.base not in self.bases:
                raise ValueError(f"arms of base {arms.base!r}: the study has the bases {', '.join(self.bases)}")
            for strategy in (each for joined in arms.strategies for each in _joined(joined)):
                if strategy not in STRATEGIES:
                    raise ValueError(f"unknown strategy {strategy!r}: choose among {', '.join(STRATEGIES)}")
            self.settings(arms.training, seed=0)
            for arm in arms_of(arms):
                arm.spec()
        for base in self.bases.values():
            base.settings()
        arms_there = [arm for arms in self.arms for arm in arms_of(arms)]
        names = [arm.name for arm in arms_there]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"the arm {min(twice)!r} is there twice: each must have a name of its own")
        families = () if self.shots else (arm.family for arm in arms_there)  # of shots, none chooses its rank
        if self.reference not in {BEST_STRATEGY, *names, *families}:
            raise ValueError(
                f"the reference {self.reference!r} is no arm: choose {BEST_STRATEGY}, or {', '.join(names)}"
            )
        return self

    @property
    def recomputes(self) -> bool:
        """Whether any training recomputes activations instead of keeping them."""
        all_settings = [self.settings(arms.training, seed=0) for arms in self.arms]
        all_settings += [base.settings() for base in self.bases.values()]
        return any(settings.recompute for settings in all_settings)

    def settings(self, changes: Mapping[str, Any], *, seed: int) -> TrainingSettings:
        """Of one adaptation.

        Raises:
            SegraftError: a value that does not fit, or a seed, which the study's `seeds` give.
        """
        given = {**self.training, **changes}
        if "seed" in given:
            raise SegraftError("training setting seed is given by the study's seeds: name it there.")
        return settings_of({**given, "seed": seed})


def settings_of(values: Mapping[str, Any], check: Callable[..., TrainingSettings] = check_settings) -> TrainingSettings:
    """Settings of one training of a study, as `check` makes them.

    Raises:
        SegraftError: a value that does not fit, or one that is for the engine to choose.
    """
    engines = {"devices", "nodes", "device"} & set(values)
    if engines:
        raise SegraftError(
            f"training setting {min(engines)} is not of a study, whose runs are spread by its engine: leave it out."
        )
    return check(**values)


class Arm(_Part):
    """One adaptation of one base: what the study compares.

    Attributes:
        base: name of the base.
        method: preset of `AdapterSpec`, or `none`.
        rank: None without a method.
        strategy: what is trained whole; several are joined by ` + `.
        adapter: further fields of `AdapterSpec`.
        training: settings that differ from the study's.
    """

    base: str
    method: str
    rank: int | None
    strategy: str
    adapter: dict[str, Any] = {}
    training: dict[str, Any] = {}

    @property
    def family(self) -> str:
        """The name without the rank: what a rank is chosen for."""
        return self.at("")

    @property
    def name(self) -> str:
        """Such as `dora_c 64 (unet)`, or `lora 8 + decoder (unet)`."""
        return self.at("" if self.rank is None else str(self.rank))

    def at(self, rank: str) -> str:
        """The name with this in place of the rank."""
        method = "none" if self.method == "none" else f"{self.method} {rank}".rstrip()
        parts = [part for part in (method, self.strategy) if part != "none"]
        return f"{' + '.join(parts) or 'none'} ({self.base})"

    @property
    def trains_nothing(self) -> bool:
        """The base as it is."""
        return self.method == "none" and self.strategy == "none"

    @property
    def train(self) -> tuple[str, ...]:
        """Selectors of what is trained whole."""
        return selectors(_joined(self.strategy))

    def spec(self) -> AdapterSpec:
        """Of the adapter."""
        known = {field.name for field in fields(AdapterSpec)} - {"method", "rank", "train"}
        unknown = sorted(set(self.adapter) - known)
        if unknown:
            raise SegraftError(
                f"adapter: {unknown[0]!r} is no further field of an adapter: choose among {', '.join(sorted(known))}."
            )
        rank = {} if self.rank is None else {"rank": self.rank}
        try:
            return AdapterSpec(self.method, **{**rank, **self.adapter, "train": self.train})
        except (TypeError, AttributeError) as error:
            raise SegraftError(f"adapter: a field has a value of another type than it takes ({error}).") from error


def arms_of(arms: Arms) -> list[Arm]:
    """Every combination."""
    return [
        Arm(
            base=arms.base,
            method=method,
            rank=rank,
            strategy=" + ".join(_joined(strategy)),
            adapter=arms.adapter,
            training=arms.training,
        )
        for method in arms.methods
        for strategy in arms.strategies
        for rank in (arms.ranks if method != "none" else (None,))
    ]


def _joined(strategy: str) -> list[str]:
    """The strategies of one entry, each once; `none` only alone."""
    names = list(dict.fromkeys(name.strip().lower() for name in strategy.split("+")))
    return [name for name in names if name != "none"] or names[:1]
