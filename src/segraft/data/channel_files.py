"""How the files of a scan's channels are named: one 4D file, nnU-Net's numbered files, a list or a mapping of files."""

import re
from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import PlainValidator

from segraft.data.channels import numbered, plain
from segraft.data.listed import stem
from segraft.data.nifti import SUFFIXES, holds_several
from segraft.errors import SegraftError

Files = str | list[str | None] | dict[str, str | None]


def _given(value: Any) -> Files:
    files = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    several = isinstance(value, dict | list)
    if not files or not all((file is None and several) or (isinstance(file, str) and file) for file in files):
        raise ValueError(
            "give a file, or files by channel (a list, or a mapping from channels; null where there is none)"
        )
    return value  # type: ignore[no-any-return]  # as just checked


Given = Annotated[Files, PlainValidator(_given)]
"""The image of an entry: a file, or one per channel, in order or by the channel's name; null where a scan lacks it."""

_NUMBERED = re.compile(r"_(\d{4})(\.nii(?:\.gz)?)$")


def names_of(images: Sequence[Files], modalities: tuple[str, ...], path: Path) -> tuple[str, ...]:
    """Names of the channels of all entries of the list at `path`: those it lists, or, for lists of files, numbers.

    Raises:
        SegraftError: two channels of one name; files by name, but no names are listed.
    """
    if len({plain(name) for name in modalities}) < len(modalities):
        raise SegraftError(f"{path} has two channels of one name ({', '.join(modalities)}): name each differently.")
    if modalities:
        return modalities
    if any(isinstance(image, dict) for image in images):
        raise SegraftError(
            f'{path} gives files by channel, but lists no channels: add "modality", such as {{"0": "T1"}}.'
        )
    most = max((len(image) for image in images if isinstance(image, list)), default=0)
    return numbered(most) if most > 1 else ()


def files_of(
    image: Files, channels: tuple[str, ...], place: Callable[[str], Path], *, who: str
) -> tuple[str | None, ...]:
    """The names of a scan's files: one per channel, None where it is missing, or one for all.

    Where there are several channels and one file is named, it is nnU-Net's first (`case_0000.nii.gz`, or
    `case.nii.gz` as its first version writes it) where such files are there, else one file that holds all.

    Args:
        image: as the entry gives it.
        channels: names of the list's channels; none or one where scans have a single one.
        place: where a named file is.
        who: the entry, for messages.

    Raises:
        SegraftError: another number of files than channels, a channel that is not listed, or none at all.
    """
    if isinstance(image, str):
        return (image,) if len(channels) < 2 else _beside(image, len(channels), place)
    count = max(1, len(channels))
    if isinstance(image, Mapping):
        known = {plain(name): name for name in channels}
        unknown = [name for name in image if plain(name) not in known]
        if unknown:
            raise SegraftError(
                f'{who} has a file for the channel "{unknown[0]}", which is not among those listed '
                f"({', '.join(channels)}): correct either."
            )
        named = {plain(name): file for name, file in image.items()}
        if len(named) < len(image):
            raise SegraftError(f"{who} has two files for one channel ({', '.join(image)}): give one for each.")
        files = tuple(named.get(plain(name)) for name in channels)
    else:
        files = tuple(image)
    if len(files) != count:
        raise SegraftError(
            f"{who} has {len(files)} images where {count} channels are listed ({', '.join(channels) or 'unnamed'}): "
            "give one per channel, null where there is none."
        )
    if all(file is None for file in files):
        raise SegraftError(f"{who} has no image in any channel: add one, or take the entry out.")
    return files


def scan_name(files: Sequence[str | None], channels: Sequence[str]) -> str:
    """What a scan is called by its files: the name of one, what several begin with, else their folder.

    Args:
        files: one per channel, of which one at least is there; or one that holds all.
        channels: their names; none where they have none.
    """
    names_of_each = channels if len(channels) == len(files) else ("",) * len(files)
    given = [(file, channel) for file, channel in zip(files, names_of_each, strict=True) if file is not None]
    names = [stem(_NUMBERED.sub(r"\2", file)) for file, _ in given]
    if len(files) == 1:
        return stem(given[0][0])
    if len(names) > 1:
        shared = commonprefix([f"{name}_" for name in names])  # noqa: RUF071  letter by letter
        name = re.sub(r"[^_\-. ]*$", "", shared)  # whole words of it
    else:  # without the channel's name, so that a scan that lacks its others is called as if it had them
        name = re.sub(rf"{re.escape(given[0][1])}$", "", names[0], flags=re.IGNORECASE)
    return name.rstrip("_-. ") or PurePosixPath(given[0][0]).parent.name or names[0]


def grouped(paths: Sequence[Path], count: int) -> list[tuple[Path | None, ...]]:
    """Files of scans with several channels: numbered ones (`case_0000.nii.gz`, …) belong together, others hold all.

    A file with several volumes holds all, however it is named.

    A numbered file brings those beside it, so that the first is enough; numbers that are not there are missing.

    Raises:
        SegraftError: a number that no channel has.
    """
    found: dict[tuple[Path | None, ...], None] = {}
    for path in paths:
        match = _NUMBERED.search(path.name)
        if match is None or holds_several(path):
            found[(path,)] = None
            continue
        if int(match[1]) >= count:
            raise SegraftError(
                f"{path} is named as channel {int(match[1])} of a scan, counted from 0, and the network takes {count}: "
                "leave it out, or rename it."
            )
        beside = (path.with_name(_renumbered(path.name, number)) for number in range(count))
        found[tuple(file if file.exists() else None for file in beside)] = None
    return list(found)


def _beside(image: str, count: int, place: Callable[[str], Path]) -> tuple[str | None, ...]:
    if holds_several(place(image)):
        return (image,)
    if not _NUMBERED.search(image):
        if place(image).exists():
            return (image,)
        ending = next((ending for ending in reversed(SUFFIXES) if image.endswith(ending)), None)
        if ending is None:
            return (image,)
        first = f"{image.removesuffix(ending)}_0000{ending}"
    else:
        first = image
    names = [_renumbered(first, number) for number in range(count)]
    files = tuple(name if place(name).exists() else None for name in names)
    return (image,) if all(file is None for file in files) else files


def _renumbered(name: str, number: int) -> str:
    return _NUMBERED.sub(lambda match: f"_{number:04}{match[2]}", name)
