"""Which layers and tensors of a network a spec means: places (parts, regular expressions) resolved by identity.

A module registered under several names is one module: it is found if any of its names matches, and it is adapted once.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from segraft.adapters.grafted import ATTRIBUTE, LayerGrafts
from segraft.adapters.layers import WeightSlot, row_block, weight_slots, why_not
from segraft.adapters.spec import PRESETS, AdapterSpec
from segraft.errors import SegraftError

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

KINDS: dict[str, Callable[[nn.Module, str], bool]] = {
    "bias": lambda _module, tensor: tensor.endswith("bias"),
    "norm": lambda module, _tensor: isinstance(module, NORMS),
}
"""What the kind of a `train` selector (`kind:place`) admits."""

ENCODER = "encoder"
"""The part that runs on one channel at a time, in networks that take several so."""


NAMED: dict[str, dict[str, Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]]] = {"parts": {}, "projections": {}}
"""What classes that do not name their own parts or projections have: attribute -> class, as `module.Class` -> it.

For whoever knows such classes to fill. Where names depend on a network's size, a function that finds them in it.
"""


def _named(net: nn.Module, attribute: str) -> Mapping[str, Any]:
    """The network's own attribute, else what its class is known to have."""
    own = getattr(net, attribute, None)
    if isinstance(own, Mapping):
        return own
    known = NAMED[attribute].get(f"{type(net).__module__}.{type(net).__name__}", {})
    return known if isinstance(known, Mapping) else known(net)


def parts_of(net: nn.Module) -> Mapping[str, tuple[str, ...]]:
    """The named parts of a network, `{part: module-name prefixes}`: its attribute `parts`, empty where it has none."""
    return _named(net, "parts")


def projections_of(net: nn.Module) -> Mapping[str, Mapping[str, str]]:
    """Where a network's attention has its `query`, `key` and `value`: its attribute `projections`.

    Projection -> {regular expression for layer names: its rows in their fused weight, as 'j/n'}; empty where the
    network names none.
    """
    return _named(net, "projections")


