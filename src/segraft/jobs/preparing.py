"""Settling how scans are prepared: what the user says, else what the base was trained with, else what fits the data."""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from segraft.data.channels import plain
from segraft.data.cohort import Case
from segraft.data.head import HEAD_SIZE
from segraft.data.preparation import OWN_AXES, Preparation
from segraft.data.scan_preparation import ScanPreparation
from segraft.errors import SegraftError
from segraft.networks.encoder_files import fixed_size
from segraft.networks.heads import PickedOutputs
from segraft.networks.registry import size_multiple, spatial_dims

LARGEST_3D, LARGEST_2D = 96, 512


@overload
def settle_preparation(
    given: Preparation | Mapping[str, Any] | None, inherited: None, net: nn.Module, cases: Sequence[Case]
) -> Preparation: ...
@overload
def settle_preparation(
    given: ScanPreparation | Mapping[str, Any] | None,
    inherited: ScanPreparation | None,
    net: nn.Module,
    cases: Sequence[Case],
) -> ScanPreparation: ...
def settle_preparation(
    given: ScanPreparation | Mapping[str, Any] | None,
    inherited: ScanPreparation | None,
    net: nn.Module,
    cases: Sequence[Case],
) -> ScanPreparation:
    """The preparation to use.

    Args:
        given: the user's: whole, or only the fields that are to differ from the base's (or from the defaults).
        inherited: what the base was trained with.
        net: for its dimensions and the sizes it takes.
        cases: for the patch size where neither says one, nor the network (`fixed_size`): their median size, at
            most 96 voxels along each axis in 3D and 512 in 2D, rounded up to what the network takes.

    Raises:
        SegraftError: a value that does not fit.
    """
    if given is not None and not isinstance(given, Mapping):
        return given
    if inherited is not None and inherited.CHANGEABLE is not None:
        return _changed(inherited, given or {})
    fields = {**(inherited.model_dump(mode="json") if inherited else {}), **(given or {})}
    settled = checked(fields)
    return settled if "patch" in fields else settled.model_copy(update={"patch": _patch(settled, net, cases)})


def _changed(inherited: ScanPreparation, given: Mapping[str, Any]) -> ScanPreparation:
    """A preparation of which not all may change."""
    may = inherited.CHANGEABLE or frozenset()
    fixed = sorted(set(given) - may)
    if fixed:
        raise SegraftError(
            f"{', '.join(fixed)} cannot be chosen, as another tool prepared the scans that the base was trained on, "
            f"and they are prepared so again: give at most {' and '.join(sorted(may, reverse=True))}."
        )
    return checked({**inherited.model_dump(mode="json"), **given}, type(inherited))


@overload
def checked(fields: Mapping[str, Any]) -> Preparation: ...
@overload
def checked(fields: Mapping[str, Any], kind: type[ScanPreparation]) -> ScanPreparation: ...
def checked(fields: Mapping[str, Any], kind: type[ScanPreparation] = Preparation) -> ScanPreparation:
    """The preparation with these fields.

    Raises:
        SegraftError: a value that does not fit.
    """
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise SegraftError(f"preparation {name} = {first['input']!r}: {first['msg']}.") from error


def check_network(net: nn.Module, patch: tuple[int, int, int], labels: int, channels: int = 1) -> None:
    """Run the network once on an empty patch, before anything is written.

    Args:
        net: the network, left as it was.
        patch: voxels along X, Y, Z; with 1 in Z the network is given a slice.
        labels: how many logits it must give.
        channels: of the patch.

    Raises:
        SegraftError: it does not take the patch, or does not return one logit per label on the patch's grid.
    """
    sizes = patch[:2] if patch[2] == 1 else patch
    name, shown = type(net).__name__, " ".join(map(str, patch))
    training = net.training
    try:
        with torch.no_grad():
            logits = net.eval()(torch.zeros(1, channels, *sizes))
    except SegraftError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SegraftError(
            f"{name} does not take patches of {shown} voxels with {_counted(channels)} ({reason}): choose another "
            "--patch, or other arguments of the network."
        ) from error
    finally:
        net.train(training)
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, labels, *sizes):
        given = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise SegraftError(
            f"{name} gives {given} for a patch of {shown} voxels and {labels} labels: it must return one logit per "
            "label on the grid of its input, as one tensor."
        )


def takes_missing_channels(net: nn.Module) -> bool:
    """Whether a network may be given channels that are NaN throughout, as it says by an attribute of this name."""
    inner = net.net if isinstance(net, PickedOutputs) else net
    return bool(getattr(inner, "takes_missing_channels", False))


def require_same_channels(
    takes: int,
    channels: Sequence[str],
    who: str,
    whose: str,
    cure: str = "choose a network of as many, or list as many channels there",
) -> None:
    """Refuse a network that takes another number of channels than there are.

    Args:
        takes: how many the network takes.
        channels: names of those that there are.
        who: the network, for the message.
        whose: what has the channels.
        cure: what to do, for the message.

    Raises:
        SegraftError: naming both.
    """
    if takes != len(channels):
        shown = f" ({', '.join(channels)})" if any(channels) else ""
        raise SegraftError(
            f"{who} takes images of {_counted(takes)}, and those of {whose} have {_counted(len(channels))}{shown}: "
            f"{cure}."
        )


def require_same_order(known: Sequence[str], channels: Sequence[str], who: str, whose: str) -> None:
    """Refuse channels of which one that the network was trained on stands in another's place.

    Raises:
        SegraftError: naming both.
    """
    theirs, ours = [plain(name) for name in known], [plain(name) for name in channels]
    if any(name in ours and ours.index(name) != place for place, name in enumerate(theirs) if name):
        raise SegraftError(
            f"{who} was trained on the channels {', '.join(known)}, which {whose} has in the order "
            f"{', '.join(channels)}: list those that are the same in the same places there."
        )


def _counted(channels: int) -> str:
    return "1 channel" if channels == 1 else f"{channels} channels"


def _patch(preparation: Preparation, net: nn.Module, cases: Sequence[Case]) -> tuple[int, int, int]:
    fixed = fixed_size(net)
    if fixed is not None:
        across, along, *through = fixed
        return across, along, through[0] if through else 1
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    sizes = []
    for case in cases[:50]:
        scan = case.load().first
        own = io_orientation(scan.affine)
        wanted = own if preparation.orientation == OWN_AXES else axcodes2ornt(tuple(preparation.orientation))
        order = ornt_transform(wanted, own)[:, 0].astype(int)
        mm = np.linalg.norm(scan.affine[:3, :3], axis=0)[order]
        scale = np.ones(3) if preparation.spacing is None else mm / np.asarray(preparation.spacing)
        voxels = np.asarray(scan.shape)[order]
        if preparation.head:  # levelled, it is this large in-plane
            voxels = np.where([code in "IS" for code in preparation.orientation], voxels, HEAD_SIZE)
        sizes.append(voxels * scale)
    median = np.median(sizes, axis=0)
    flat = spatial_dims(net) == 2
    multiple, largest = size_multiple(net), LARGEST_2D if flat else LARGEST_3D
    x, y, z = (int(min(np.ceil(size / multiple) * multiple, max(largest, multiple))) for size in median)
    return (x, y, 1) if flat else (x, y, z)
