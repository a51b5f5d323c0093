"""From label maps to numbers per case, and from those to tables for people and files for programs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pydantic_core import to_json

from segraft.atomic import replacing
from segraft.errors import SegraftError
from segraft.evaluation.metrics import Mask, dice, hausdorff95_mm, spacing_of, strata, stratum, volume_ml

LabelMap = NDArray[np.integer[Any]]

OVERALL = "all"
"""The name of the row over all labels in `summary`; no label may carry it."""

MISSING = "–"
"""What stands where there is no number, such as the SD of a single case."""

_TITLES = {
    "case": "Case", "label": "Label", "name": "Structure", "n": "n", "dice": "Dice",
    "hausdorff95_mm": "HD95 (mm)", "volume_ml": "Predicted (mL)", "truth_ml": "Annotated (mL)",
    "stratum_ml": "Annotated (mL)",
}  # fmt: skip
_DIGITS = {"dice": 3, "hausdorff95_mm": 2}


@dataclass(frozen=True)
class CaseResult:
    """How one label of one case was predicted.

    Attributes:
        case: the case's id.
        label: the label's value in the masks.
        name: the label's name.
        dice: 0 to 1; see `segraft.evaluation.metrics` for empty masks.
        hausdorff95_mm: symmetric 95 % Hausdorff distance in mm.
        volume_ml: predicted volume in mL.
        truth_ml: annotated volume in mL.
    """

    case: str
    label: int
    name: str
    dice: float
    hausdorff95_mm: float
    volume_ml: float
    truth_ml: float


@dataclass(frozen=True)
class CaseVolumes:
    """All labels of one case together, where they may overlap: what several share counts once.

    Attributes:
        case: the case's id.
        volume_ml: predicted volume in mL.
        truth_ml: annotated volume in mL.
    """

    case: str
    volume_ml: float
    truth_ml: float


def evaluate_case(
    case_id: str, prediction: LabelMap, truth: LabelMap, labels: Mapping[int, str], affine: ArrayLike
) -> list[CaseResult]:
    """Measure every label of one case, in the order of `labels`.

    Args:
        case_id: what the case is called in tables and messages.
        prediction: label map `[X, Y, Z]`; 0 is the background.
        truth: label map of the same shape, on the same grid.
        labels: label value → name. Values in the maps that are not listed here are not measured.
        affine: 4×4, voxel → world in mm; only the voxel spacing is read from it.

    Raises:
        SegraftError: the maps differ in shape, are not `[X, Y, Z]` or hold values that are no labels; the
            affine has no voxel spacing; or `labels` is empty, names two labels alike or one "all", or lists 0.
    """
    _check_labels(labels)
    if prediction.ndim != 3 or prediction.shape != truth.shape:
        raise SegraftError(
            f"{case_id}: the prediction {prediction.shape} and the truth {truth.shape} must be [X, Y, Z] "
            "on one grid: resample one to the other."
        )
    for what, mask in (("prediction", prediction), ("truth", truth)):
        if mask.dtype.kind not in "iub" and not np.array_equal(mask, np.rint(mask)):
            raise SegraftError(
                f"{case_id}: the {what} holds values that are no whole numbers: give a label map, not probabilities."
            )
    planes = (lambda label: np.asarray(prediction == label)), (lambda label: np.asarray(truth == label))
    return evaluate_planes(case_id, *planes, labels, affine)


def evaluate_planes(
    case_id: str,
    predicted: Callable[[int], Mask],
    annotated: Callable[[int], Mask],
    labels: Mapping[int, str],
    affine: ArrayLike,
) -> list[CaseResult]:
    """As `evaluate_case`, of labels that may overlap.

    Args:
        case_id: what the case is called in tables and messages.
        predicted: label value → where it was found, `[X, Y, Z]`.
        annotated: label value → where it is, on the same grid.
        labels: label value → name.
        affine: 4×4, voxel → world in mm; only the voxel spacing is read from it.

    Raises:
        SegraftError: masks of different shapes; or as `evaluate_case`.
    """
    _check_labels(labels)
    spacing = spacing_of(affine)

    def measured(label: int, name: str) -> CaseResult:
        ours, theirs = predicted(label), annotated(label)
        return CaseResult(
            case=case_id,
            label=label,
            name=name,
            dice=dice(ours, theirs),
            hausdorff95_mm=hausdorff95_mm(ours, theirs, spacing),
            volume_ml=volume_ml(ours, spacing),
            truth_ml=volume_ml(theirs, spacing),
        )

    return [measured(label, name) for label, name in labels.items()]


def table(results: Iterable[CaseResult]) -> pd.DataFrame:
    """Return one row per case and label; the columns are `CaseResult`'s attributes."""
    return pd.DataFrame([asdict(result) for result in results], columns=[field.name for field in fields(CaseResult)])


def summary(results: Iterable[CaseResult]) -> pd.DataFrame:
    """Return one row per label name, in the order of the label values, and a last row "all".

    "all" is the mean over the (case, label) rows, each counting once, and not a mean of means: a label that
    was measured in fewer cases weighs less.

    Columns: `n` (rows), `dice_mean`, `dice_sd`, `hausdorff95_mm_mean`, `hausdorff95_mm_sd`. The SD is the
    sample's (n - 1 in the denominator) and NaN for a single case. `readable` turns the frame into text.

    Raises:
        SegraftError: there are no results.
    """
    frame = _some(results).sort_values("label", kind="stable")
    overall = frame.assign(name=OVERALL)
    return pd.concat([_statistics(part, "name", "dice", "hausdorff95_mm") for part in (frame, overall)]).rename_axis(
        "label"
    )


