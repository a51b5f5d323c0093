"""What a document may quote of a study: its numbers, tables and figures, in files that are small enough to keep."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd

from segraft.atomic import replacing
from segraft.jobs.run_folder import versions
from segraft.studies.engines import cores
from segraft.studies.report import FIGURES, RESULTS, SCORES, results_of, tables_of
from segraft.studies.run import write_json


def publish(out: Path, results: Path, *, workers: int) -> None:
    """Write `results.json` (every number), `scores.csv` (every case of every run), `tables.md` and `figures/`.

    Args:
        out: the study's folder, with its report.
        results: folder to write to; figures that are there are replaced.
        workers: runs at a time, for the record of the machine.

    Raises:
        SegraftError: the folder holds no study.
    """
    scores, judgement = results_of(out)
    shutil.rmtree(results / FIGURES, ignore_errors=True)
    shutil.copytree(out / FIGURES, results / FIGURES)
    shutil.copyfile(out / SCORES, results / SCORES)
    found = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    seconds = sum(run["seconds"] for run in scores.finished.values())
    machine = {"cores": cores(), "workers": workers, "seconds of all runs": round(seconds), "cpus": os.cpu_count()}
    write_json(results / RESULTS, {**found, "machine": machine, "versions": versions()})
    study = scores.plan.study
    parts = [f"# {study.title}", study.about, *(f"- {note}" for note in study.notes)]
    for caption, frame in tables_of(scores, judgement):
        parts += [f"## {caption}", as_markdown(frame)]
    with replacing(results / "tables.md") as aside:
        aside.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def as_markdown(frame: pd.DataFrame) -> str:
    """A table as Markdown."""
    rows = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
