"""What preparation does to a scan, as a picture of every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from nibabel.affines import apply_affine, voxel_sizes
from numpy.typing import NDArray

from segraft.atomic import replacing
from segraft.data.checks import load_case
from segraft.data.cohort import Case, Cohort
from segraft.data.head import Grid, level_head
from segraft.data.preparation import Intensity, Preparation, Window, prepare_scan
from segraft.errors import SegraftError
from segraft.evaluation.figures import COLOURS, DPI
from segraft.evaluation.view import displayed_range
from segraft.jobs.intensities import by_channel
from segraft.jobs.preparing import checked

_PANEL_IN, _GAP_IN, _EDGE_IN, _TITLE_IN, _HEAD_IN, _BAR_MM = 2.9, 0.12, 0.2, 0.55, 0.55, 50.0
_INK, _FAINT = "#1c1f23", "#5b636d"


@dataclass(frozen=True)
class Step:
    """A scan after one step of its preparation, on axes to the right, the front and up.

    Attributes:
        name: what was done.
        image: intensities [X, Y, Z].
        label: its label on the same grid.
        unit: "as stored", "HU" of a head CT, "0…1" after scaling.
        shown: the intensities that are drawn black and white.
    """

    name: str
    image: nib.Nifti1Image
    label: nib.Nifti1Image
    unit: str
    shown: tuple[float, float]

    @property
    def voxel_mm(self) -> tuple[float, ...]:
        """The edges of its voxels in mm."""
        return tuple(round(float(mm), 6) for mm in voxel_sizes(self.image.affine))

    @property
    def size(self) -> str:
        """Voxels along each axis, and their edges in mm."""
        voxels = " × ".join(str(size) for size in self.image.shape)
        return f"{voxels} voxels of {' × '.join(f'{mm:.3g}' for mm in self.voxel_mm)} mm"


@dataclass(frozen=True)
class PreparationView:
    """The picture, the case it shows, its steps, and by how many degrees a head was turned (None if it is none)."""

    path: Path
    case: str
    steps: list[Step]
    yaw: float | None = None
    roll: float | None = None
    neck_slices: int | None = None


def show_preparation(
    data: str | Path,
    out: str | Path,
    *,
    case: str | None = None,
    labels: Sequence[str] = (),
    preparation: Preparation | Mapping[str, Any] | None = None,
    patient_pattern: str | None = None,
) -> PreparationView:
    """Draw every step of a case's preparation: axial above, coronal below, both in mm, with the label's outline.

    Of several channels, each as it was read, then each as it is prepared.

    Args:
        data: `dataset.json`, or its folder.
        out: the picture, a `.png` file.
        case: its id; the first one if left out.
        labels: those to outline, by number or name; none means all, which of a folder of masks is many files.
        preparation: whole, or the fields that differ from the defaults.
        patient_pattern: as of `Cohort.read`.

    Raises:
        SegraftError: another file ending, no such case, a case without a label, or a scan that cannot be prepared.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise SegraftError(f"{out} cannot be a picture: let its name end in .png.")
    cohort = Cohort.read(data, patient_pattern=patient_pattern)
    chosen = _chosen(cohort, case)
    preparation = by_channel(preparation, None, cohort.channels, str(cohort.path))
    settled = preparation if isinstance(preparation, Preparation) else checked(dict(preparation or {}))
    asked = cohort.select_labels(labels)
    scan, label = load_case(chosen, asked)
    if asked.regions:
        painted = asked.map_of(np.asanyarray(label.dataobj)).astype(np.int32)
        label = nib.Nifti1Image(painted, label.affine)
    there = [place for place, channel in enumerate(scan.channels) if channel is not None]
    prefix = {place: f"{scan.names[place]}: " if len(scan.channels) > 1 else "" for place in there}
    ready = prepare_scan(scan, settled)
    intensities = settled.intensities(len(scan.channels))
    ranges = {place: _displayed(scan.channels[place], intensities[place]) for place in there}
    steps = [
        _step(f"{prefix[place]}as read", scan.channels[place], label, "as stored", ranges[place]) for place in there
    ]
    view = PreparationView(out, chosen.id, steps)
    note = "Outlined: the labels."
    if scan.missing:
        note = f"Missing: {', '.join(scan.missing)}. {note}"
    if settled.head:
        levelling = level_head(scan.first)
        for name, grid in (("levelled", levelling.turned), ("neck removed, cropped or padded", levelling.grid)):
            steps.append(_step(name, grid.sample(scan.first), label, "HU", ranges[0]))
        view = replace(view, yaw=levelling.yaw, roll=levelling.roll, neck_slices=levelling.neck_slices)
        note = (
            f"The head had turned by {levelling.yaw:.1f}° (yaw) and leaned by {levelling.roll:.1f}° (roll); "
            f"{levelling.neck_slices} slices of neck removed. {note}"
        )
    affine = np.asarray(ready.affine, dtype=np.float64)
    for place in there:
        final = nib.Nifti1Image(ready.as_tensor()[place].numpy(), affine)
        unit, shown = _SCALED.get(intensities[place].kind, ("0…1", (0.0, 1.0)))
        steps.append(_step(f"{prefix[place]}scaled", final, label, unit, shown))
    with replacing(out) as aside:
        figure = _draw(steps, f"{chosen.id}: preparation", note)
        figure.savefig(aside, format="png", metadata={"Software": None})
    return view


_SCALED = {"z_score": ("standard deviations", (-3.0, 3.0))}
"""Unit and displayed range of what an intensity setting makes, where it is not 0…1."""


