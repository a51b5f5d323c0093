"""Intensity settings that are said by the channel, once it is known which channels there are."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from segraft.data.channels import plain
from segraft.data.preparation import Preparation
from segraft.data.scan_preparation import ScanPreparation
from segraft.errors import SegraftError

_Given = TypeVar("_Given", bound=ScanPreparation)

OTHERS = "*"
"""In place of a channel: those that are not named."""


def by_channel(
    given: _Given | Mapping[str, Any] | None,
    inherited: ScanPreparation | None,
    channels: Sequence[str],
    whose: str,
) -> _Given | Mapping[str, Any] | None:
    """The same fields of a preparation, with one intensity setting per channel where they are said by the channel.

    Args:
        given: whose `intensity` may be {channel: setting}, the channel by its name or its place from 0, or "*" for all
            others. Where "*" is not there, others keep what the base was trained with, else the default.
        inherited: what the base was trained with; where that has no such settings, the fields stay as they are.
        channels: names of the channels, in order; empty ones where they have none.
        whose: what has the channels, for messages.

    Raises:
        SegraftError: a channel that there is not, or one that is named twice.
    """
    asked = given.get("intensity") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(asked, Mapping) or "kind" in asked:
        return given
    if not isinstance(inherited, Preparation | None):
        return given
    others = asked.get(OTHERS)
    if others is None:
        rest = (inherited or Preparation()).intensities(len(channels))
        settings: list[Any] = [each.model_dump(mode="json") for each in rest]
    else:
        settings = [others] * len(channels)
    said: dict[int, str] = {}
    for name in asked:
        if name == OTHERS:
            continue
        place = _place(name, channels, whose)
        if place in said:
            raise SegraftError(f"{said[place]} and {name} are one channel of {whose}: give one intensity for each.")
        said[place] = name
        settings[place] = asked[name]
    return {**given, "intensity": settings if len(settings) > 1 else settings[0]}


def _place(name: str, channels: Sequence[str], whose: str) -> int:
    known = [plain(channel) for channel in channels]
    if plain(name) and plain(name) in known:
        return known.index(plain(name))
    if name.isdecimal() and int(name) < len(channels):
        return int(name)
    there = ", ".join(f"{place} ({channel})" if channel else str(place) for place, channel in enumerate(channels))
    raise SegraftError(f'{whose} has no channel "{name}" to give an intensity for: choose among {there}.')
