"""What starts new in an adaptation starts as its seed says: the adapter holds it, the base keeps its own start."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from segraft.adapters.edits import Replacement
from segraft.adapters.graft import grafted_layers
from segraft.adapters.grafted import grafts_of
from segraft.jobs.base_source import LoadedBase
from segraft.jobs.bases import build_from_start, image_channels
from segraft.networks.heads import START_SEED, Outputs, require_head
from segraft.networks.starting import own_prefixes


def draw_start(loaded: LoadedBase, seed: int) -> None:
    """Draw again, from `seed`, what starts at random in a base and is trained whole.

    A base that is built again must be the same, so it always starts from one seed. Adaptations with several seeds would
    then all begin alike, and show nothing of what depends on chance.

    Args:
        loaded: a base, grafted; changed in place.
        seed: with that of all bases (`START_SEED`) nothing changes.
    """
    if seed == START_SEED or not (loaded.random or loaded.untrained or loaded.new):
        return
    outputs, arguments = Outputs.of(loaded.described), dict(loaded.described["arguments"])
    arguments["in_channels"] = image_channels(loaded.described)  # as the task has them, not as the base has
    if outputs is not None:
        arguments["out_channels"] = len(outputs.rows)
    drawn = build_from_start(loaded.described["network"], arguments, seed=seed).state_dict()
    prefixes = tuple(
        prefix for place in loaded.untrained for prefix in own_prefixes(loaded.net, place, loaded.untrained)
    )
    head = require_head(loaded.net) if loaded.new else None
    with torch.no_grad():
        for name, value in _trained_whole(loaded.net):
            if loaded.random or name.startswith(prefixes):
                value.copy_(drawn[name])
            elif head is not None and name in head.keys:
                for place in sorted(loaded.new):
                    value[place] = drawn[name][place]


def _trained_whole(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that an adapter holds in place of the base's, by the base's names."""
    for layer_name, layer in grafted_layers(net):
        for graft in grafts_of(layer).values():
            for edit in graft.modules():
                if isinstance(edit, Replacement):
                    yield (f"{layer_name}.{edit.tensor}" if layer_name else edit.tensor), edit.value
