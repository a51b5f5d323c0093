"""How many parameters a network has, trainable and frozen, per part and per adapter, and what training them holds."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from segraft.adapters.edits import BiasFactor, Edit, LowRank, Replacement
from segraft.adapters.graft import grafted_layers
from segraft.adapters.grafted import grafts_of
from segraft.adapters.selection import base_parameters, parts_of


@dataclass(frozen=True)
class ParameterRow:
    """Parameters of one owner (the base or an adapter), one part of the network, one kind; and their bytes."""

    owner: str
    part: str
    kind: str
    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int


@dataclass(frozen=True)
class TrainingState:
    """Bytes that a training with AdamW holds from step to step, beside activations and buffers.

    Gradients and moments have the shape and dtype of their parameter. Not counted is AdamW's step number, 4 bytes for
    each trainable tensor.

    Attributes:
        parameters: of the trainable parameters.
        frozen: of all others: the base, and adapters that do not train.
    """

    parameters: int
    frozen: int

    @property
    def gradients(self) -> int:
        """One per trainable parameter."""
        return self.parameters

    @property
    def optimiser(self) -> int:
        """AdamW's first and second moment of every trainable parameter."""
        return 2 * self.parameters

    @property
    def trainable(self) -> int:
        """Everything that is there because something trains: parameters, gradients, optimiser."""
        return self.parameters + self.gradients + self.optimiser

    def to_dict(self) -> dict[str, int]:
        """As plain JSON values."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimiser": self.optimiser,
            "trainable": self.trainable,
            "frozen": self.frozen,
        }


@dataclass(frozen=True)
class ParameterTable:
    """Rows and their sums."""

    rows: tuple[ParameterRow, ...]

    @property
    def trainable(self) -> int:
        """Parameters that training changes."""
        return sum(row.trainable for row in self.rows)

    @property
    def frozen(self) -> int:
        """Parameters that training leaves alone."""
        return sum(row.frozen for row in self.rows)

    @property
    def total(self) -> int:
        """All parameters."""
        return self.trainable + self.frozen

    @property
    def state(self) -> TrainingState:
        """What training these parameters holds, in bytes."""
        return TrainingState(
            sum(row.trainable_bytes for row in self.rows),
            sum(row.frozen_bytes for row in self.rows),
        )

    def of(self, owner: str, kind: str | None = None) -> int:
        """Parameters of one adapter (or of `base`), of one kind or all."""
        return sum(r.trainable + r.frozen for r in self.rows if r.owner == owner and kind in (None, r.kind))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "trainable": self.trainable,
            "frozen": self.frozen,
            "total": self.total,
            "state_bytes": self.state.to_dict(),
        }

    def __str__(self) -> str:
        lines = [f"{'owner':<12}{'part':<14}{'kind':<14}{'trainable':>14}{'frozen':>14}"]
        lines += [f"{r.owner:<12}{r.part:<14}{r.kind:<14}{r.trainable:>14,}{r.frozen:>14,}" for r in self.rows]
        return "\n".join([*lines, f"{'sum':<40}{self.trainable:>14,}{self.frozen:>14,}"])


def parameter_table(net: nn.Module) -> ParameterTable:
    """Count the parameters of a network, grafted or not.

    Kinds are `weights` for the base and, for adapters, `factors`, `gate`, `magnitude`, `bias` and `whole` (trained
    whole).
    """
    parts = parts_of(net)
    counts: Counter[tuple[str, str, str, bool]] = Counter()
    sizes: Counter[tuple[str, str, str, bool]] = Counter()

    def part_of(name: str) -> str:
        inside = (part for part, prefixes in parts.items() for p in prefixes if name == p or name.startswith(p + "."))
        return next(inside, "-")

    def count(owner: str, name: str, kind: str, value: nn.Parameter) -> None:
        key = owner, part_of(name), kind, value.requires_grad
        counts[key] += value.numel()
        sizes[key] += value.numel() * value.element_size()

    for full, _, _, value in base_parameters(net):
        count("base", full, "weights", value)
    for layer_name, layer in grafted_layers(net):
        for adapter in grafts_of(layer):
            for edit in grafts_of(layer).edits(adapter).values():
                for name, value in edit.named_parameters():
                    count(adapter, layer_name, _kind(edit, name), value)
    keys = dict.fromkeys(key[:3] for key in counts)
    return ParameterTable(
        tuple(
            ParameterRow(*key, *(tally[*key, trainable] for tally in (counts, sizes) for trainable in (True, False)))
            for key in keys
        )
    )


def _kind(edit: Edit, name: str) -> str:
    if isinstance(edit, LowRank):
        return {"m": "magnitude", "v": "gate"}.get(name, "factors")
    return "bias" if isinstance(edit, BiasFactor) else "whole" if isinstance(edit, Replacement) else "other"
