"""What networks share that encode the channels of an image one at a time, with one encoder, in one pass.

An image [B, C, …] is folded to [K·B, 1, …], the channel outermost, for the K channels that any of the images has; the
encoder runs once, within `segraft.adapters.routed`, so that each channel has factors of its own where an adapter has
them; its states are laid side by side again, [B, C·d, …], and fused to d channels.

A channel that an image lacks is NaN throughout. It is not encoded where the whole batch lacks it; its states are zero,
and so is it itself where the decoder sees the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segraft.errors import SegraftError


@dataclass(frozen=True)
class Folded:
    """A batch of images for an encoder of one channel.

    Attributes:
        volumes: [K·B, 1, …], the channel outermost.
        image: [B, C, …], zero where a channel is missing.
        channels: the K channels that are encoded, for `routed`.
        present: [B, C], on the CPU; None where nothing is missing.
    """

    volumes: Tensor
    image: Tensor
    channels: tuple[int, ...]
    present: Tensor | None

    def side_by_side(self, state: Tensor, dim: int) -> Tensor:
        """States [K·B, …] of the encoder with those of all C channels joined along `dim`: [B, …, C·d, …]."""
        batch, total = self.image.shape[:2]
        blocks = list(state.chunk(len(self.channels)))
        if self.present is not None:
            there = self.present.to(state)
            shape = (batch, *(1 for _ in state.shape[1:]))
            blocks = [block * there[:, c].view(shape) for c, block in zip(self.channels, blocks, strict=True)]
        if len(blocks) < total:
            by_channel = dict(zip(self.channels, blocks, strict=True))
            absent = torch.zeros_like(blocks[0])
            blocks = [by_channel.get(channel, absent) for channel in range(total)]
        return torch.cat(blocks, dim)


class Channelwise:
    """The part of such a network that folds.

    Attributes:
        image_channels: C.
        channel_dropout: how likely each channel of an image is dropped in a training step; one always stays.
        takes_missing_channels: channels of NaN are allowed.
    """

    takes_missing_channels = True
    image_channels: int
    channel_dropout: float
    training: bool

    def take_channels(self, channels: int, dropout: float) -> None:
        """To be called by the constructor.

        Raises:
            SegraftError: no channels, or a dropout outside [0, 1).
        """
        if channels < 1:
            raise SegraftError(f"in_channels is {channels}: an image has at least one channel.")
        if not 0 <= dropout < 1:
            raise SegraftError(f"channel_dropout is {dropout}: it must be a share of at least 0 and below 1.")
        self.image_channels, self.channel_dropout = channels, dropout

    def folded(self, image: Tensor) -> Folded:
        """An image [B, C, …] folded.

        Raises:
            SegraftError: another number of channels, a channel that is NaN in part, an image that lacks every channel.
        """
        if image.ndim < 3 or image.shape[1] != self.image_channels:
            raise SegraftError(
                f"this {type(self).__name__} takes [batch, {self.image_channels} channels, sizes], not "
                f"{tuple(image.shape)}: give in_channels as many channels as the images have."
            )
        present = self._present(image)
        if present is None:
            return Folded(_fold(image), image, tuple(range(self.image_channels)), None)
        there = present.to(image.device).view(*present.shape, *(1 for _ in image.shape[2:]))
        image = torch.where(there, image, 0.0)
        channels = tuple(present.any(0).nonzero().flatten().tolist())
        return Folded(_fold(image[:, channels]), image, channels, present)

    def _present(self, image: Tensor) -> Tensor | None:
        """Which channel is there and not dropped [B, C]; None where all are."""
        first = image.flatten(2)[..., 0].isnan().cpu()
        if first.any():
            first = _missing(image, first)
        present = ~first
        if self.training and self.channel_dropout > 0:
            # Drawn on the CPU, so that the same seed drops the same on every device.
            kept = present & (torch.rand(present.shape) >= self.channel_dropout)
            chance = torch.rand(present.shape).masked_fill(~present, -1)
            one = torch.zeros_like(present).scatter(1, chance.argmax(1, keepdim=True), value=True)
            present = torch.where(kept.any(1, keepdim=True), kept, one)
        return None if present.all() else present


def _missing(image: Tensor, first: Tensor) -> Tensor:
    """Which channels are NaN throughout [B, C], given those whose first voxel is."""
    missing = image.isnan().flatten(2).all(2).cpu()
    for batch, channel in (first & ~missing).nonzero().tolist():
        raise SegraftError(
            f"channel {channel} of image {batch} of the batch is NaN in part: a channel that is missing is NaN "
            "throughout; any other must hold numbers."
        )
    if missing.all(1).any():
        raise SegraftError("an image of the batch has no channel at all: leave that scan out.")
    return missing


def _fold(image: Tensor) -> Tensor:
    """[B, K, …] -> [K·B, 1, …]."""
    return image.transpose(0, 1).flatten(0, 1).unsqueeze(1)


def channelwise_parts(
    encoder: Sequence[str], decoder: Sequence[str], head: Sequence[str], **others: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The parts of such a network: `fusion`, which is also trained with the decoder, beside the usual ones."""
    found = {"encoder": encoder, **others, "fusion": FUSION, "decoder": (*FUSION, *decoder), "head": head}
    return {name: tuple(prefixes) for name, prefixes in found.items()}


FUSION = ("fusion",)
"""Under which the linear maps are, one per level, that bring C·d channels to d."""
