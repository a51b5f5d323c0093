"""The adapters of one layer: a submodule of it that holds their edits, and the tensors that come of them."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.compiler import is_compiling

from segraft.adapters.caching import Composed, Derived, Found
from segraft.adapters.edits import Edit, LowRank, Replacement
from segraft.adapters.routing import Passes
from segraft.errors import SegraftError

ATTRIBUTE = "segraft"
"""Name of the submodule, on every grafted layer, that holds {adapter name: {key: Edit}}."""


class Edits(nn.ModuleDict):
    """What one adapter does to one layer, by key; a key may be any name, also one that ModuleDict has itself."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As ModuleDict's, without its refusal of keys such as `keys`: edits are read through `_modules` alone."""
        self._modules[name] = module  # type: ignore[assignment]


class LayerGrafts(nn.ModuleDict):
    """The adapters of one layer, by name, and which of them are active, in order.

    Attributes:
        active: names, in the order of the stack.
        by_channel: whether any has edits for one channel of the image alone.
        composed: by tensor, the value last composed.
        derived: by tensor, what the frozen one gives.
        passes: of `routing`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.by_channel = False
        self.composed: dict[str, Composed] = {}
        self.derived: dict[str, Derived] = {}
        self.passes = Passes()

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be computed again."""
        return {**self.__dict__, "composed": {}, "derived": {}}

    def forget(self) -> None:
        """Let go of what can be computed again."""
        self.composed.clear()
        self.derived.clear()

    def edits(self, name: str) -> dict[str, Edit]:
        """What adapter `name` does to this layer, by key; empty where it leaves the layer alone."""
        held = self._modules.get(name)
        return {} if held is None else {key: e for key, e in held._modules.items() if isinstance(e, Edit)}

    def active_edits(self, tensor: str | None = None) -> Iterator[Edit]:
        """The active edits, of `tensor` or of all, in the order of the stack."""
        for name in self.active:
            yield from (edit for edit in self.edits(name).values() if tensor in (None, edit.tensor))

    def shared_edits(self, tensor: str) -> list[Edit]:
        """The active edits of `tensor` that hold for every channel of the image."""
        return [edit for edit in self.active_edits(tensor) if not is_of_channel(edit)]

    def channel_edits(self) -> list[LowRank]:
        """The active edits of one channel each; they are of one adapter, the last of the stack."""
        last = self.edits(self.active[-1]).values() if self.by_channel and self.active else ()
        return [edit for edit in last if isinstance(edit, LowRank) and edit.channel is not None]

    def found(self) -> Found:
        """How edits are found now."""
        inside = (held._modules for held in list(self._modules.values()) if held is not None)
        return Found.of(self.active, (self._modules, *inside))

    def edited(self) -> frozenset[str]:
        """Every tensor that some adapter, active or not, edits."""
        return frozenset(edit.tensor for name in self for edit in self.edits(name).values())


def is_of_channel(edit: Edit) -> bool:
    """Whether an edit is for one channel of the image alone."""
    return isinstance(edit, LowRank) and edit.channel is not None


def base_tensor(layer: nn.Module, tensor: str) -> Tensor:
    """The layer's own tensor, whatever is grafted on it."""
    held = layer._parameters if tensor in layer._parameters else layer._buffers
    value = held[tensor]
    assert value is not None  # noqa: S101  grafting has checked it
    return value


def set_base_tensor(layer: nn.Module, tensor: str, value: Tensor) -> None:
    """Put another object in the place of the layer's own tensor; its key and order in the state dict stay."""
    held: dict[str, Any] = layer._parameters if tensor in layer._parameters else layer._buffers
    held[tensor] = value


def adapted_tensor(layer: nn.Module, tensor: str) -> Tensor:
    """The value that the layer computes with, under the active adapters.

    With none active it is the base tensor itself, not a copy. What needs no gradient is composed once and kept until
    anything it came from changes.

    Raises:
        SegraftError: there is one value per channel of the image.
    """
    grafts = grafts_of(layer)
    if grafts.by_channel:
        _refuse_one_of_several(layer, tensor)
    elif not is_grad_enabled() and not _is_traced():
        # Evaluation, short, as all that is looked at is in no cache after the layer before.
        kept = grafts.composed.get(tensor)
        if kept is not None and kept.is_current(base_tensor(layer, tensor), grafts.active):
            return kept.value
    return shared_tensor(layer, tensor)


def _refuse_one_of_several(layer: nn.Module, tensor: str) -> None:
    for edit in grafts_of(layer).channel_edits():
        if edit.tensor == tensor:
            raise SegraftError(
                f"{type(layer).__name__} has a {tensor} per channel of the image, so there is not one {tensor} to be "
                "read: run the layer, within segraft.adapters.routed."
            )


def shared_tensor(layer: nn.Module, tensor: str) -> Tensor:
    """`adapted_tensor`, under those of the active adapters that hold for every channel of the image."""
    base = value = base_tensor(layer, tensor)
    grafts = grafts_of(layer)
    edits = grafts.shared_edits(tensor)
    if not edits:
        return base
    if _can_be_kept(base, edits):
        kept = grafts.composed.get(tensor)
        if kept is None or not kept.is_current(base, grafts.active):
            found = grafts.found()
            edits = grafts.shared_edits(tensor)  # another thread may have changed them
            if not edits:
                return base
            kept = grafts.composed[tensor] = Composed.compose(base, edits, found)
        return kept.value
    grafts.composed.pop(tensor, None)
    for edit in edits:
        value = edit(value)
    return value if value.dtype == base.dtype else value.to(base.dtype)


def _can_be_kept(base: Tensor, edits: Sequence[Edit]) -> bool:
    """Not what needs a gradient, nor what is not composed but somebody's own tensor."""
    return not (
        isinstance(edits[-1], Replacement) or _is_traced() or (is_grad_enabled() and _is_differentiated(base, edits))
    )


def _is_traced() -> bool:
    """Whether tensors stand for others, which cannot be looked at."""
    return (
        is_compiling()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
    )


def _is_differentiated(base: Tensor, edits: Sequence[Edit]) -> bool:
    return base.requires_grad or any(tensor.requires_grad for edit in edits for tensor in edit.parameters())


def grafts_of(layer: nn.Module) -> LayerGrafts:
    """The adapters of a grafted layer."""
    grafts = layer._modules[ATTRIBUTE]
    assert isinstance(grafts, LayerGrafts)  # noqa: S101
    return grafts


def is_grafted(layer: nn.Module) -> bool:
    """Whether any adapter, active or not, sits on the layer."""
    return isinstance(layer._modules.get(ATTRIBUTE), LayerGrafts)
