"""The whole job on synthetic heads: a base learns traumatic haematomas, adapters learn subarachnoid blood."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console

from segraft.adapters import AdapterSpec
from segraft.data.checks import load_case
from segraft.data.cohort import Case, Cohort
from segraft.data.phantom import write_cohort
from segraft.errors import SegraftError
from segraft.evaluation.figures import comparison_figure, dice_figure
from segraft.evaluation.metrics import spacing_of
from segraft.evaluation.report import write_report
from segraft.evaluation.results import CaseResult, by_stratum, mean_sd, readable, save_results
from segraft.jobs.adapting import adapt
from segraft.jobs.evaluating import measure
from segraft.jobs.model import Model, load_model
from segraft.jobs.predicting import predict
from segraft.jobs.pretraining import pretrain
from segraft.jobs.run_folder import versions
from segraft.jobs.watching import watched
from segraft.training.settings import check_settings
from segraft.training.strategies import selectors

ADAPTATIONS = {
    "no adaptation": None,
    "decoder": AdapterSpec("none", train=selectors(["decoder"])),
    "dora_c": AdapterSpec("dora_c", rank=8),
}
SOURCE, SHOTS, TESTS = 24, 8, 16
PRETRAINING_EPOCHS, ADAPTING_EPOCHS = 40, 60
WIDTHS = (16, 32, 64, 128)
WINDOW_HU = (0.0, 90.0)
Mask = NDArray[np.int64]
STAND_IN = "All heads are synthetic phantoms, not patients: the numbers show that the software works, and nothing more."


@dataclass(frozen=True)
class Demo:
    """Result of `demo`: the table, and where the report is."""

    title: str
    table: pd.DataFrame
    report: Path


@dataclass(frozen=True)
class _Row:
    name: str
    model: Model
    results: list[CaseResult]
    trained: int
    size: int
    seconds: float


def demo(
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32",
    console: Console | None = None,
) -> Demo:
    """Make two phantom cohorts, pre-train on one, adapt to the other in three ways, test, and write a report.

    Args:
        out: folder to write to; what an earlier demo left there is replaced.
        seed: of everything.
        device: `auto`, `cpu`, `cuda`, `mps`.
        precision: `32`, `bf16`, `16`.
        console: for progress; None is silent.
    """
    out = Path(out)
    if (out / "base").exists() and not (out / "traumatic").exists():
        raise SegraftError(f"{out / 'base'} exists and is not of an earlier demo: choose another --out.")
    say: Callable[[str], None] = (lambda _: None) if console is None else console.print
    bars = console if console is not None and console.is_terminal else None
    say(f"1/4 drawing {SOURCE} heads with traumatic and {SHOTS + TESTS} with subarachnoid blood")
    source = write_cohort(out / "traumatic", task="traumatic", patients=SOURCE, seed=seed)
    target = write_cohort(out / "subarachnoid", task="subarachnoid", patients=SHOTS + TESTS, seed=seed)

    common = {
        "seed": seed,
        "device": device,
        "precision": precision,
        "patches": 4,
        "foreground": 0.25,
        "learning_rate": 5e-3,
    }
    say("2/4 pre-training a U-Net on traumatic haematomas")
    pretrain(
        source,
        out / "base",
        network="unet",
        network_arguments={"widths": list(WIDTHS), "norm": "instance"},
        preparation={"patch": (96, 96, 1), "intensity": {"kind": "window", "low": WINDOW_HU[0], "high": WINDOW_HU[1]}},
        settings=check_settings(epochs=PRETRAINING_EPOCHS, volumes=4, **common),
        overwrite=True,
        console=bars,
    )

    say(f"3/4 adapting it to subarachnoid blood from {SHOTS} heads, testing on {TESTS} others")
    cohort = Cohort.read(target)
    rows, served = [], set[str]()
    for name, spec in ADAPTATIONS.items():
        trained, size, seconds, path = 0, 0, 0.0, out / "base"
        if spec is not None:
            result = adapt(
                out / "base",
                target,
                out / name,
                spec=spec,
                shots=SHOTS,
                settings=check_settings(epochs=ADAPTING_EPOCHS, volumes=2, **common),
                overwrite=True,
                console=bars,
            )
            served.update(result.cases)
            trained, size, seconds = result.parameters.trainable, result.bytes, result.training.seconds
            path = result.path
        rows.append(_Row(name, load_model(path), [], trained, size, seconds))
    tests = [case for case in cohort.cases if case.id not in served]
    masks: dict[str, dict[str, Mask]] = {case.id: {} for case in tests}
    for row in rows:
        for case in watched("testing", bars)(tests):
            found = row.model.segment(case, device=device, precision=precision)
            row.results.extend(measure(case, found, row.model.labels).labels)
            masks[case.id][row.name] = found.mask
        save_results(row.results, out / row.name.replace(" ", "_"), record={"note": STAND_IN})
    predict(out / "dora_c", [case.image for case in tests], out / "masks", device=device, precision=precision)

    say("4/4 writing the report")
    table = _table(rows)
    report = write_report(
        out / "report.html",
        title="Segraft demo: from traumatic to subarachnoid blood",
        lead=f"A U-Net pre-trained on {SOURCE} synthetic heads with traumatic haematomas, adapted to subarachnoid "
        f"blood from {SHOTS} heads, tested on {TESTS} others.",
        notes=[
            STAND_IN,
            "Dice and distances are measured on the scans' own grids.",
        ],
        tables=[
            ("Adaptations", table),
            ("Dice by annotated volume, mean (SD)", _strata(rows)),
        ],
        figures=[
            ("Dice of the test heads", dice_figure({row.name: [r.dice for r in row.results] for row in rows})),
            *((f"Test head {case.id}", _picture(case, masks[case.id], cohort.labels)) for case in tests[:4]),
        ],
        details={"seed": seed, "network": f"unet, widths {WIDTHS}, instance norm", "rank": 8, **versions()},
    )
    return Demo("Synthetic test heads (phantoms, not patients)", table, report)


def _table(rows: list[_Row]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "Adaptation": row.name,
            "Dice, mean (SD)": mean_sd([r.dice for r in row.results]),
            "HD95 (mm), mean (SD)": mean_sd([r.hausdorff95_mm for r in row.results], digits=1),
            "Trained parameters": f"{row.trained:,}",
            "File (kB)": f"{row.size / 1000:,.0f}",
            "Training (s)": f"{row.seconds:.0f}",
        }
        for row in rows
    )


def _strata(rows: list[_Row]) -> pd.DataFrame:
    """A row per volume stratum, a column per adaptation."""
    frames = {row.name: readable(by_stratum(row.results)) for row in rows}
    first = next(iter(frames.values()))
    return pd.concat([first.iloc[:, :2], *(frame.iloc[:, 2].rename(name) for name, frame in frames.items())], axis=1)


def _picture(case: Case, masks: Mapping[str, Mask], labels: Mapping[int, str]) -> bytes:
    """Image, truth and every prediction, all turned to RAS."""
    scan, label = load_case(case, labels)
    upright = nib.as_closest_canonical(scan.first)

    def turned(mask: NDArray[Any]) -> NDArray[Any]:
        image = nib.Nifti1Image(mask.astype(np.int16), scan.first.affine)
        return np.asanyarray(nib.as_closest_canonical(image).dataobj)

    return comparison_figure(
        upright.get_fdata(dtype=np.float32),
        turned(np.asanyarray(label.dataobj)),
        {name: turned(mask) for name, mask in masks.items()},
        window=WINDOW_HU,
        spacing_mm=spacing_of(upright.affine),
        title=case.id,
        labels=labels,
    )
