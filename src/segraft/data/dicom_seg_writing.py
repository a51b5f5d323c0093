"""What was found in a DICOM series as a DICOM SEG (Segmentation Storage) that references the series."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from segraft._version import __version__
from segraft.atomic import replacing
from segraft.data.dicom import read_sources
from segraft.data.dicom_codes import code, structure_of
from segraft.data.dicom_frames import DAMAGED
from segraft.data.dicom_tools import load_highdicom, load_pydicom, warnings_logged
from segraft.errors import SegraftError

if TYPE_CHECKING:
    from pydicom import Dataset

_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID", "FrameOfReferenceUID", "Modality")
_ALIKE = ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName")
_MAY_BE_UNKNOWN = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
_PIXELS = 0x7FE0  # the group of pixel data
_LONGEST_NAME = 64  # characters of an LO, which a segment's label is
_SERIES_NUMBER = 1000  # added to the source's, so that viewers list results behind scans
_COLOURS = (
    *((214, 69, 65), (65, 131, 215), (38, 166, 91), (244, 179, 80), (155, 89, 182), (54, 215, 183)),
    *((232, 126, 4), (108, 122, 137), (219, 10, 91), (135, 211, 124)),
)
"""RGB that viewers are asked to show segments in, in turn."""


@dataclass(frozen=True)
class Found:
    """What was found, on the grid of `read_series`.

    Attributes:
        labels: value -> name, in the order of the segments.
        mask: [columns, rows, slices] of these values, 0 elsewhere.
        regions: value -> where it is [columns, rows, slices], where labels may overlap; else empty.
    """

    labels: Mapping[int, str]
    mask: NDArray[Any]
    regions: Mapping[int, NDArray[np.bool_]]

    def pixels(self) -> NDArray[Any]:
        """[slices, rows, columns] of segment numbers, or [slices, rows, columns, segments] of 0 and 1."""
        if self.regions:
            return np.stack([self.regions[value].T for value in self.labels], axis=-1).astype(np.uint8)
        upright = self.mask.T
        numbers = np.zeros(upright.shape, dtype=np.uint16)
        for number, value in enumerate(self.labels, start=1):
            numbers[upright == value] = number
        return numbers


@dataclass(frozen=True)
class Origin:
    """What found it: the name of the model's file and the SHA-256 of its bytes."""

    model: str
    digest: str

    @classmethod
    def of(cls, file: Path) -> "Origin":
        """That of a model's file."""
        with file.open("rb") as stream:
            return cls(file.name, hashlib.file_digest(stream, "sha256").hexdigest())


def require_writable(folder: Path, labels: Mapping[int, str], origin: Origin) -> None:
    """Refuse what `write_segmentation` would refuse whatever is found in the scan, so that it shows before any work.

    Raises:
        SegraftError: as `write_segmentation`.
    """
    sources = _sources(folder)
    nothing = np.zeros((int(sources[0].Columns), int(sources[0].Rows), 1), dtype=np.uint8)
    with _told(folder, sources):
        _segmentation(sources[:1], Found(labels, nothing, {}), origin, datetime.now().astimezone())


def write_segmentation(found: Found, folder: Path, path: Path, *, origin: Origin, made: datetime | None = None) -> None:
    """Write what was found in a series as one DICOM SEG of type BINARY with a segment per label, also an empty one.

    Frames without a voxel are left out; where nothing was found at all, each segment has all its frames, empty, as an
    image without frames cannot be. Regions that overlap are segments that overlap. Patient and study are the series';
    what of them may be unknown (type 2) and is not there is written empty. UIDs come from the content, the series, the
    model and the time it was made: no two results share one, and the same of all of these give the same file.

    Args:
        found: on the grid of the series.
        folder: of the series.
        path: the file.
        origin: what found it.
        made: when; now if left out.

    Raises:
        SegraftError: highdicom is not installed; the folder is no series that `read_series` reads, or lacks what a SEG
            must have of it; a label's name that a segment cannot have; a path that cannot be written.
    """
    sources = _sources(folder)
    if found.mask.shape != (wanted := (int(sources[0].Columns), int(sources[0].Rows), len(sources))):
        raise SegraftError(f"the mask for {path} has shape {found.mask.shape}, its series {wanted}: they must agree.")
    with _told(folder, sources), replacing(path) as aside:
        segmentation = _segmentation(sources, found, origin, made or datetime.now().astimezone())
        segmentation.save_as(aside, enforce_file_format=True)


