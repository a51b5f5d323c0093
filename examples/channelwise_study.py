"""The study of the channel-wise paper, small, on synthetic brains in four contrasts; its numbers for docs/results.

    python examples/channelwise_study.py --workers 2

Draws a cohort with labels and further scans without, pre-trains an encoder on the latter as a masked auto-encoder, and
runs the study `channelwise_small`. It goes on where it was stopped, and writes `results.json` (every number),
`scores.csv` (every case of every run), `tables.md`, the figures, and the picture of the reconstructions to
`docs/results/channelwise_small`; the report stays in its folder. `--quick` shows in a minute that it all works, as
`channelwise_small-quick`, with numbers that mean nothing.
"""

import argparse
import shutil
from pathlib import Path

from rich.console import Console

from segraft.jobs.masked_pretraining import FIGURE
from segraft.studies.executing import ENCODER
from segraft.studies.publishing import publish
from segraft.studies.reading import changed, read_study
from segraft.studies.report import write_study_report
from segraft.studies.running import RUNS, run_study

QUICK = {
    "phantoms": {"patients": 4, "unlabelled": 4},
    "shots": [2],
    "test_patients": 2,
    "seeds": [0],
    "training": {"epochs": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("examples/out"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()

    study = read_study("channelwise_small")
    out = arguments.out / study.name
    if arguments.quick:
        bases = {name: base.model_dump() for name, base in study.bases.items()}
        bases["mae"]["training"]["epochs"] = 1
        study, out = changed(study, {**QUICK, "bases": bases}), arguments.out / f"{study.name}-quick"
    result = run_study(study, out, workers=arguments.workers, device="cpu", console=Console(stderr=True))
    print(write_study_report(out))
    results = arguments.results / out.name
    publish(out, results, workers=arguments.workers)
    encoder = next(run.key for run in result.plan.runs if run.arm == "mae" and run.base is None)
    shutil.copyfile(out / RUNS / encoder / ENCODER / FIGURE, results / FIGURE)
    raise SystemExit(1 if result.failures else 0)


if __name__ == "__main__":
    main()