def modules_by_name(net: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module once, with all names it is registered under; what is grafted on is not part of the network."""
    names: dict[nn.Module, list[str]] = defaultdict(list)

    def walk(module: nn.Module, prefix: str) -> None:
        names[module].append(prefix)
        for child_name, child in module._modules.items():
            if child is not None and not (child_name == ATTRIBUTE and isinstance(child, LayerGrafts)):
                walk(child, f"{prefix}.{child_name}" if prefix else child_name)

    walk(net, "")
    return dict(names)


def base_parameters(net: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every parameter of the network itself: its first full name, owner, attribute and value."""
    seen: set[int] = set()
    for module, names in modules_by_name(net).items():
        for tensor, value in module._parameters.items():
            if value is not None and id(value) not in seen:
                seen.add(id(value))
                yield _join(names[0], tensor), module, tensor, value


def _join(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


class Place:
    """A part of the network by name, or a regular expression for whole names."""

    def __init__(self, net: nn.Module, text: str) -> None:
        self.text, self.known, self.projections = text, tuple(parts_of(net)), tuple(projections_of(net))
        self.prefixes = parts_of(net).get(text)
        try:
            self.pattern = re.compile(text)
        except re.error as error:
            raise SegraftError(f"{text!r} is not a valid regular expression ({error}).") from error

    def matches(self, names: Sequence[str]) -> bool:
        """Whether any of the names lies in the part, or is matched whole by the expression."""
        if self.prefixes is not None:
            return any(name == p or name.startswith(p + ".") for name in names for p in self.prefixes)
        return any(self.pattern.fullmatch(name) for name in names)

    def nothing(self, what: str) -> SegraftError:
        """The error for a place where there is nothing to adapt."""
        parts = f"its parts are {', '.join(self.known)}" if self.known else "it names no parts"
        if self.projections:
            parts += f", its projections {', '.join(self.projections)}"
        return SegraftError(
            f"{self.text!r} matches no {what} of this network: {parts}; "
            "a regular expression must match a whole name, such as 'decoder\\..*'."
        )


@dataclass(frozen=True)
class SelectedWeight:
    """A weight to factorise: where it is, its rank, and its row blocks (None: the whole weight)."""

    layer: nn.Module
    name: str
    slot: WeightSlot
    rank: int
    blocks: tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class SelectedTensor:
    """A tensor to be trained whole."""

    layer: nn.Module
    name: str
    tensor: str


def select_tensors(net: nn.Module, spec: AdapterSpec) -> list[SelectedTensor]:
    """The parameters that `spec` trains whole: what its `train` names, less what its `exclude` does.

    Raises:
        SegraftError: a selector or an exclusion that matches nothing, a tensor shared by several layers or not to be
            trained.
    """
    names = modules_by_name(net)
    exclude = _Places(net, spec.exclude)
    for module, tensor, _ in _parameters(names):
        exclude.matching([*names[module], *(_join(name, tensor) for name in names[module])])
    exclude.refuse_unused("layer or parameter")
    owners = _owners(names)
    chosen: dict[tuple[int, str], SelectedTensor] = {}
    for selector in spec.train:
        kind, place = _kind_and_place(net, selector)
        matched = False
        for module, tensor, value in _parameters(names):
            full = [_join(name, tensor) for name in names[module]]
            if KINDS[kind](module, tensor) if kind else True:
                if not place.matches(full):
                    continue
                matched = True
                if exclude.matching([*names[module], *full]):
                    continue
                name = names[module][0]
                reason = why_not(module, tensor)
                if reason:
                    raise SegraftError(f"{_join(name, tensor)} cannot be trained: {reason}.")
                _refuse_shared(owners[id(value)], _join(name, tensor))
                chosen[id(module), tensor] = SelectedTensor(module, name, tensor)
        if not matched:
            raise place.nothing(f"{kind} parameter".strip())
    return list(chosen.values())


def select_statistics(net: nn.Module) -> list[SelectedTensor]:
    """Buffers that a forward pass in training mode writes to (running statistics), which must not change the base."""
    chosen = []
    for module, names in modules_by_name(net).items():
        if not (isinstance(module, _NormBase) and module.track_running_stats):
            continue
        for tensor, value in module._buffers.items():
            if value is not None and is_lazy(value):
                raise SegraftError(
                    f"layer {names[0]!r} ({type(module).__name__}) cannot be adapted: it is lazy and has no shape yet: "
                    "run one forward pass first."
                )
            if value is not None:
                chosen.append(SelectedTensor(module, names[0], tensor))
    return chosen


def select_weights(net: nn.Module, spec: AdapterSpec, trained_whole: Sequence[SelectedTensor]) -> list[SelectedWeight]:
    """The weights that `spec` factorises, each once.

    Raises:
        SegraftError: a place that matches nothing, a layer that cannot be adapted (with its name and the reason).
    """
    if spec.factorisation is None:
        return []
    names = modules_by_name(net)
    owners = _owners(names)
    wanted, blocks_of, whole_layers = _with_projections(net, spec)
    targets = None if wanted is None else _Places(net, wanted)
    exclude = _Places(net, spec.exclude)
    ranks, slices = _Places(net, spec.ranks), _Slices(net, blocks_of, whole_layers)
    whole = {(id(selected.layer), selected.tensor) for selected in trained_whole}
    chosen = []
    for module, module_names in names.items():
        slots = weight_slots(module)
        if not (slots or (targets is not None and _is_unknown_layer(module))):
            continue
        excluded = exclude.matching(module_names)  # asked of every layer, so that no exclusion counts as unused
        if excluded or (targets is not None and not targets.matching(module_names)):
            continue
        if not slots:
            raise SegraftError(
                f"layer {module_names[0]!r} ({type(module).__name__}) cannot be adapted: it is neither linear, "
                "convolution nor attention; exclude it, or train it whole."
            )
        rank = [spec.rank, *(spec.ranks[place] for place in ranks.matching(module_names))][-1]
        blocks = slices.of(module_names)
        for slot in slots:
            if (id(module), slot.weight) in whole and (targets is None or (spec.channels > 1 and spec.targets is None)):
                continue
            _refuse(module, module_names[0], slot.edited(bias=spec.bias != "frozen"), owners, whole)
            rows = _blocks(module, module_names[0], slot, blocks)
            chosen.append(SelectedWeight(module, module_names[0], slot, rank, rows))
    for places in (targets or ranks, ranks, slices):
        places.refuse_unused("linear, convolution or attention layer")
    if not chosen:
        raise SegraftError(
            "nothing to adapt: every linear and convolution layer is excluded or trained whole: use method "
            "'none', or name targets to have factors on top of what is trained whole."
        )
    return chosen


def _with_projections(
    net: nn.Module, spec: AdapterSpec
) -> tuple[Sequence[str] | None, dict[str, tuple[str, ...]], list["Place"]]:
    """Targets and slices of a spec, with the projections that it names (or its method prefers) as layers and rows.

    Last, where there are projections, the targets that are none.
    """
    named = projections_of(net)
    wanted: Sequence[str] | None = spec.targets
    if wanted is None:
        preferred = PRESETS[spec.method].projections
        wanted = preferred if preferred and set(preferred) <= set(named) else None
    if wanted is None and spec.channels > 1 and ENCODER in parts_of(net):
        wanted = (ENCODER,)
    blocks: dict[str, tuple[str, ...]] = {}
    for text in wanted or ():
        for layers, rows in named.get(text, {}).items():
            blocks[layers] = (*blocks.get(layers, ()), rows)
    places = None if wanted is None else [p for text in wanted for p in named.get(text, (text,))]
    others = [Place(net, text) for text in wanted or () if text not in named] if blocks else []
    return places, blocks | {place: tuple(rows) for place, rows in spec.slices.items()}, others


class _Places:
    """Several places, and which of them have matched anything."""

    def __init__(self, net: nn.Module, texts: Iterable[str]) -> None:
        self.places = [Place(net, text) for text in texts]
        self.used: set[str] = set()

    def matching(self, names: Sequence[str]) -> list[str]:
        """The texts of the places that match one of the names."""
        hits = [place.text for place in self.places if place.matches(names)]
        self.used.update(hits)
        return hits

    def refuse_unused(self, what: str) -> None:
        """A place that matched nothing is a typing error of the user's, not something to pass over."""
        for place in self.places:
            if place.text not in self.used:
                raise place.nothing(what)


class _Slices(_Places):
    """Row blocks of fused weights, by place.

    Args:
        net: with the layers.
        blocks: place -> row blocks.
        whole: places whose layers are meant as a whole.
    """

    def __init__(self, net: nn.Module, blocks: Mapping[str, tuple[str, ...]], whole: Sequence[Place]) -> None:
        super().__init__(net, blocks)
        self.blocks, self.whole = blocks, whole

    def of(self, names: Sequence[str]) -> tuple[str, ...] | None:
        """Of a layer; None where it is meant as a whole. Of several places the last holds.

        Raises:
            SegraftError: it is named both ways.
        """
        hits = self.matching(names)
        both = [place.text for place in self.whole if hits and place.matches(names)]
        if both:
            raise SegraftError(
                f"layer {names[0]!r} is named as a whole ({both[0]}) and by its projections: name it one way."
            )
        return self.blocks[hits[-1]] if hits else None


def _kind_and_place(net: nn.Module, selector: str) -> tuple[str, Place]:
    kind, colon, text = selector.partition(":")
    if colon and kind in KINDS:
        return kind, Place(net, text)
    return "", Place(net, selector)


def _parameters(names: Mapping[nn.Module, list[str]]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in names:
        for tensor, value in module._parameters.items():
            if value is not None:
                yield module, tensor, value


def _owners(names: Mapping[nn.Module, list[str]]) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = defaultdict(list)
    for module, tensor, value in _parameters(names):
        owners[id(value)].append(_join(names[module][0], tensor))
    return owners


def _refuse_shared(owners: Sequence[str], name: str) -> None:
    if len(owners) > 1:
        raise SegraftError(
            f"{name} cannot be adapted: {' and '.join(owners)} are one shared tensor, and adapting one layer would "
            "untie them; exclude these layers."
        )


def _refuse(
    module: nn.Module,
    name: str,
    tensors: Sequence[str],
    owners: Mapping[int, Sequence[str]],
    whole: AbstractSet[tuple[int, str]],
) -> None:
    for tensor in tensors:
        if (id(module), tensor) in whole:
            continue  # checked when it was selected
        reason = why_not(module, tensor)
        if reason:
            raise SegraftError(f"layer {name!r} ({type(module).__name__}) cannot be adapted: {reason}.")
        _refuse_shared(owners[id(module._parameters[tensor])], _join(name, tensor))


def _is_unknown_layer(module: nn.Module) -> bool:
    """A leaf with a weight matrix of its own: an embedding, a recurrent or a custom layer."""
    return not module._modules and any(value is not None and value.ndim >= 2 for value in module._parameters.values())


def _blocks(
    module: nn.Module, name: str, slot: WeightSlot, blocks: Sequence[str] | None
) -> tuple[tuple[int, int] | None, ...]:
    if blocks is None:
        return (None,)
    if slot.transposed or slot.groups > 1:
        raise SegraftError(f"layer {name!r} is transposed or grouped: row blocks are for plain fused weights.")
    weight = module._parameters[slot.weight]
    assert weight is not None  # noqa: S101  why_not has checked it
    found = tuple(row_block(text, weight.shape[0], repr(name)) for text in blocks)
    ordered = sorted(found)
    if any(first[1] > second[0] for first, second in pairwise(ordered)):
        raise SegraftError(f"the slices {', '.join(blocks)} of {name!r} overlap.")
    return found
