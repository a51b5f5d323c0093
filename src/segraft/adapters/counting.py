"""How many parameters a network has: trainable and frozen, per part and per adapter."""

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
    """Parameters of one owner (the base or an adapter), one part of the network, one kind."""

    owner: str
    part: str
    kind: str
    trainable: int
    frozen: int


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
        }

    def __str__(self) -> str:
        lines = [f"{'owner':<12}{'part':<14}{'kind':<14}{'trainable':>14}{'frozen':>14}"]
        lines += [f"{r.owner:<12}{r.part:<14}{r.kind:<14}{r.trainable:>14,}{r.frozen:>14,}" for r in self.rows]
        return "\n".join([*lines, f"{'sum':<40}{self.trainable:>14,}{self.frozen:>14,}"])


def parameter_table(net: nn.Module) -> ParameterTable:
    """Count the parameters of a network, grafted or not.

    Kinds are `weights` for the base and, for adapters, `factors`, `magnitude`, `bias` and `whole` (trained whole).
    """
    parts = parts_of(net)
    counts: Counter[tuple[str, str, str, bool]] = Counter()

    def part_of(name: str) -> str:
        inside = (part for part, prefixes in parts.items() for p in prefixes if name == p or name.startswith(p + "."))
        return next(inside, "-")

    for full, _, _, value in base_parameters(net):
        counts["base", part_of(full), "weights", value.requires_grad] += value.numel()
    for layer_name, layer in grafted_layers(net):
        for adapter in grafts_of(layer):
            for edit in grafts_of(layer).edits(adapter).values():
                for name, value in edit.named_parameters():
                    counts[adapter, part_of(layer_name), _kind(edit, name), value.requires_grad] += value.numel()
    keys = dict.fromkeys(key[:3] for key in counts)
    return ParameterTable(tuple(ParameterRow(*key, counts[*key, True], counts[*key, False]) for key in keys))


def _kind(edit: Edit, name: str) -> str:
    if isinstance(edit, LowRank):
        return "magnitude" if name == "m" else "factors"
    return "bias" if isinstance(edit, BiasFactor) else "whole" if isinstance(edit, Replacement) else "other"
