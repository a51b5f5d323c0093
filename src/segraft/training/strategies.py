"""Tuning strategies: what of the network is trained whole, as data.

A strategy is a tuple of `train` selectors of `AdapterSpec`, so each combines with every adapter method, which then
adapts the layers that are left, or, where its targets are named, comes on top of what is trained whole.
To add one, add one entry.
"""

from collections.abc import Sequence

STRATEGIES: dict[str, tuple[str, ...]] = {
    "none": (),
    "head": ("head",),
    "bitfit": ("bias:.*",),
    "affine": ("norm:.*",),
    "decoder": ("decoder", "head"),
    "encoder": ("encoder",),
    "full": (".*",),
}
"""none: factors alone. head: linear probe. bitfit: all biases (Zaken et al. 2022). affine: scale and shift of norms."""


def selectors(names: Sequence[str]) -> tuple[str, ...]:
    """The `train` selectors of several strategies; what is no strategy is a part or a regular expression itself."""
    return tuple(dict.fromkeys(s for name in names for s in STRATEGIES.get(name, (name,))))
