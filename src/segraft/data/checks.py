"""Checks of scans and labels before any work starts on them."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from segraft.data.channels import Scan
from segraft.data.cohort import Case, Cohort
from segraft.data.dicom_seg import read_segments
from segraft.data.labels import Labels
from segraft.data.nifti import load_nifti, require_same_grid, same_grid
from segraft.data.organ_masks import Overlap, join_masks
from segraft.data.scans import load_scan
from segraft.errors import SegraftError

_log = logging.getLogger(__name__)
_LARGEST_LOSS = 0.5  # of a label's voxels: what loses more lies in the others, and what is left is no such organ


def check_image(path: str | Path) -> nib.Nifti1Image:
    """Read one channel of a scan (a NIfTI file, or a folder of one DICOM series) and refuse what no network can use.

    Returns:
        The image, its data [X, Y, Z] in memory.

    Raises:
        SegraftError: the scan cannot be read, is not 3D, holds NaN or infinite values, or is constant.
    """
    image = load_scan(path)
    _check_values(image, f"the image {path}")
    return image


def check_scan(case: Case) -> Scan:
    """Read the scan of a case, all its channels, and refuse what no network can use.

    Raises:
        SegraftError: what `load_channels` refuses; a channel that holds NaN or infinite values, or is constant.
    """
    scan = case.load()
    for place, channel in enumerate(scan.channels):
        if channel is not None:
            _check_values(channel, scan.told(place))
    return scan


def require_channels(scan: Scan) -> None:
    """Refuse a scan that lacks a channel, for networks that cannot do without.

    Raises:
        SegraftError: naming the case and the channel.
    """
    if scan.missing:
        raise SegraftError(
            f"{scan.who} lacks its channel {scan.missing[0]}, which the network needs: add the file, leave the scan "
            "out, or take a network that does without (the channel-wise ones)."
        )


def _check_values(image: nib.Nifti1Image, told: str) -> None:
    data = np.asanyarray(image.dataobj)
    low, high = data.min(), data.max()  # NaN and infinities come through min and max
    if not (np.isfinite(low) and np.isfinite(high)):
        raise SegraftError(f"{told} holds NaN or infinite values: replace them or export it again.")
    if low == high:
        raise SegraftError(
            f"{told} is constant, every voxel is {low:g}: export it again or leave it out (of a scan of several "
            "channels, name null in its place where it is missing)."
        )


def load_case(case: Case, asked: Collection[int] | None = None) -> tuple[Scan, nib.Nifti1Image]:
    """Read the scan and label of a case.

    Args:
        case: a case with a label.
        asked: the labels asked for. A label file is read whole whatever they are; of a folder of masks only those that
            they cover are read; see `read_segments` for a DICOM SEG. None: all, which may be more than a hundred files.

    Returns:
        The scan, and its label on the grid of the scan's first channel; the label's values are whole and not negative.
        Where masks of a folder overlap, see `join_masks`.

    Raises:
        SegraftError: what `check_scan` refuses; no label; a label on another grid, or with values that are
            fractions or negative; what `join_masks` or `read_segments` refuses.
    """
    scan, label, _ = _load(case, asked)
    return scan, label


def _load(case: Case, asked: Collection[int] | None) -> tuple[Scan, nib.Nifti1Image, Overlap]:
    scan = check_scan(case)
    path = case.require_label()
    if case.organs:
        organs = case.asked_organs(None if asked is None else Labels.of(asked).values_covered)
        return scan, *join_masks(path, organs, scan.first, scan.path)
    if case.segment_labels is not None:
        return scan, read_segments(path, case.segment_labels, asked, scan.first, scan.path), Overlap()
    label = load_nifti(path, what="label")
    require_same_grid(label, path, scan.first, scan.path, cure=_cure(scan, label))
    data = np.asanyarray(label.dataobj)
    if data.dtype.kind == "f" and not np.array_equal(data, np.rint(data)):
        raise SegraftError(f"the label {path} holds fractions: store whole label numbers.")
    if data.min() < 0:
        raise SegraftError(f"the label {path} holds the negative value {data.min():g}: use 0 for background.")
    return scan, label, Overlap()


def _cure(scan: Scan, label: nib.Nifti1Image) -> str | None:
    """What to do about a label on another grid than the first channel that is there; None where there is only one.

    Channels are brought to that grid, not labels: what is measured would depend on it.
    """
    if len(scan.channels) == 1:
        return None
    there = [(name, channel) for name, channel in zip(scan.names, scan.channels, strict=True) if channel is not None]
    first = there[0][0]
    like = [name for name, channel in there if same_grid(channel, label)]
    if like:
        return (
            f"it has that of the channel {like[0]}, and must have that of the first, {first}: list {like[0]} first "
            f"among the channels, with --channel-grids resample for the others, or resample the label onto {first}"
        )
    why = "" if first == scan.names[0] else f"the case lacks {scan.names[0]}, so {first} is its first channel, and "
    return (
        f"{why}--channel-grids is for channels among themselves: resample that image onto the grid of the label, or "
        "the label onto that of the image"
    )


def check_cases(
    cases: Sequence[Case],
    cohort: Cohort,
    asked: Mapping[int, str],
    *,
    each_present: bool = True,
    complete: bool = True,
    watch: Callable[[Sequence[Case]], Iterable[Case]] = iter,
) -> None:
    """Refuse cases that cannot be trained on or evaluated.

    Where masks of organs overlap, one line is logged.

    Args:
        cases: the cases to be used, among those of `cohort`.
        cohort: says which label values are known.
        asked: labels that are to be segmented.
        each_present: whether each of them must be in at least one case, as training needs.
        complete: whether a scan must have all its channels.
        watch: passes the cases on while they are read, to show progress.

    Raises:
        SegraftError: what `load_case` refuses; a missing channel; a label value that the cohort does not list; an asked
            label that is in none of the cases, or whose masks lie in those of other asked labels by more than half.
    """
    known = {0, *cohort.values}
    labels = Labels.of(asked)
    covered = {value: _name_of(value, cohort, labels) for value in labels.values_covered}
    present: set[int] = set()
    overlaps: dict[str, Overlap] = {}
    for case in watch(cases):
        scan, label, overlaps[case.id] = _load(case, asked)
        if complete:
            require_channels(scan)
        values = {int(value) for value in np.unique(np.asanyarray(label.dataobj))}
        if unknown := sorted(values - known):
            raise SegraftError(
                f"the label {case.label} holds the value {unknown[0]}, which {cohort.path} does not list: "
                "add it to a dataset.json there, or correct the label."
            )
        present |= values
    _check_overlaps(overlaps, covered, cohort.path)
    for number, name in labels.items():
        if each_present and not present.intersection(labels.covers(number)):
            raise SegraftError(
                f"label {number} ({name}) is in none of the {len(cases)} training cases of {cohort.path}: "
                "choose other cases or another label."
            )


def _name_of(value: int, cohort: Cohort, labels: Labels) -> str:
    """What a label value that is covered is called."""
    return str((cohort.labels if labels.regions else labels).get(value, value))


def _check_overlaps(overlaps: Mapping[str, Overlap], asked: Mapping[int, str], path: Path) -> None:
    """Log that masks of the cases (by id) share voxels; refuse a label that lies in the others."""
    claimed, taken = Counter[int](), Counter[tuple[int, int]]()
    for each in overlaps.values():
        claimed.update(each.claimed)
        taken.update(each.taken)
    for number, name in asked.items():
        lost = {other: count for (label, other), count in taken.items() if label == number}
        if sum(lost.values()) > _LARGEST_LOSS * claimed[number]:
            most = max(lost, key=lost.__getitem__)
            raise SegraftError(
                f"of the {claimed[number]} voxels that {name} has in {path}, {sum(lost.values())} lie in smaller masks "
                f"that are asked for too ({lost[most]} in {asked[most]}), and a voxel has one label: ask for {name} "
                "without them, or for them without it."
            )
    overlapping = {case: each for case, each in overlaps.items() if each.shared}
    if overlapping:
        worst = max(overlapping, key=lambda case: overlapping[case].shared)
        names = " and ".join(asked[number] for number in max(taken, key=taken.__getitem__))
        _log.warning(
            "%s: masks of the labels overlap in %d of %d cases (most in %s, by %d voxels; of all labels most those of "
            "%s); such a voxel counts for the smallest mask",
            *(path, len(overlapping), len(overlaps), worst, overlapping[worst].shared, names),
        )