def by_stratum(results: Iterable[CaseResult]) -> pd.DataFrame:
    """Return Dice by annotated volume: one row per stratum of `segraft.data.strata.STRATA_ML`, empty ones included.

    "none" (nothing annotated) and ">300" have a row only if there are such cases. Index: `stratum_ml`;
    columns: `n` ((case, label) rows), `dice_mean`, `dice_sd` (n - 1 in the denominator; NaN for a single case).

    Raises:
        SegraftError: there are no results.
    """
    frame = _some(results)
    frame["stratum_ml"] = [stratum(volume) for volume in frame["truth_ml"]]
    first, *inner, last = strata()
    present = set(frame["stratum_ml"])
    rows = [*({first} & present), *inner, *({last} & present)]
    return _statistics(frame, "stratum_ml", "dice").reindex(rows).fillna({"n": 0}).astype({"n": int})


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """Return "mean (SD)" as papers print it, such as "0.572 (0.17)".

    Args:
        values: the sample. Of one value the SD is "–"; of none, all is.
        digits: decimals of the mean. The SD gets one less, but at least one if the mean has any.
    """
    sample = np.asarray(values, dtype=np.float64)
    if not sample.size:
        return MISSING
    return _mean_sd(float(sample.mean()), float(sample.std(ddof=1)) if sample.size > 1 else np.nan, digits)


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame of this module for people: titled columns with units, each mean and SD in one column.

    The row names become the first column. The frame given is not changed.
    """
    shown = frame.reset_index() if frame.index.name else frame.copy()
    for name, digits in _DIGITS.items():
        if f"{name}_mean" in shown:
            means, deviations = shown.pop(f"{name}_mean"), shown.pop(f"{name}_sd")
            pairs = zip(means, deviations, strict=True)
            shown[f"{name}_mean"] = [_mean_sd(mean, deviation, digits) for mean, deviation in pairs]
    titles = {f"{name}_mean": f"{_TITLES[name]}, mean (SD)" for name in _DIGITS}
    return shown.rename(columns=_TITLES | titles)


def save_results(
    results: Iterable[CaseResult],
    folder: Path,
    *,
    together: Sequence[CaseVolumes] = (),
    record: Mapping[str, object] = MappingProxyType({}),
) -> tuple[Path, Path]:
    """Write `evaluation.csv` (one row per case and label) and `evaluation.json` into a folder, which is made.

    The JSON holds `cases` (the rows of the CSV), `summary` and `by_stratum` (row name → columns), `together`, where
    labels may overlap, and `record`. It is strict JSON: a number that does not exist, such as the SD of one case, is
    null. Paths and dates are text, NumPy values and data classes their plain counterparts.

    Args:
        results: of `evaluate_case`, for all cases.
        folder: where to write.
        together: the volumes of all labels of each case, where they may overlap; else their sum is that.
        record: what else belongs to these numbers: which model, which data, which settings.

    Returns:
        The paths of the CSV and of the JSON file.

    Raises:
        SegraftError: there are no results, or the folder cannot be written to.
    """
    results = list(results)
    content = {
        "cases": [asdict(result) for result in results],
        "summary": summary(results).to_dict(orient="index"),
        "by_stratum": by_stratum(results).to_dict(orient="index"),
        **({"together": [asdict(case) for case in together]} if together else {}),
        "record": dict(record),
    }
    text = to_json(content, indent=2, inf_nan_mode="null", fallback=_from_numpy)
    csv, json = folder / "evaluation.csv", folder / "evaluation.json"
    with replacing(csv) as aside_csv, replacing(json) as aside_json:
        table(results).to_csv(aside_csv, index=False, lineterminator="\n")
        aside_json.write_bytes(text + b"\n")
    return csv, json


def _check_labels(labels: Mapping[int, str]) -> None:
    if not labels:
        raise SegraftError("No labels were asked for: list at least one label value and its name.")
    if 0 in labels:
        raise SegraftError(f'Label 0 ("{labels[0]}") is the background and is not measured: leave it out.')
    names = list(labels.values())
    if len(set(names)) < len(names) or OVERALL in names:
        raise SegraftError(f'The label names {names} must differ, and none may be "{OVERALL}": rename them.')


def _some(results: Iterable[CaseResult]) -> pd.DataFrame:
    frame = table(results)
    if frame.empty:
        raise SegraftError("There are no results to summarise: evaluate at least one case.")
    return frame


def _statistics(frame: pd.DataFrame, key: str, *columns: str) -> pd.DataFrame:
    groups = frame.groupby(key, sort=False)
    parts: dict[str, pd.Series[Any]] = {"n": groups.size()}
    for column in columns:
        parts[f"{column}_mean"] = groups[column].mean()
        parts[f"{column}_sd"] = groups[column].std(ddof=1)
    return pd.DataFrame(parts)


def _mean_sd(mean: float, deviation: float, digits: int) -> str:
    if np.isnan(mean):
        return MISSING
    fewer = max(digits - 1, min(digits, 1))
    return f"{mean:.{digits}f} ({MISSING if np.isnan(deviation) else f'{deviation:.{fewer}f}'})"


def _from_numpy(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON.")
