"""Checks of scans and labels before any work starts on them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from segraft.data.cohort import Case, Cohort
from segraft.data.nifti import load_nifti, same_grid
from segraft.data.scans import load_scan
from segraft.errors import SegraftError


def check_image(path: str | Path) -> nib.Nifti1Image:
    """Read a scan (a NIfTI file, or a folder of one DICOM series) and refuse what no network can use.

    Returns:
        The image, its data [X, Y, Z] in memory.

    Raises:
        SegraftError: the scan cannot be read, is not 3D, holds NaN or infinite values, or is constant.
    """
    image = load_scan(path)
    data = np.asanyarray(image.dataobj)
    low, high = data.min(), data.max()  # NaN and infinities come through min and max
    if not (np.isfinite(low) and np.isfinite(high)):
        raise SegraftError(f"the image {path} holds NaN or infinite values: replace them or export it again.")
    if low == high:
        raise SegraftError(f"the image {path} is constant, every voxel is {low:g}: export it again or leave it out.")
    return image


def load_case(case: Case) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Read the image and label of a case.

    Returns:
        Both as images on one grid; the label's values are whole and not negative.

    Raises:
        SegraftError: what `check_image` refuses; no label; a label on another grid, or with values that are
            fractions or negative.
    """
    image = check_image(case.image)
    if case.label is None:
        raise SegraftError(f'the case {case.id} ({case.image}) has no label: add a "label" to its entry.')
    label = load_nifti(case.label, what="label")
    if not same_grid(image, label):
        where = "shapes" if image.shape != label.shape else "positions, of shape"
        raise SegraftError(
            f"the label {case.label} and its image {case.image} lie on different grids ({where} {label.shape} and "
            f"{image.shape}): resample the label onto its image."
        )
    data = np.asanyarray(label.dataobj)
    if data.dtype.kind == "f" and not np.array_equal(data, np.rint(data)):
        raise SegraftError(f"the label {case.label} holds fractions: store whole label numbers.")
    if data.min() < 0:
        raise SegraftError(f"the label {case.label} holds the negative value {data.min():g}: use 0 for background.")
    return image, label


def check_cases(
    cases: Sequence[Case],
    cohort: Cohort,
    asked: Mapping[int, str],
    *,
    each_present: bool = True,
    watch: Callable[[Sequence[Case]], Iterable[Case]] = iter,
) -> None:
    """Refuse cases that cannot be trained on or evaluated.

    Args:
        cases: the cases to be used, among those of `cohort`.
        cohort: says which label values are known.
        asked: label values and names that are to be segmented.
        each_present: whether each of them must be in at least one case, as training needs.
        watch: passes the cases on while they are read, to show progress.

    Raises:
        SegraftError: what `load_case` refuses; a label value that `dataset.json` does not list; an asked label
            that is in none of the cases.
    """
    known = {0, *cohort.labels}
    present: set[int] = set()
    for case in watch(cases):
        _, label = load_case(case)
        values = {int(value) for value in np.unique(np.asanyarray(label.dataobj))}
        if unknown := sorted(values - known):
            raise SegraftError(
                f"the label {case.label} holds the value {unknown[0]}, which {cohort.path} does not list: "
                "add it there or correct the label."
            )
        present |= values
    for number, name in asked.items():
        if each_present and number not in present:
            raise SegraftError(
                f"label {number} ({name}) is in none of the {len(cases)} training cases of {cohort.path}: "
                "choose other cases or another label."
            )
