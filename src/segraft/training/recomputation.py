"""Parts of a network that recompute their activations in the backward pass instead of keeping them.

Known as activation (or gradient) checkpointing. It is called recomputation here because a checkpoint, everywhere else
in this package, is the file that a training resumes from.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segraft.adapters.routing import Resumed
from segraft.adapters.selection import Place, modules_by_name
from segraft.errors import SegraftError

FORWARD = "forward"
"""An attribute of this name on a module goes before the `forward` of its class."""


class _Region:
    """Stands in for the `forward` of one module.

    It holds the module rather than its bound method, so that a deep copy of the network recomputes with its own
    weights, and a layer whose class changes (by grafting) with its new class.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name, self.called = module, name, False
        self.replaced: Callable[..., Any] | None = module.__dict__.get(FORWARD)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        forward = self.replaced or partial(type(self.module).forward, self.module)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        options: dict[str, Any] = {}
        resumed = Resumed()
        if resumed.route is not None or any(True for _ in _buffers(self.module)):
            # given only where it is needed: torch.compile refuses it
            options["context_fn"] = partial(_contexts, self.module, resumed)
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=True, **options)

    def remove(self) -> None:
        """Give the module its own `forward` back."""
        if self.replaced is None:
            del self.module.__dict__[FORWARD]
        else:
            self.module.__dict__[FORWARD] = self.replaced


@contextmanager
def recomputing(net: nn.Module, places: Sequence[str]) -> Iterator[None]:
    """Within the `with` block, chosen parts of a network recompute their activations in the backward pass.

    Loss, gradients, random numbers and running statistics are what they are without it, bit for bit (on a GPU, where
    its kernels are deterministic). Between forward and backward such a module keeps its inputs alone, and it costs
    about one more forward pass of its own. What saves memory is many modules of similar size, one of which is held at
    a time: the levels of a U-Net, the blocks of a transformer. Forward hooks *inside* such a module run twice.

    Args:
        net: grafted or not; changed for the length of the block.
        places: see `regions`; empty changes nothing.

    Raises:
        SegraftError: see `regions`; nothing has changed then.
    """
    made = [_Region(module, name) for module, name in regions(net, places).items()]
    for region in made:
        region.module.__dict__[FORWARD] = region
    try:
        yield
    finally:
        for region in made:
            region.remove()


def regions(net: nn.Module, places: Sequence[str]) -> dict[nn.Module, str]:
    """The modules to recompute, each as one piece, and their names.

    They are the outermost modules in each place: a list of modules stands for its members, since it has no forward
    pass of its own, and what lies inside another chosen module is recomputed with that. The network itself is never
    one of them: recomputed as one piece it would save nothing.

    Args:
        net: grafted or not.
        places: names of parts (`segraft.adapters.parts_of`), or regular expressions for whole module names.

    Raises:
        SegraftError: a place where there is no such module.
    """
    names = modules_by_name(net)
    chosen: dict[nn.Module, str] = {}
    for text in places:
        place = Place(net, text)
        matching = ((module, held[0]) for module, held in names.items() if module is not net and place.matches(held))
        found = dict(piece for module, name in matching for piece in _callable(module, name))
        if not found:
            raise place.nothing("module")
        chosen |= found
    inside = {inner for module in chosen for inner in module.modules() if inner is not module}
    return {module: name for module, name in chosen.items() if module not in inside}


def require_recomputation(net: nn.Module) -> None:
    """To be called after the first step: every module that was chosen must have been called.

    A network may run through the members of an `nn.Sequential` itself; choosing the sequence would then do nothing.

    Raises:
        SegraftError: naming those that were not.
    """
    held = (module.__dict__.get(FORWARD) for module in net.modules())
    idle = [region.name for region in held if isinstance(region, _Region) and not region.called]
    if idle:
        raise SegraftError(
            f"{', '.join(map(repr, idle))} cannot be recomputed, because the network's forward pass never calls it as "
            f"a whole: choose the modules inside, such as '{idle[0]}\\.[^.]*', or leave it out."
        )


def _callable(module: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """The module itself, or, where it is a mere container, the outermost modules in it that have a forward pass."""
    if type(module).forward is not nn.Module.forward:
        yield module, name
        return
    for child_name, child in module.named_children():
        yield from _callable(child, f"{name}.{child_name}")


def _buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every buffer of a module and of what is inside it, adapters included: owner, attribute, value."""
    for owner in module.modules():
        yield from ((owner, name, value) for name, value in owner._buffers.items() if value is not None)  # noqa: SLF001


class _Rewound(AbstractContextManager[None]):
    """Within the `with` block, a module has copies of the buffers that it had when this was made, and its channels.

    For a recomputation, which must not count as a second forward pass. That may write to buffers (batch norms: running
    statistics) or even compute with what it wrote (spectral norms): so the recomputation is given the buffers as the
    forward pass found them, and what it writes goes with them. Just to switch the updates off would not do: autograd
    keeps the statistics too, and a recomputation must keep the same tensors as the forward pass did.
    """

    def __init__(self, module: nn.Module, resumed: Resumed) -> None:
        self.resumed = resumed
        self.found = [(owner, name, value.detach().clone()) for owner, name, value in _buffers(module)]
        self.present: list[tuple[nn.Module, str, Tensor | None]] = []

    def __enter__(self) -> None:
        self.present = [(owner, name, owner._buffers[name]) for owner, name, _ in self.found]  # noqa: SLF001
        for owner, name, value in self.found:
            owner._buffers[name] = value.clone()  # noqa: SLF001  a graph that is kept may be run through again
        self.resumed.__enter__()

    def __exit__(self, *_error: object) -> None:
        self.resumed.__exit__()
        for owner, name, value in self.present:
            owner._buffers[name] = value  # noqa: SLF001
        self.present = []


def _contexts(module: nn.Module, resumed: Resumed) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the forward pass, before which this is called, and of its recomputation."""
    return nullcontext(), _Rewound(module, resumed)
