"""Pre-trained networks where other tools keep them: what a folder of theirs holds, as a base needs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from segraft.data.labels import Labels
from segraft.data.scan_preparation import ScanPreparation
from segraft.errors import SegraftError
from segraft.networks.heads import BACKGROUND

SCHEMES: dict[str, str] = {
    "nnunet": "segraft.exchange.nnunet:open_nnunet",
    "monai": "segraft.exchange.monai_bundle:open_bundle",
}
"""Tool -> `package.module:function` that opens what it keeps, given the path and a fold (None: its usual one).

To add a tool, add one entry: `tool:path` is then a base wherever a base is asked for.
"""


@dataclass(frozen=True)
class Opened:
    """A network of another tool.

    Attributes:
        network: for `segraft.networks.build`.
        arguments: of it, with `in_channels`; `out_channels` is given by who builds it.
        weights: file that `segraft.networks.load_checkpoint` reads.
        labels: that it segments, in the order of its outputs.
        background: its first output is a softmax's for the background, before those of the labels.
        channels: names of the image's channels, in order; ("",) for a single one without a name.
        preparation: of the scans as the tool does it; None where that cannot be told.
        notes: what the user should know of it.
        unlike: sentences on what the tool does with the network's outputs that Segraft does not, so that masks would be
            others; it can then be adapted, but does not segment as it is.
    """

    network: str
    arguments: Mapping[str, Any]
    weights: Path
    labels: Labels
    background: bool
    channels: tuple[str, ...]
    preparation: ScanPreparation | None
    notes: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of the weights, in order."""
        names = tuple(self.labels.values())
        return (BACKGROUND, *names) if self.background else names


def scheme_of(base: str | Path) -> str | None:
    """The tool that `tool:path` names; None for a path or network of ours."""
    scheme, colon, _ = str(base).partition(":")
    return scheme if colon and scheme in SCHEMES else None


def open_base(base: str | Path, *, fold: str | None = None) -> Opened:
    """Open `tool:path`.

    Args:
        base: such as `nnunet:path/to/nnUNetTrainer__nnUNetPlans__3d_fullres`.
        fold: of a tool that trains several networks by cross-validation.

    Raises:
        SegraftError: no such tool, or a folder that is not one of its, or lacks a part.
    """
    scheme = scheme_of(base)
    if scheme is None:
        raise SegraftError(f"{base} names no tool: write it as one of {', '.join(f'{name}:path' for name in SCHEMES)}.")
    module, _, name = SCHEMES[scheme].partition(":")
    opener: Callable[[Path, str | None], Opened] = getattr(import_module(module), name)
    return opener(Path(str(base).partition(":")[2]), fold)


def require_no_fold(fold: str | None, base: str | Path) -> None:
    """Refuse a fold where there is none to choose.

    Raises:
        SegraftError: naming the base.
    """
    if fold is not None:
        raise SegraftError(f"{base} has no folds: leave --fold out.")
