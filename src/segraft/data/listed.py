"""What a reader of a data layout gives back, and how cases and patients are named in all of them."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from segraft.data.case import Case
from segraft.errors import SegraftError

Patients = Callable[[str], str]
"""From a case's id to its patient."""


@dataclass(frozen=True)
class Listed:
    """What is found at a path; the fields are those of `Cohort`."""

    name: str
    path: Path
    labels: dict[int, str]
    modalities: tuple[str, ...]
    cases: tuple[Case, ...]


def patients_by(pattern: str | None, path: Path, *, cure: str = "correct the pattern") -> Patients:
    """How the patients of the cohort at `path` are told: by the pattern's first group, else each case is one.

    Raises:
        SegraftError: no regular expression, or one without a group; later, an id that it does not match.
    """
    if pattern is None:
        return lambda identity: identity
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SegraftError(
            f'the patient pattern "{pattern}" is not a regular expression ({error}): correct it.'
        ) from error
    if not compiled.groups:
        raise SegraftError(f'the patient pattern "{pattern}" has no group: put the patient in parentheses.')

    def patient(identity: str) -> str:
        found = compiled.search(identity)
        if found is None or not found.group(1):
            raise SegraftError(f'the patient pattern "{pattern}" does not match the case {identity} of {path}: {cure}.')
        return found.group(1)

    return patient


def stem(image: str) -> str:
    """A file's name without `.nii`/`.nii.gz`, and without the `_0000` of a first channel."""
    return PurePosixPath(image).name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")


def identities(images: Sequence[str], names: Sequence[str]) -> list[str]:
    """Ids of cases: each one's name, or, where several share it (`s1/ct.nii.gz`), its whole path."""
    counts = Counter(names)
    return [
        name if counts[name] == 1 else "_".join((*PurePosixPath(image).parent.parts, stem(image)))
        for image, name in zip(images, names, strict=True)
    ]


def foreground(names: Mapping[str, Path]) -> dict[int, str]:
    """Numbers from 1 for organ names, in sorted order; each name comes with a file that has it, for messages.

    Raises:
        SegraftError: two names that differ in case alone.
    """
    known: dict[str, str] = {}
    for name in sorted(names):
        other = known.setdefault(name.casefold(), name)
        if other != name:
            raise SegraftError(
                f"{names[other]} and {names[name]} are masks of one name but for capital letters: rename one."
            )
    return dict(enumerate(sorted(names), start=1))


def inside(root: Path, name: str, *, who: str, leaves: str, cure: str) -> Path:
    """The file `name` of the folder `root`; a list from elsewhere must not reach files outside.

    Args:
        root: the folder.
        name: relative to it, or absolute.
        who: names it, such as "line 3 of split.txt".
        leaves: what must not be left, such as "its folder".
        cure: what to do then.

    Raises:
        SegraftError: the file lies outside, also by a link.
    """
    file = root / name
    try:
        resolved = file.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null character
        raise SegraftError(f'{who} names the file "{name}", which is no usable path: correct it.') from error
    if not resolved.is_relative_to(root.resolve()):
        raise SegraftError(f'{who} names the file "{name}", which leaves {leaves}: {cure}.')
    return file