@contextmanager
def _told(folder: Path, sources: Sequence["Dataset"]) -> Iterator[None]:
    """Log warnings; what highdicom refuses is an attribute of the series that it cannot pass on.

    Its reasons show values, which may be the patient's, so that they are neither told nor chained.
    """
    with warnings_logged(folder):
        try:
            yield
        except SegraftError:
            raise
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            names = ", ".join(_named(str(error), sources[0])) or f"value ({type(error).__name__})"
            raise SegraftError(
                f"the DICOM series {folder} has a {names} that a DICOM SEG cannot take over: correct it, or "
                "write NIfTI."
            ) from None


def _named(reason: str, source: "Dataset") -> list[str]:
    """The attributes that a reason names, or whose values it shows in quotation marks."""
    from pydicom.datadict import tag_for_keyword

    shown = {first or second for first, second in re.findall(r"'([^']*)'|\"([^\"]*)\"", reason)}
    names = {word for word in re.findall(r"[A-Za-z]{3,}", reason) if tag_for_keyword(word) is not None}
    for tag in source.keys():  # noqa: SIM118 (a data set's elements are read where it is iterated over)
        if tag.group < _PIXELS:
            with suppress(*DAMAGED):
                if str(source[tag].value) in shown:
                    names.add(source[tag].keyword)
    return sorted(names - {""})


def _sources(folder: Path) -> list["Dataset"]:
    """The files that are referenced, in order, with empty values for what may be unknown."""
    load_highdicom()
    with warnings_logged(folder):
        sources = read_sources(folder)
        for each in sources:
            if lacking := [tag for tag in _NEEDED if not each.get(tag)]:
                raise SegraftError(
                    f"the DICOM file {each.filename} has no {', '.join(lacking)}, which a DICOM SEG must name: export "
                    "the series again with all its tags, or write NIfTI."
                )
        _check_alike(sources)
        for each in sources:
            for tag in _MAY_BE_UNKNOWN:
                if tag not in each:
                    setattr(each, tag, None)
            if not each.get("SliceThickness"):
                each.SliceThickness = _apart(sources) or float(each.SpacingBetweenSlices)
            each.ImageOrientationPatient = sources[0].ImageOrientationPatient  # to the last digit, as highdicom asks
    return sources


def _check_alike(sources: Sequence["Dataset"]) -> None:
    """Refuse files of another patient, study or frame of reference than the first, and copies of one instance."""
    first = min(sources, key=lambda each: str(each.filename))
    seen: dict[str, str] = {}
    for each in sources:
        for tag in _ALIKE:
            if str(each.get(tag) or "") != str(first.get(tag) or ""):
                raise SegraftError(
                    f"the DICOM file {each.filename} has another {tag} than {first.filename}, and a DICOM SEG has one: "
                    "keep what belongs together in the folder, or write NIfTI."
                )
        if (other := seen.setdefault(str(each.SOPInstanceUID), str(each.filename))) != str(each.filename):
            raise SegraftError(
                f"the DICOM file {max(other, str(each.filename))} has the SOPInstanceUID of "
                f"{min(other, str(each.filename))}: export the series again, or write NIfTI."
            )


