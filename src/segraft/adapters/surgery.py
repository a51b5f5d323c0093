"""How a layer comes to compute with its adapters: its class becomes a subclass whose tensors are properties.

The layer stays the same object under the same names, and its base tensors stay where they were (`_parameters`,
`_buffers`, the state dict). A layer of torch's own is executed by `execution`; any other runs its own `forward`, which
reads the composed tensors.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from segraft.adapters.edits import Edit
from segraft.adapters.execution import executed
from segraft.adapters.grafted import ATTRIBUTE, Edits, LayerGrafts, adapted_tensor, grafts_of, is_grafted, is_of_channel
from segraft.adapters.stock import STOCK, stock_class


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
    stock = stock_class(base)
    if stock is not None:
        namespace["forward"] = executed(base.forward, STOCK[stock])
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
            grafts.forget()
    grafts.active = tuple(name for name in grafts.active if name in grafts)
    if len(grafts) == 0:
        del layer._modules[ATTRIBUTE]
    refresh_class(layer)


def refresh_class(layer: nn.Module) -> None:
    """Give the layer the class that its present adapters need."""
    base = base_class(layer)
    if not is_grafted(layer):
        layer.__class__ = base
        return
    grafts = grafts_of(layer)
    grafts.by_channel = any(is_of_channel(edit) for name in grafts for edit in grafts.edits(name).values())
    layer.__class__ = grafted_class(base, grafts.edited())
