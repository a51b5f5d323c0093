"""The study of the haemorrhage paper, small, on phantoms or on real scans; its numbers for docs/results.

    python examples/haemorrhage_study.py phantoms --workers 2
    python examples/haemorrhage_study.py hippocampus --data ../shared/data/hippocampus/dataset.json --workers 2

`phantoms` draws two cohorts of synthetic heads, writes them as DICOM series, and runs the study `sah_small`:
traumatic haematomas first, then subarachnoid blood. `hippocampus` runs the study of that name. Either goes on where it
was stopped, and writes `results.json` (every number), `scores.csv` (every case of every run), `tables.md` and the
figures to `docs/results/<study>`; the report itself stays in the study's folder.
"""

import argparse
from pathlib import Path

from rich.console import Console

from segraft.data.phantom_series import write_phantom_series
from segraft.studies.publishing import publish
from segraft.studies.reading import read_study
from segraft.studies.report import write_study_report
from segraft.studies.running import run_study

PHANTOMS = "All heads are synthetic phantoms, not patients: the numbers compare methods on them, and nothing more."
PATIENTS = {"traumatic": 40, "subarachnoid": 30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", choices=["phantoms", "hippocampus"])
    parser.add_argument("--data", type=Path, help="dataset.json of the Decathlon's Task04_Hippocampus")
    parser.add_argument("--out", type=Path, default=Path("examples/out"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()

    study = read_study("sah_small" if arguments.cohort == "phantoms" else "hippocampus")
    if arguments.cohort == "phantoms":
        cohorts = {}
        for task, patients in PATIENTS.items():
            folder = arguments.out / "phantoms" / task
            listing = folder / "dataset.json"
            cohorts[task] = (
                listing if listing.is_file() else write_phantom_series(folder, task=task, patients=patients, seed=0)
            )
        data, pretrain_data, notes = cohorts["subarachnoid"], cohorts["traumatic"], (PHANTOMS, *study.notes)
    else:
        if arguments.data is None:
            parser.error("hippocampus needs --data")
        data = pretrain_data = arguments.data
        notes = study.notes
    study = study.model_copy(update={"data": data, "pretrain_data": pretrain_data, "notes": notes})

    out = arguments.out / study.name
    result = run_study(study, out, workers=arguments.workers, device="cpu", console=Console(stderr=True))
    print(write_study_report(out))
    publish(out, arguments.results / study.name, workers=arguments.workers)
    raise SystemExit(1 if result.failures else 0)


if __name__ == "__main__":
    main()
