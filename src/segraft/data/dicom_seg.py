"""Labels that are a DICOM SEG: its segments as a mask of label values on the grid of the scan."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from segraft.data.dicom_codes import is_known
from segraft.data.dicom_files import SEG_SUFFIX, dicom_files, is_dicom
from segraft.data.dicom_frames import DAMAGED, frame_voxels, require_all_frames
from segraft.data.dicom_slices import SEG_CLASSES
from segraft.data.dicom_tools import load_highdicom, load_pydicom, log_once, warnings_logged
from segraft.data.labels import Labels
from segraft.data.overlapping import joined
from segraft.errors import SegraftError
from segraft.structures import same_name, says_nothing

if TYPE_CHECKING:
    from pydicom import Dataset


def is_segmentation(label: Path) -> bool:
    """Whether a label is meant as DICOM: a folder, or a file that is named `.dcm` or begins as DICOM files do."""
    return label.is_dir() or label.suffix.lower() == SEG_SUFFIX or (label.is_file() and is_dicom(label))


def segmentation_file(label: Path) -> Path:
    """The file itself, of a folder the one DICOM file in it.

    Raises:
        SegraftError: a folder that holds none, or several.
    """
    if not label.is_dir():
        return label
    files = dicom_files(label)
    if len(files) != 1:
        raise SegraftError(f"the label {label} is a folder of {len(files)} DICOM files: name the one DICOM SEG.")
    return files[0]


def segments_digest(file: Path, known: Labels) -> str:
    """The SHA-256 of a DICOM SEG and of the labels that its segments are mapped to.

    Raises:
        SegraftError: the file cannot be read.
    """
    try:
        content = hashlib.sha256(file.read_bytes())
    except OSError as error:
        raise SegraftError(f"the label {file} cannot be read ({error.strerror}): add it.") from error
    content.update(repr([(value, name, known.covers(value)) for value, name in sorted(known.items())]).encode())
    return content.hexdigest()


def read_segments(
    path: Path, known: Labels, asked: Collection[int] | None, image: nib.Nifti1Image, scan: Path
) -> nib.Nifti1Image:
    """Read a DICOM SEG as a mask of label values.

    A segment is the label of its name (Segment Label; `same_name` says which are the same). Where no segment has the
    name of a label, its number is the label's value, which is logged, if its name says nothing ("Segment 1", a colour)
    or neither of the two is a known structure. Several segments of one name are one label; of labels, no two may be.

    A frame lies where its position and orientation say; frames that are not there are empty. Nothing is resampled.

    A voxel may be in several segments if regions are known that cover one value: it is the value that just these
    regions cover. Of labels that exclude each other only those asked for are looked at.

    Args:
        path: the file: of type BINARY or LABELMAP, or FRACTIONAL with the two extreme values alone.
        known: the labels of the cohort.
        asked: the labels asked for; None means all.
        image: the scan, for its grid.
        scan: where it is. Of a DICOM series, the segments must refer to it.

    Returns:
        [X, Y, Z] on the grid of `image`.

    Raises:
        SegraftError: highdicom is not installed; the file is damaged, is no SEG, or holds fractions; it refers to
            another series; a frame lies off the voxels of the scan, or a marked voxel outside; segments that are none
            of the labels; labels that are one structure by name; voxels in several segments that no value stands for.
    """
    with warnings_logged(path):
        segmentation = _read(path)
        refers = _require_reference(path, segmentation, scan)
        names = {int(each.SegmentNumber): str(each.get("SegmentLabel") or "") for each in segmentation.SegmentSequence}
        names = {number: name for number, name in names.items() if number > 0}  # 0 is a label map's background
        targets, by_name = _targets(path, names, known)
        voxels = frame_voxels(path, segmentation, image, scan, refers=refers)
    if unknown := sorted(voxels.keys() - names.keys()):
        raise SegraftError(f"the label {path} has frames of a segment {unknown[0]} that it does not list: mend it.")
    parts: dict[int, list[NDArray[np.int64]]] = {}
    for number, target in targets.items():
        if number in voxels:
            parts.setdefault(target, []).append(voxels[number])
    places = {target: np.concatenate(each) for target, each in parts.items()}
    wanted = known if asked is None else Labels.of(asked)
    if not (by_name and known.regions):  # each is a value
        places = {value: where for value, where in places.items() if value in wanted.values_covered}
        known = Labels({value: known.get(value, f"value {value}") for value in places})
    return nib.Nifti1Image(joined(places, known, wanted, image.shape, who=str(path)), image.affine)


def _read(path: Path) -> "Dataset":
    highdicom, pydicom = load_highdicom(), load_pydicom()
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID", "Modality"])
    except FileNotFoundError as error:
        raise SegraftError(f"the label {path} cannot be read ({error.strerror}): correct the path.") from error
    except (pydicom.errors.InvalidDicomError, *DAMAGED) as error:
        raise SegraftError(f"the label {path} is no DICOM file, or a damaged one ({error}): copy it again.") from error
    if header.get("SOPClassUID") not in SEG_CLASSES:
        kind = header.get("Modality") or "an unknown kind"
        raise SegraftError(f"the label {path} is DICOM of {kind}, no SEG: convert it to a DICOM SEG or NIfTI.")
    try:
        dataset = pydicom.dcmread(path)
        if not dataset.SegmentSequence or not dataset.PerFrameFunctionalGroupsSequence:
            raise ValueError("no segments or no frames")
        require_all_frames(path, dataset)
        segmentation: Dataset = highdicom.seg.Segmentation.from_dataset(dataset, copy=False)
    except SegraftError:
        raise
    except DAMAGED as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise SegraftError(
            f"the DICOM SEG {path} is damaged or lacks what the standard asks for ({reason}): export it again."
        ) from error
    return segmentation


def _require_reference(path: Path, segmentation: "Dataset", scan: Path) -> bool:
    """Refuse a SEG of another series than the scan; whether it refers to the scan, which of NIfTI nobody knows."""
    if not scan.is_dir():
        return False
    pydicom = load_pydicom()
    file = dicom_files(scan)[0]
    mine = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["SeriesInstanceUID", "FrameOfReferenceUID"])
    series = {each.get("SeriesInstanceUID") for each in segmentation.get("ReferencedSeriesSequence") or ()}
    if series:
        if mine.get("SeriesInstanceUID") not in series:
            raise SegraftError(
                f"the label {path} refers to the series {', '.join(map(str, sorted(series, key=str)))}, and its image "
                f"{scan} is the series {mine.get('SeriesInstanceUID')}: give the series it was drawn on."
            )
        return True
    frames = {each.get("FrameOfReferenceUID") for each in (mine, segmentation)}
    if len(frames) > 1:
        raise SegraftError(
            f"the label {path} refers to no series, and its FrameOfReferenceUID is not that of its image {scan}: give "
            "the series it was drawn on."
        )
    return False


def _targets(path: Path, names: Mapping[int, str], known: Labels) -> tuple[dict[int, int], bool]:
    """Segment number -> label, and whether by name; else the label is a value in masks."""
    values: dict[str, int] = {}
    for value, name in known.items():
        if (other := values.setdefault(same_name(name), value)) != value:
            raise SegraftError(
                f'the labels {other} "{known[other]}" and {value} "{name}" are one structure, by which the segments of '
                f"{path} are told: make them one label in dataset.json, or name them apart."
            )
    named = {number: values[same_name(name)] for number, name in names.items() if same_name(name) in values}
    told = ", ".join(f"{value} ({name})" for value, name in known.items())
    if len(named) == len(names):
        return named, True
    number, name = next((number, name) for number, name in names.items() if number not in named)
    if named:
        raise SegraftError(
            f'segment {number} ("{name}") of {path} is none of the labels {told}, though others are: add it to '
            "dataset.json, or take it out."
        )
    if not names.keys() <= set(known.values_covered):
        raise SegraftError(
            f'the segments of {path}, such as {number} ("{name}"), are none of the labels {told}, by name or by '
            "number: name them alike in dataset.json."
        )
    for number, name in names.items():
        label = known.get(number, "")
        if not says_nothing(name) and (is_known(name) or is_known(label)):
            raise SegraftError(
                f'segment {number} of {path} is "{name}", and label {number} is "{label}": name them alike in '
                "dataset.json."
            )
    taken = ", ".join(f'segment {number} ("{name}") is {known.get(number, number)}' for number, name in names.items())
    log_once(path, f"no segment has the name of a label, so they go by their numbers: {taken}")
    return {number: number for number in names}, False
