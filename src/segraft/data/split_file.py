"""Published splits: a text file with a scan and its mask per line, relative to the folder where the data sets are.

So come the splits of the CLIP-driven universal model (`10_Decathlon/Task03_Liver/imagesTr/liver_0.nii.gz`, a tab, its
mask) and of few-shot fine-tuning (`14_TotalSegmentator/data/s0241/ct.nii.gz`, blanks,
`14_TotalSegmentator/data/s0241/segmentations/spleen.nii.gz`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from segraft.data.case import Case
from segraft.data.dataset_json import LISTING, read_labels
from segraft.data.flare import ORGANS, is_flare_name
from segraft.data.listed import Listed, foreground, identities, inside, patients_by, stem
from segraft.data.nifti import SUFFIXES
from segraft.data.organ_folders import IMAGES, MASKS
from segraft.data.organ_masks import organ_of, organs_in
from segraft.errors import SegraftError

SUFFIX = ".txt"


@dataclass(frozen=True)
class _Line:
    """What one line names, as it is written."""

    number: int
    image: str
    mask: str


@dataclass(frozen=True)
class _Entry:
    """A line, its files found. `label` is the mask, or the folder that holds the masks of `organs`."""

    line: _Line
    image: Path
    label: Path
    organs: tuple[str, ...] = ()


def read_split_file(path: Path, patient_pattern: str | None) -> Listed:
    """Read a list of scans and masks.

    A line is `image mask`, separated by a tab or, where no path has blanks, by blanks; empty lines and lines that begin
    with # do not count. Paths are relative to the list's own folder, or to the nearest folder above it under which the
    first image exists; no line may leave that folder.

    What the masks say:

    - a folder of masks, or files in a folder `segmentations`: one binary mask per organ, labels are the organs that
      the list names, in sorted order. Lines of one scan that name several of its organs are one case.
    - label maps: as the `dataset.json` beside the list names them, else the one nearest above the masks, in the data
      folder; else, where all are named so, as FLARE'22 does.

    Raises:
        SegraftError: the list cannot be read or is empty; a line that is not two paths, names what is not there, leaves
            the data folder, or repeats another; masks of several kinds or data sets, or that nothing names.
    """
    lines = _lines(path)
    root = _root(path, lines[0])
    entries = _merged(path, [_entry(path, root, line) for line in lines])
    kinds = {bool(entry.organs): entry.line for entry in reversed(entries)}
    if len(kinds) > 1:
        raise SegraftError(
            f"{path} lists a mask per organ (line {kinds[True].number}) and masks of numbers (line "
            f"{kinds[False].number}): keep one kind in a list."
        )
    labels = _organs(entries) if entries[0].organs else _named(path, root, entries)
    organs = tuple(labels.values()) if entries[0].organs else ()
    images = [entry.line.image for entry in entries]
    names = identities(images, [_name(entry) for entry in entries])
    seen: dict[str, _Line] = {}
    for name, entry in zip(names, entries, strict=True):
        other = seen.setdefault(name, entry.line)
        if other is not entry.line:
            raise SegraftError(
                f"lines {other.number} and {entry.line.number} of {path} would both be the case {name}: rename a file."
            )
    patient = patients_by(patient_pattern, path)
    found = dict.fromkeys(IMAGES.get(entry.image.name, "") for entry in entries)
    cases = (
        Case(name, patient(name), (entry.image,), entry.label, organs)
        for name, entry in zip(names, entries, strict=True)
    )
    return Listed(
        name=path.stem,
        path=path,
        labels=labels,
        modalities=() if "" in found else (" or ".join(found),),
        cases=tuple(cases),
    )


def _lines(path: Path) -> list[_Line]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SegraftError(f"{path} cannot be read ({reason}): give a list of images and masks.") from error
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = [part.strip() for part in line.split("\t") if part.strip()] if "\t" in line.strip() else line.split()
        if len(parts) != 2:
            raise SegraftError(
                f"line {number} of {path} is {len(parts)} words where an image and its mask are expected: write two "
                "paths, with a tab between them if they have blanks."
            )
        found.append(_Line(number, *parts))
    if not found:
        raise SegraftError(f"{path} lists no cases: add an image and its mask, one case per line.")
    return found


def _root(path: Path, first: _Line) -> Path:
    """The folder that the paths are relative to. Not the root of all files: a list must not reach everything."""
    above = [path.parent, *path.parent.absolute().parents]
    for folder in above[:-1]:
        try:
            if (folder / first.image).exists():
                inside(folder, first.image, who=f"line {first.number} of {path}", leaves=str(folder), cure="")
                return folder
        except (SegraftError, OSError, ValueError):
            continue
    raise SegraftError(
        f'neither {path.parent} nor a folder above it holds "{first.image}", the image in line {first.number} of '
        f"{path}: put the list into the data folder that its paths begin in."
    )


def _entry(path: Path, root: Path, line: _Line) -> _Entry:
    who = f"line {line.number} of {path}"
    image, label = (
        inside(root, name, who=who, leaves=f"the data folder {root}", cure="move the file there")
        for name in (line.image, line.mask)
    )
    for file in (image, label):
        if not file.exists():
            raise SegraftError(f"{who} names {file}, which is not there: add it, or take the line out.")
    if label.is_dir():
        organs = tuple(organs_in(label))
        if not organs:
            raise SegraftError(f"{who} names the folder {label}, which holds no masks: add them, or take the line out.")
        return _Entry(line, image, label, organs)
    if not label.name.endswith(SUFFIXES):
        raise SegraftError(f"{who} names {label}, which is not a .nii or .nii.gz file: name a mask.")
    if label.parent.name == MASKS:
        return _Entry(line, image, label.parent, (organ_of(label),))
    return _Entry(line, image, label)


def _merged(path: Path, entries: Sequence[_Entry]) -> list[_Entry]:
    """One entry per scan: lines that name several organs in one folder belong together."""
    merged: dict[Path, _Entry] = {}
    for entry in entries:
        before = merged.get(entry.image)
        if before is None:
            merged[entry.image] = entry
            continue
        if not entry.organs or before.label != entry.label or set(before.organs) & set(entry.organs):
            raise SegraftError(
                f"lines {before.line.number} and {entry.line.number} of {path} are of one image, {entry.image}: keep "
                "one."
            )
        merged[entry.image] = _Entry(before.line, before.image, before.label, before.organs + entry.organs)
    return list(merged.values())


def _name(entry: _Entry) -> str:
    """A case is named as its scan; where that is called as all others, `s0001/ct.nii.gz`, as its folder."""
    return entry.image.parent.name if entry.image.name in IMAGES else stem(entry.line.image)


def _organs(entries: Sequence[_Entry]) -> dict[int, str]:
    return foreground({organ: entry.label / organ for entry in entries for organ in entry.organs})


def _named(path: Path, root: Path, entries: Sequence[_Entry]) -> dict[int, str]:
    """The labels of masks of numbers."""
    beside = path.parent / LISTING
    if beside.is_file():
        return read_labels(beside)
    listings: dict[Path | None, _Line] = {}
    for entry in entries:
        listings.setdefault(_above(entry.label, root), entry.line)
    if listings.keys() == {None}:
        if all(is_flare_name(stem(entry.label.name)) for entry in entries):
            return dict(ORGANS)
        raise SegraftError(
            f"nothing says what the numbers in the masks of {path} stand for: write a {LISTING} beside it, such as "
            '{"labels": {"0": "background", "1": "liver"}}.'
        )
    known = {listing: None if listing is None else read_labels(listing) for listing in listings}
    first, *others = known
    for other in others:
        if known[other] != known[first]:
            raise SegraftError(
                f"lines {listings[first].number} and {listings[other].number} of {path} are of data sets whose numbers "
                f"stand for different labels ({_told(first)}, {_told(other)}): keep one data set in a list, or write a "
                f"{LISTING} beside it that holds for all."
            )
    labels = known[first]
    assert labels is not None  # noqa: S101  # one listing at least, and all agree
    return labels


def _told(listing: Path | None) -> str:
    return f"no {LISTING}" if listing is None else str(listing)


def _above(mask: Path, root: Path) -> Path | None:
    """The nearest `dataset.json` above a mask, not above the data folder."""
    return next((listing for folder in _between(mask, root) if (listing := folder / LISTING).is_file()), None)


def _between(mask: Path, root: Path) -> Iterator[Path]:
    for folder in mask.absolute().parents:
        yield folder
        if folder == root.absolute():
            return