def _segmentation(sources: Sequence["Dataset"], found: Found, origin: Origin, made: datetime) -> "Dataset":
    highdicom, pydicom = load_highdicom(), load_pydicom()
    pixels = found.pixels()
    uids = _uids(sources, found, pixels, origin, made)
    patient, sources[0].PatientName = sources[0].PatientName, None  # highdicom would show unusual names in warnings
    segmentation: Dataset = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=pixels,
        segmentation_type="BINARY",
        segment_descriptions=_descriptions(found.labels, origin),
        series_instance_uid=uids["series"],
        series_number=_series_number(sources[0]),
        sop_instance_uid=uids["instance"],
        instance_number=1,
        manufacturer="Segraft",
        manufacturer_model_name="Segraft",
        software_versions=__version__,
        device_serial_number=origin.digest[:16],
        transfer_syntax_uid=pydicom.uid.ExplicitVRLittleEndian,
        pixel_measures=_measures(sources),
        omit_empty_frames=bool(pixels.any()),
        content_label="SEGMENTATION",
        content_description=f"Segraft {__version__}",
        series_description="Segraft segmentation",
        specific_character_set="ISO_IR 192",
        content_date=made.date(),
        content_time=made.time(),
        series_date=made.date(),
        series_time=made.time(),
    )
    segmentation.PatientName = sources[0].PatientName = patient
    segmentation.InstanceCreationDate, segmentation.InstanceCreationTime = segmentation.ContentDate, made.time()
    segmentation.ContributingEquipmentSequence[-1].ContributionDateTime = made.replace(tzinfo=None)  # highdicom's own
    for each in (*segmentation.DimensionOrganizationSequence, *segmentation.DimensionIndexSequence):
        each.DimensionOrganizationUID = uids["dimensions"]
    return segmentation


def _uids(
    sources: Sequence["Dataset"], found: Found, pixels: NDArray[Any], origin: Origin, made: datetime
) -> dict[str, Any]:
    content = hashlib.sha256(np.ascontiguousarray(pixels).data)
    told = [str(each.SOPInstanceUID) for each in sources], list(found.labels.items()), origin, __version__
    content.update(repr((*told, pixels.shape, made.isoformat())).encode())
    generate = load_pydicom().uid.generate_uid
    return {
        name: generate(entropy_srcs=["segraft", content.hexdigest(), name])
        for name in ("series", "instance", "dimensions")
    }


def _descriptions(labels: Mapping[int, str], origin: Origin) -> list[Any]:
    """One per segment, in order."""
    from pydicom.sr.codedict import codes

    highdicom = load_highdicom()
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="Segraft",
        version=__version__,
        family=codes.cid7162.ArtificialIntelligence,
        parameters={"model": origin.model, "sha256": origin.digest},
    )
    found = []
    for number, (value, name) in enumerate(labels.items(), start=1):
        if len(name) > _LONGEST_NAME or "\\" in name or not name.isprintable():
            raise SegraftError(
                f'the label "{name}" cannot name a segment, which has at most {_LONGEST_NAME} characters and no '
                "backslash: write NIfTI, or train with a shorter name."
            )
        structure = structure_of(name)
        description = highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=code(structure.category),
            segmented_property_type=code(structure.kind),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            anatomic_regions=[code(structure.within)] if structure.within else None,
            display_color=highdicom.color.CIELabColor.from_rgb(*_COLOURS[(number - 1) % len(_COLOURS)]),
        )
        description.SegmentDescription = f"label {value}"
        if structure.side:
            side = highdicom.sr.CodedConcept.from_code(code(structure.side))
            description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [side]
        found.append(description)
    return found


def _apart(sources: Sequence["Dataset"]) -> float | None:
    """The distance between slices (mm) by their positions, whatever the source says of it; None for a single one."""
    first, last = (np.array(each.ImagePositionPatient, dtype=float) for each in (sources[0], sources[-1]))
    return float(np.linalg.norm(last - first)) / (len(sources) - 1) if len(sources) > 1 else None


def _measures(sources: Sequence["Dataset"]) -> Any:
    """Sizes of voxels."""
    return load_highdicom().PixelMeasuresSequence(
        pixel_spacing=[float(mm) for mm in sources[0].PixelSpacing],
        slice_thickness=float(sources[0].SliceThickness),
        spacing_between_slices=_apart(sources),
    )


def _series_number(source: "Dataset") -> int:
    try:
        return _SERIES_NUMBER + max(0, int(source.get("SeriesNumber") or 0))
    except (TypeError, ValueError):
        return _SERIES_NUMBER