def _displayed(channel: nib.Nifti1Image, intensity: Intensity) -> tuple[float, float]:
    window = (intensity.low, intensity.high) if isinstance(intensity, Window) else None
    return displayed_range(channel.get_fdata(dtype=np.float32), window)


def _chosen(cohort: Cohort, case: str | None) -> Case:
    if case is None:
        return cohort.cases[0]
    for each in cohort.cases:
        if each.id == case:
            return each
    known = ", ".join(each.id for each in cohort.cases[:5])
    raise SegraftError(f'{cohort.path} has no case "{case}": choose one such as {known}.')


def _step(name: str, image: nib.Nifti1Image, label: nib.Nifti1Image, unit: str, shown: tuple[float, float]) -> Step:
    upright = nib.as_closest_canonical(image)
    moved = Grid(upright.shape, upright.affine).sample(label, mode="nearest").get_fdata(dtype=np.float32)
    values = np.rint(np.maximum(moved, 0)).astype(np.int32)  # outside of its grid it is as low as air
    return Step(name, upright, nib.Nifti1Image(values, upright.affine), unit, shown)


def _draw(steps: Sequence[Step], title: str, note: str) -> Figure:
    """One column per step, an axial slice above a coronal one, each panel the whole grid with a bar of 50 mm."""
    place = _middle_of_label(steps[0])
    sizes = [np.array(step.image.shape) * voxel_sizes(step.image.affine) for step in steps]
    heights = [max(_PANEL_IN * size[axis] / size[0] for size in sizes) for axis in (1, 2)]
    width = 2 * _EDGE_IN + len(steps) * _PANEL_IN + (len(steps) - 1) * _GAP_IN
    height = _EDGE_IN + _HEAD_IN + _TITLE_IN + sum(heights) + _GAP_IN + _EDGE_IN
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    left = _EDGE_IN / width
    figure.text(left, 1 - _EDGE_IN / height, title, va="top", fontsize=12, weight="bold", color=_INK, parse_math=False)
    figure.text(left, 1 - (_EDGE_IN + 0.26) / height, note, va="top", fontsize=8.5, color=_FAINT, parse_math=False)
    for column, (step, size) in enumerate(zip(steps, sizes, strict=True)):
        x = _EDGE_IN + column * (_PANEL_IN + _GAP_IN)
        voxel = np.rint(apply_affine(np.linalg.inv(step.image.affine), place)).astype(int)
        at = [int(each) for each in np.clip(voxel, 0, np.array(step.image.shape) - 1)]
        text = f"{step.name}\n{step.size}\n{step.unit}, black {step.shown[0]:.4g}, white {step.shown[1]:.4g}"
        top = 1 - (_EDGE_IN + _HEAD_IN) / height
        figure.text(x / width, top, text, va="top", fontsize=7.5, color=_INK, linespacing=1.35, parse_math=False)
        above = _EDGE_IN + _HEAD_IN + _TITLE_IN
        for axis, tall in zip((1, 2), heights, strict=True):
            box = (x / width, 1 - (above + tall) / height, _PANEL_IN / width, tall / height)
            _panel(figure.add_axes(box), step, size, axis, at)
            above += tall + _GAP_IN
    return figure


def _panel(ax: Axes, step: Step, size: NDArray[np.float64], axis: int, at: Sequence[int]) -> None:
    """The plane of X and `axis` through voxel `at`, the patient's right on the left."""
    cut = 3 - axis

    def plane(image: nib.Nifti1Image) -> NDArray[Any]:
        turned: NDArray[Any] = np.take(np.asanyarray(image.dataobj), at[cut], axis=cut)[::-1].T
        return turned

    wide, tall = float(size[0]), float(size[axis])
    pixels, labels = plane(step.image), np.pad(plane(step.label), 1)
    ax.imshow(pixels, cmap="gray", vmin=step.shown[0], vmax=step.shown[1], origin="lower", extent=(0, wide, 0, tall))
    columns, rows = (
        (np.arange(count) - 0.5) * edge
        for count, edge in zip(labels.shape[::-1], (wide / pixels.shape[1], tall / pixels.shape[0]), strict=True)
    )
    for value in np.unique(labels[labels > 0]):
        colour = COLOURS[(int(value) - 1) % len(COLOURS)]
        ax.contour(columns, rows, labels == value, levels=[0.5], colors=colour, linewidths=0.9)
    ax.plot([0.04 * wide, 0.04 * wide + _BAR_MM], [0.04 * tall] * 2, color="white", linewidth=2, solid_capstyle="butt")
    marks = [(0.03, 0.96, "R", "left", "top"), (0.97, 0.96, "L", "right", "top")]
    if axis == 1:
        marks.append((0.04, 0.06, f"{_BAR_MM:.0f} mm", "left", "bottom"))
    for x, y, text, across, up in marks:
        mark = ax.text(x, y, text, transform=ax.transAxes, ha=across, va=up, color="white", fontsize=7.5)
        mark.set_path_effects([withStroke(linewidth=1.5, foreground="black")])
    ax.set(xlim=(0, wide), ylim=(0, tall), aspect="equal", anchor="N")
    ax.set_axis_off()


def _middle_of_label(step: Step) -> NDArray[np.float64]:
    """Where the label's fullest slice has its middle, RAS+ mm; the scan's middle without a label."""
    marked = np.asanyarray(step.label.dataobj) > 0
    middle = (np.array(step.image.shape) - 1) / 2
    if marked.any():
        z = int(marked.sum(axis=(0, 1)).argmax())
        middle = np.array([*np.argwhere(marked[:, :, z]).mean(axis=0), z])
    return np.asarray(apply_affine(step.image.affine, middle))
