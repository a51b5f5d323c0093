"""What to graft: `AdapterSpec`, and the papers' methods as presets of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from segraft.adapters.controls import Budget, Fixed, Proximal, RankControl, as_control
from segraft.adapters.formulas import FORMULAS
from segraft.errors import SegraftError

Scale = Literal["alpha/r", "alpha/sqrt(r)", "alpha"]
Gate = Literal["none", "uniform", "zero"]
Bias = Literal["frozen", "low_rank", "train"]


FIXED = Fixed()


@dataclass(frozen=True)
class Preset:
    """A named point in the space of methods. To add a method, add one entry to `PRESETS`.

    Attributes:
        projections: attention projections that it adapts, unless told otherwise, in networks that name them.
    """

    factorisation: str | None
    magnitude: bool = False
    scale: Scale = "alpha/r"
    gate: Gate = "none"
    control: RankControl = FIXED
    projections: tuple[str, ...] = ()
    formula: str = ""
    source: str = ""


PRESETS: dict[str, Preset] = {
    "none": Preset(None, formula="W0", source="no factors: only what `train` names is trained"),
    "lora": Preset("lora", formula="W0 + α/R · B·A", source="Hu et al. 2022"),
    "rs_lora": Preset("lora", scale="alpha/sqrt(r)", formula="W0 + α/√R · B·A", source="Kalajdzievski 2023"),
    "dora": Preset("lora", magnitude=True, formula="m · (W0 + α/R · B·A) / ‖W0 + α/R · B·A‖", source="Liu et al. 2024"),
    "lora_c": Preset("lora_c", formula="W0 + α/R · Σ B[o,h,R]·A[R,i,w]", source="Ding et al. 2024"),
    "conv_lora": Preset("lora", formula="W0 + α/R · Σ B[o,R]·A[R,i,h,w]", source="Aleem et al. 2024"),
    "cp_lora": Preset("cp", formula="W0 + α/R · Σ a[o,R]·b[i,R]·c[h,R]·d[w,R]", source="Minoccheri et al. 2025"),
    "dora_c": Preset("lora_c", magnitude=True, formula="m · V/‖V‖, V as in lora_c", source="Minoccheri et al. 2025"),
    "conv_dora": Preset(
        "lora", magnitude=True, formula="m · V/‖V‖, V as in conv_lora", source="Minoccheri et al. 2025"
    ),
    "cp_dora": Preset("cp", magnitude=True, formula="m · V/‖V‖, V as in cp_lora", source="Minoccheri et al. 2025"),
    "arena": Preset(
        "lora",
        scale="alpha",
        gate="uniform",
        control=Proximal(),
        projections=("key", "value"),
        formula="W0 + B·diag(v)·A, λ‖v‖₁ by proximal steps",
        source="Baklouti et al. 2025",
    ),
    "ada_lora": Preset(
        "lora",
        scale="alpha",
        gate="zero",
        control=Budget(),
        formula="W0 + P·diag(v)·Q, a budget over the directions",
        source="Zhang et al. 2023",
    ),
}


@dataclass(frozen=True)
class AdapterSpec:
    r"""What to graft onto a network, and where.

    A *place* below is the name of a part of the network (`decoder`), or a regular expression that must match a
    whole module name (`decoder\..*`).

    Attributes:
        method: a key of `PRESETS`. It fills `factorisation`, `magnitude`, `scale`, `gate` and `control` where these
            are None.
        rank: R ≥ 1. It may exceed the weight's own rank (over-parametrisation).
        alpha: α; None means 2·R, as LoRA-C proposes and the haemorrhage paper adopts (or 1,
            where the scale is α itself).
        factorisation: a key of `segraft.adapters.FORMULAS`.
        magnitude: a trained magnitude per output channel (DoRA).
        scale: of the update; `alpha` is α itself.
        gate: diag(v) between the factors. `uniform`: v starts in [−1, 1], and the first factor at zero; `zero`: v at
            zero, and directions of size one; `none`.
        control: how the rank of a gated update is controlled (`segraft.adapters.controls`): a control, the name of
            its kind, or its settings as a mapping.
        magnitude_dim: None: true output channels. 0: the first stored dimension (reproduces the paper's Table 3).
        bias: of the adapted layers: `frozen`; `low_rank`, an R×o factor summed over R; `train`, trained whole.
        targets: places to adapt; also attention projections that the network names (`query`, `key`, `value`). None
            adapts every linear and convolution layer that `train` leaves frozen (`arena`: the keys and values of
            networks that name them).
        exclude: places never adapted and never trained whole; here also expressions on parameter names.
        ranks: place -> rank, for layers whose rank differs from `rank`; of several that match the last holds.
        slices: place -> row blocks 'j/n' of a fused weight, each with factors of its own. The k and v of a fused
            qkv layer: `{r".*\.qkv": ("2/3", "3/3")}`.
        train: what is trained whole beside the factors: `[kind:]place`, with kind `bias` or `norm`, the place a part
            or a regular expression on parameter names (`head`, `bias:.*`, `norm:encoder`, `.*`). The adapter holds a
            copy of each such tensor; the base is not written to. On a weight that is a target too, the factors come
            on top of the copy.
        channels: with more than 1, every adapted weight has so many sets of factors, channel c's for channel c of the
            image alone: for networks whose encoder takes one channel at a time (`routed`). Targets None then means
            their encoder.

    Raises:
        SegraftError: an unknown method or option, a rank that is no whole number above zero, …
    """

    method: str = "lora"
    rank: int = 8
    alpha: float | None = None
    factorisation: str | None = None
    magnitude: bool | None = None
    scale: Scale | None = None
    gate: Gate | None = None
    control: RankControl | str | Mapping[str, Any] | None = None
    magnitude_dim: Literal[0] | None = None
    bias: Bias = "frozen"
    targets: str | Sequence[str] | None = None
    exclude: str | Sequence[str] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    slices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    train: str | Sequence[str] = ()
    channels: int = 1

    def __post_init__(self) -> None:
        preset = PRESETS.get(self.method)
        if preset is None:
            raise SegraftError(f"unknown method {self.method!r}: choose one of {', '.join(PRESETS)}.")
        settle = object.__setattr__  # the fields are frozen for everybody else
        for name in ("factorisation", "magnitude", "scale", "gate"):
            if getattr(self, name) is None:
                settle(self, name, getattr(preset, name))
        settle(self, "control", as_control(self.control, preset.control))
        for name in ("targets", "exclude", "train"):
            value = getattr(self, name)
            if value is not None or name != "targets":
                settle(self, name, (value,) if isinstance(value, str) else () if value is None else tuple(value))
        settle(self, "ranks", dict(self.ranks))
        settle(
            self,
            "slices",
            {place: (s,) if isinstance(s, str) else tuple(s) for place, s in self.slices.items()},
        )
        self._check_options()
        self._check_places()
        self._check_ranks()
        self._check_channels()

    def _check_options(self) -> None:
        if self.factorisation is not None and self.factorisation not in FORMULAS:
            raise SegraftError(f"unknown factorisation {self.factorisation!r}: choose one of {', '.join(FORMULAS)}.")
        if self.scale not in ("alpha/r", "alpha/sqrt(r)", "alpha"):
            raise SegraftError(f"unknown scale {self.scale!r}: choose 'alpha/r', 'alpha/sqrt(r)' or 'alpha'.")
        if self.gate not in ("none", "uniform", "zero"):
            raise SegraftError(f"unknown gate {self.gate!r}: choose 'none', 'uniform' or 'zero'.")
        if self.gate == "none" and self.control != FIXED:
            raise SegraftError(
                f"rank control {self.rank_control.kind!r} works on a gate: choose gate 'uniform' or 'zero', or method "
                "arena or ada_lora."
            )
        if self.bias not in ("frozen", "low_rank", "train"):
            raise SegraftError(f"unknown bias setting {self.bias!r}: choose 'frozen', 'low_rank' or 'train'.")
        if self.magnitude_dim not in (None, 0):
            raise SegraftError(f"magnitude_dim {self.magnitude_dim!r}: it is None (true output channels) or 0.")
        if self.gate == "zero" and isinstance(self.control, Proximal) and not self.control.step:
            raise SegraftError(
                "a gate that starts at zero stays there under proximal control with step 0, so nothing would train: "
                "choose gate 'uniform', or a step above 0."
            )
        if self.alpha is not None and not (isinstance(self.alpha, int | float) and 0 < self.alpha < math.inf):
            raise SegraftError(f"alpha is {self.alpha!r}: it must be a number above zero.")

    def _check_places(self) -> None:
        for name in ("targets", "exclude", "train"):
            if not all(isinstance(place, str) for place in getattr(self, name) or ()):
                raise SegraftError(f"{name} is {getattr(self, name)!r}: it must be names or regular expressions.")
        if not all(isinstance(place, str) for place in (*self.ranks, *self.slices)):
            raise SegraftError("the keys of ranks and slices must be names or regular expressions.")
        for place, blocks in self.slices.items():
            if not blocks or not all(isinstance(block, str) for block in blocks):
                raise SegraftError(f"the slices of {place!r} are {blocks!r}: write 'j/n', such as '2/3'.")
        if self.factorisation is None and (
            self.targets
            or self.channels != 1
            or (self.exclude and not self.train)
            or self.ranks
            or self.slices
            or self.magnitude
            or self.gate != "none"
            or self.bias != "frozen"
        ):
            raise SegraftError(
                "method 'none' has no factors, so targets, exclude, ranks, slices, magnitude, gate, bias and "
                "channels have no meaning with it."
            )

    def _check_ranks(self) -> None:
        for what, rank in (("rank", self.rank), *((f"rank for {place!r}", r) for place, r in self.ranks.items())):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise SegraftError(f"{what} is {rank!r}: it must be a whole number of at least 1.")
        highest = max(self.rank, *self.ranks.values()) if self.ranks else self.rank
        if isinstance(self.control, Budget) and self.control.target is not None and self.control.target > highest:
            raise SegraftError(
                f"rank control: a target of {self.control.target:g} directions per weight is above the rank {highest}, "
                "which is that at the start: choose a higher rank, or a lower target."
            )

    def _check_channels(self) -> None:
        if isinstance(self.channels, bool) or not isinstance(self.channels, int) or self.channels < 1:
            raise SegraftError(f"channels is {self.channels!r}: it must be a whole number of at least 1.")
        if self.channels > 1 and self.bias != "frozen":
            raise SegraftError(
                f"bias {self.bias!r} goes with one set of factors, and there are {self.channels} channels: leave it "
                "'frozen', or train the biases for all channels alike, with train 'bias:encoder'."
            )

    @property
    def rank_control(self) -> RankControl:
        """`control`, as it was settled."""
        return as_control(self.control, FIXED)

    def scaling(self, rank: int) -> float:
        """The factor in front of ΔW at `rank`: α/R, or α/√R or α where `scale` says so."""
        if self.scale == "alpha":
            return 1.0 if self.alpha is None else float(self.alpha)
        alpha = 2.0 * rank if self.alpha is None else float(self.alpha)
        return float(alpha / (rank if self.scale == "alpha/r" else rank**0.5))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `from_dict` takes them back.

        A method without a gate leaves gate and control out, one set of factors for all channels leaves channels out.
        """
        preset, values = PRESETS[self.method], asdict(self)
        ungated = {"gate": "none", "control": asdict(FIXED)}
        silent = preset.gate == "none" and all(values[name] == value for name, value in ungated.items())
        left_out = {*(ungated if silent else ()), *(("channels",) if self.channels == 1 else ())}
        return {name: value for name, value in values.items() if name not in left_out}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The spec that `to_dict` described.

        Raises:
            SegraftError: a field that this version does not know.
        """
        unknown = set(values) - {known.name for known in fields(cls)}
        if unknown:
            raise SegraftError(
                f"the adapter's spec has fields this version does not know ({', '.join(sorted(unknown))}): "
                "update segraft."
            )
        return cls(**values)
