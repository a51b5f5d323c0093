"""How a layer computes with its adapters: its class becomes a subclass whose tensors are properties.

The layer stays the same object under the same names, its own `forward` runs, and its base tensors stay where they were
(`_parameters`, `_buffers`, the state dict).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from segraft.adapters.edits import Edit

ATTRIBUTE = "segraft"
"""Name of the submodule, on every grafted layer, that holds {adapter name: {key: Edit}}."""


class Edits(nn.ModuleDict):
    """What one adapter does to one layer, by key; a key may be any name, also one that ModuleDict has itself."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As ModuleDict's, without its refusal of keys such as `keys`: edits are read through `_modules` alone."""
        self._modules[name] = module  # type: ignore[assignment]


class LayerGrafts(nn.ModuleDict):
    """The adapters of one layer, by name, and which of them are active, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()

    def edits(self, name: str) -> dict[str, Edit]:
        """What adapter `name` does to this layer, by key; empty where it leaves the layer alone."""
        held = self._modules.get(name)
        return {} if held is None else {key: e for key, e in held._modules.items() if isinstance(e, Edit)}

    def active_edits(self, tensor: str | None = None) -> Iterator[Edit]:
        """The active edits, of `tensor` or of all, in the order of the stack."""
        for name in self.active:
            yield from (edit for edit in self.edits(name).values() if tensor in (None, edit.tensor))

    def edited(self) -> frozenset[str]:
        """Every tensor that some adapter, active or not, edits."""
        return frozenset(edit.tensor for name in self for edit in self.edits(name).values())


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

    With none active it is the base tensor itself, not a copy.
    """
    base = value = base_tensor(layer, tensor)
    for edit in grafts_of(layer).active_edits(tensor):
        value = edit(value)
    return value if value.dtype == base.dtype else value.to(base.dtype)


def grafts_of(layer: nn.Module) -> LayerGrafts:
    """The adapters of a grafted layer."""
    grafts = layer._modules[ATTRIBUTE]
    assert isinstance(grafts, LayerGrafts)  # noqa: S101
    return grafts


def is_grafted(layer: nn.Module) -> bool:
    """Whether any adapter, active or not, sits on the layer."""
    return isinstance(layer._modules.get(ATTRIBUTE), LayerGrafts)


def _property(tensor: str) -> property:
    def read(layer: nn.Module) -> Tensor:
        try:
            return adapted_tensor(layer, tensor)
        except AttributeError as error:
            # nn.Module.__getattr__ would swallow it and hand out the base tensor: a silently unadapted layer.
            raise RuntimeError(f"composing {tensor} of {type(layer).__name__} failed: {error}") from error

    return property(read)


def _rebuild(base: type[nn.Module], tensors: frozenset[str]) -> nn.Module:
    grafted = grafted_class(base, tensors)
    return grafted.__new__(grafted)


def _reduce(layer: nn.Module, _protocol: Any) -> tuple[Callable[..., nn.Module], tuple[Any, ...], dict[str, Any]]:
    """Copy and pickle by base class and tensor names, as the generated class has no import path."""
    cls: Any = type(layer)
    return _rebuild, (cls.segraft_base, cls.segraft_tensors), layer.__getstate__()  # type: ignore[no-untyped-call]


_CLASSES: dict[tuple[type[nn.Module], frozenset[str]], type[nn.Module]] = {}


def grafted_class(base: type[nn.Module], tensors: frozenset[str]) -> type[nn.Module]:
    """A subclass of `base` in which `tensors` are composed on access."""
    if (base, tensors) in _CLASSES:
        return _CLASSES[base, tensors]
    namespace: dict[str, Any] = {tensor: _property(tensor) for tensor in tensors}
    namespace |= {"segraft_base": base, "segraft_tensors": tensors, "__reduce_ex__": _reduce}
    namespace |= {"__module__": base.__module__, "__doc__": base.__doc__}
    _CLASSES[base, tensors] = type(f"Grafted{base.__name__}", (base,), namespace)
    return _CLASSES[base, tensors]


def base_class(layer: nn.Module) -> type[nn.Module]:
    """The class the layer had before grafting."""
    return getattr(type(layer), "segraft_base", type(layer))


def attach(layer: nn.Module, name: str, edits: dict[str, Edit]) -> None:
    """Put adapter `name`, made of `edits`, on the layer."""
    if not is_grafted(layer):
        layer.add_module(ATTRIBUTE, LayerGrafts())
    grafts_of(layer)[name] = Edits(edits)
    refresh_class(layer)


def detach(layer: nn.Module, names: Iterable[str]) -> None:
    """Take adapters off the layer; with the last one gone it is what it was."""
    grafts = grafts_of(layer)
    for name in names:
        if name in grafts:
            del grafts[name]
    grafts.active = tuple(name for name in grafts.active if name in grafts)
    if len(grafts) == 0:
        del layer._modules[ATTRIBUTE]
    refresh_class(layer)


def refresh_class(layer: nn.Module) -> None:
    """Give the layer the class that its present adapters need."""
    base = base_class(layer)
    tensors = grafts_of(layer).edited() if is_grafted(layer) else frozenset()
    layer.__class__ = grafted_class(base, tensors) if tensors else base
