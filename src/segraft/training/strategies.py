"""Tuning strategies: what of the network is trained whole, as data.

A strategy is a tuple of `train` selectors of `AdapterSpec`, so each combines with every adapter method, which then
adapts the layers that are left, or, where its targets are named, comes on top of what is trained whole.
To add one, add one entry.
"""

import re
from collections.abc import Sequence

from torch import nn

from segraft.adapters import parts_of
from segraft.errors import SegraftError

STRATEGIES: dict[str, tuple[str, ...]] = {
    "none": (),
    "head": ("head",),
    "bitfit": ("bias:.*",),
    "affine": ("norm:.*",),
    "bitfit_encoder": ("bias:encoder",),
    "affine_encoder": ("norm:encoder",),
    "decoder": ("decoder", "head"),
    "encoder": ("encoder",),
    "full": (".*",),
    "shallow": ("M1.1", "M3"),
    "deep": ("M1.3", "M1.4"),
    "encoding": ("M1.1", "M1.2", "M1.3"),
    "decoding": ("M1.4", "M1.5", "M3"),
    "all": (".*",),
}
"""none: factors alone. head: linear probe. bitfit: all biases (Zaken et al. 2022). affine: scale and shift of norms.
bitfit_encoder, affine_encoder: of the encoder alone, as in the few-shot paper, where the decoder is frozen or
trained whole besides.

shallow, deep, encoding, decoding, all: table 2 of the haemorrhage paper, the first four for its multi-view U-Net alone.
There `decoder` trains M2.1 and M2.2 too, which `decoding` leaves frozen. all: the same as full.
"""

PART = re.compile(r"[\w.]+")
"""A selector, without its kind, that is the plain name of a part; the others are expressions that fit any network."""


def selectors(names: Sequence[str]) -> tuple[str, ...]:
    """The `train` selectors of several strategies, whose names may be in upper or lower case.

    What is no strategy is a part or a regular expression itself, and passes as it is.
    """
    return tuple(dict.fromkeys(s for name in names for s in STRATEGIES.get(name.lower(), (name,))))


def require_parts(net: nn.Module, train: Sequence[str]) -> None:
    """Refuse a strategy for parts that the network has not got; to be called before grafting.

    Grafting would refuse it too, but naming a part that the user never spoke of.

    Args:
        net: grafted or not.
        train: of an `AdapterSpec`. A strategy counts as chosen if all its selectors are there.

    Raises:
        SegraftError: naming the strategy, its missing parts, the network's class and the parts that it has.
    """
    parts = parts_of(net)
    for name, places in STRATEGIES.items():
        where = [place.rpartition(":")[2] for place in places]  # without its kind
        missing = [place for place in where if PART.fullmatch(place) and place not in parts]
        if missing and set(places) <= set(train):
            has = f"its parts are {', '.join(parts)}" if parts else "it names no parts"
            raise SegraftError(
                f"the strategy {name!r} trains {' and '.join(missing)}, which {type(net).__name__} has not got "
                f"({has}): choose another strategy, or a network that has them."
            )
