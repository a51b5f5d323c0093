"""Doing one run: training it, from where it was left, and testing it."""

import json
import re
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from segraft.adapters import AdapterSpec
from segraft.data.checks import check_cases
from segraft.data.cohort import Case, Cohort
from segraft.data.labels import Labels
from segraft.data.levelling import kept_in
from segraft.data.nifti import write_mask
from segraft.errors import SegraftError
from segraft.evaluation.results import CaseResult, CaseVolumes, save_results
from segraft.jobs.adapting import adapt
from segraft.jobs.base_source import BaseSource
from segraft.jobs.cases import Served
from segraft.jobs.evaluating import measure
from segraft.jobs.importing import import_base, random_base
from segraft.jobs.locating import ADAPTER_FILE
from segraft.jobs.masked_pretraining import pretrain_masked
from segraft.jobs.model import Model, load_model
from segraft.jobs.preparing import settle_preparation, takes_missing_channels
from segraft.jobs.pretraining import pretrain
from segraft.jobs.run_folder import versions
from segraft.networks.bases import FILE_NAME, read_base
from segraft.networks.trusted import trust_asked
from segraft.studies.run import (
    FAILED,
    FINISHED,
    REQUEST,
    Outcome,
    Run,
    digest_of,
    fail,
    is_finished,
    locked,
    write_json,
)
from segraft.training.mae import check_masked_settings
from segraft.training.module import NonFiniteLossError
from segraft.training.settings import check_settings

MASKS, LEVELLINGS, NOTES, ENCODER = "masks", "levellings", "notes.json", "encoder"
CHECKPOINT = "last.ckpt"
HALF_WRITTEN = re.compile(r"\.[0-9a-f]{12}\.")


def execute(folder: Path) -> Outcome:
    """Do the run of a folder, unless it is finished.

    Never raises for what goes wrong in the run itself: the reason is written to the folder, and the other runs go on.

    Raises:
        SegraftError: the folder is of no run.
    """
    run = Run.read(folder)
    with locked(folder), kept_in(folder.parent.parent / LEVELLINGS):
        if is_finished(folder):
            return Outcome(run.key)
        (folder / FAILED).unlink(missing_ok=True)
        _clear(folder)
        left = next(folder.rglob(CHECKPOINT), None)
        started = time.perf_counter()
        try:
            result = DOING[run.kind](run, folder)
        except Exception as error:  # noqa: BLE001  whatever it is, the other runs must go on
            reason = str(error) if isinstance(error, SegraftError) else f"{type(error).__name__}: {error}"
            if left is not None and not isinstance(error, NonFiniteLossError):
                reason += f" It was to go on from an earlier state: remove {left} to begin anew."
            return Outcome(run.key, time.perf_counter() - started, fail(folder, reason, traceback.format_exc()))
        seconds = time.perf_counter() - started
        for checkpoint in folder.rglob(CHECKPOINT):
            checkpoint.unlink()  # a kill may have come between the result and its removal
        write_json(folder / FINISHED, {**result, "seconds": seconds, "versions": versions()})
        return Outcome(run.key, seconds)


def _clear(folder: Path) -> None:
    """Remove files that were being written when a process was killed (`segraft.atomic`); the lock is held."""
    for path in folder.rglob(".*"):
        if HALF_WRITTEN.match(path.name) and not path.name.endswith(REQUEST):  # which is written without the lock
            path.unlink(missing_ok=True)


def _pretrain(run: Run, folder: Path) -> dict[str, Any]:
    asked = run.identity
    if not (folder / FILE_NAME).is_file():
        pretrain(
            run.data,
            folder,
            network=asked["network"],
            network_arguments=asked["arguments"],
            labels=[value for value, _ in asked["labels"]],
            cases=run.train,
            preparation=asked["preparation"],
            settings=check_settings(**asked["settings"]),
            patient_pattern=run.patient_pattern,
            resume=(folder / CHECKPOINT).is_file(),
        )
    return {"trained": None}


def _masked(run: Run, folder: Path) -> dict[str, Any]:
    asked, made = run.identity, folder / ENCODER
    if not (made / FILE_NAME).is_file():
        pretrain_masked(
            run.data,
            made,
            network=asked["encoder"]["network"],
            network_arguments=asked["encoder"]["arguments"],
            cases=run.train,
            preparation=asked["preparation"],
            settings=check_masked_settings(**asked["settings"]),
            patient_pattern=run.patient_pattern,
            resume=(made / CHECKPOINT).is_file(),
        )
    result = _imported(made / FILE_NAME, run, folder)
    error = read_base(made).record["reconstruction"]
    note = (
        f"its encoder was pre-trained on {len(run.train)} scans without labels: over masked patches of "
        f"{error['scans']} of them, the mean squared error fell from {error['before']:.3f} to {error['after']:.3f}, "
        f"where predicting each patch's mean has {error['zero']:.3f}."
    )
    return {**result, "notes": [note, *result["notes"]], "reconstruction": error}


