"""The check that every trainable tensor takes part in training."""

from torch import nn

from segraft.errors import SegraftError


class DeadFactorsError(SegraftError):
    """Trainable tensors that received no gradient: they would train nothing, silently."""


def require_gradients(net: nn.Module) -> None:
    """To be called after the first backward pass: every trainable tensor must have received a gradient.

    Raises:
        DeadFactorsError: naming those that did not.
    """
    dead = [name for name, value in net.named_parameters() if value.requires_grad and value.grad is None]
    if dead:
        shown = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
        raise DeadFactorsError(
            f"{len(dead)} trainable tensors received no gradient, so the network's forward pass does not use them: "
            f"{shown}; exclude these layers from the adapter."
        )