def _import(run: Run, folder: Path) -> dict[str, Any]:
    if not (folder / NOTES).is_file() and digest_of(Path(run.data)) != run.identity["weights"]:
        raise SegraftError(f"the weights {run.data} have changed since the study was planned: plan it again.")
    return _imported(Path(run.data), run, folder)


def _imported(weights: Path, run: Run, folder: Path) -> dict[str, Any]:
    """Make the base of a run from a file of weights."""
    asked = run.identity
    if not (folder / NOTES).is_file():  # written last
        made = import_base(
            weights,
            folder,
            network=asked["network"],
            network_arguments=asked["arguments"],
            labels=asked["labels"],
            without_head=asked["task"],
            overwrite=True,
        )
        write_json(folder / NOTES, list(made.notes))
    return {"trained": None, "notes": json.loads((folder / NOTES).read_text(encoding="utf-8"))}


def _random(run: Run, folder: Path) -> dict[str, Any]:
    asked = run.identity
    random_base(
        folder,
        network=asked["network"],
        network_arguments=asked["arguments"],
        labels=asked["task"],
        overwrite=True,
    )
    return {"trained": None}


def _adapt(run: Run, folder: Path) -> dict[str, Any]:
    asked, base = run.identity, folder.parent / str(run.base)
    if not is_finished(base):
        raise SegraftError(f"its base, run {run.base}, is not finished: see what went wrong there.")
    trust_asked(str(Run.read(base).identity.get("network", "")))  # as the study names it
    result: dict[str, Any] = {"trained": 0, "bytes": 0, "training": None}
    if run.train:
        model = folder / ADAPTER_FILE
        if not model.is_file():
            adapt(
                base,
                run.data,
                folder,
                spec=AdapterSpec.from_dict(asked["spec"]),
                labels=[value for value, _ in asked["labels"]],
                shots=run.train,
                preparation=asked["preparation"],
                settings=check_settings(**asked["settings"]),
                patient_pattern=run.patient_pattern,
                resume=(folder / CHECKPOINT).is_file(),
            )
        record = load_record(model)
        result = {
            "trained": record["trainable_parameters"],
            "bytes": bytes_of_tensors(model),
            "training": record["training"],
        }
    results, together = _test(run, base, folder)
    save_results(results, folder, together=together, record={"run": run.key, "identity": dict(asked)})
    return result


DOING: dict[str, Callable[[Run, Path], dict[str, Any]]] = {
    "pretrain": _pretrain,
    "masked": _masked,
    "import": _import,
    "random": _random,
    "adapt": _adapt,
}


def bytes_of_tensors(path: Path) -> int:
    """Of a safetensors file, without its header: that holds times, so its length is another in every training."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def load_record(adapter: Path) -> dict[str, Any]:
    """What an adapter file says of its training."""
    from segraft.adapters import read_header

    return dict(read_header(adapter).record)


def _test(run: Run, base: Path, folder: Path) -> tuple[list[CaseResult], list[CaseVolumes]]:
    """Segment the test cases on their own grids, keep the masks, and measure them, each label and all together."""
    cohort = Cohort.read(run.data, patient_pattern=run.patient_pattern)
    cases = {case.id: case for case in cohort.cases}
    labels = cohort.select_labels([value for value, _ in run.identity["labels"]])
    tested = [cases[name] for name in run.test]
    model = load_model(folder / ADAPTER_FILE) if run.train else _as_it_is(base, run, labels, cohort, tested)
    check_cases(tested, cohort, labels, each_present=False, complete=not takes_missing_channels(model.net))
    model = replace(model, labels=labels)
    results: list[CaseResult] = []
    together: list[CaseVolumes] = []
    for name in run.test:
        found = model.segment(cases[name], device=run.identity["settings"]["device"])
        measured = measure(cases[name], found, labels)
        results += measured.labels
        together += measured.together
        write_mask(found.mask, found.scan.grid, folder / MASKS / f"{name}.nii.gz")
    return results, together


def _as_it_is(base: Path, run: Run, labels: Labels, cohort: Cohort, cases: Sequence[Case]) -> Model:
    """A base with the outputs that the labels take of it, as `adapt` would begin with."""
    loaded = BaseSource(base).load(labels, cohort)
    if loaded.new:
        missing = ", ".join(list(labels.values())[place] for place in sorted(loaded.new))
        raise SegraftError(
            f"the base {run.base} has no trained output for {missing}, so nothing can be said without training: leave "
            "the arm that trains nothing out."
        )
    preparation = settle_preparation(run.identity["preparation"], loaded.preparation, loaded.net, cases)
    return Model(loaded.net.eval(), labels, preparation, Served(), loaded.served, base / FILE_NAME, cohort.channels)
