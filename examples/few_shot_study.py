"""The few-shot study of the ARENA paper, small, on real scans; its numbers for docs/results.

    python examples/few_shot_study.py few_shot_small --data ../shared/data/hippocampus/dataset.json --workers 2
    python examples/few_shot_study.py few_shot_small_base --data ../shared/data/hippocampus/dataset.json --workers 2

`few_shot_small` adapts a network that knows the anterior hippocampus to the posterior part, `few_shot_small_base` to
the anterior part itself. Either goes on where it was stopped, and writes `results.json` (every number), `scores.csv`
(every case of every run), `tables.md` and the figures to `docs/results/<study>`; the report stays in its folder.
"""

import argparse
from pathlib import Path

from rich.console import Console

from segraft.studies.publishing import publish
from segraft.studies.reading import read_study
from segraft.studies.report import write_study_report
from segraft.studies.running import run_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["few_shot_small", "few_shot_small_base"])
    parser.add_argument("--data", type=Path, required=True, help="dataset.json of the Decathlon's Task04_Hippocampus")
    parser.add_argument("--out", type=Path, default=Path("examples/out"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()

    study = read_study(arguments.study)
    study = study.model_copy(update={"data": arguments.data, "pretrain_data": arguments.data})
    out = arguments.out / study.name
    result = run_study(study, out, workers=arguments.workers, device="cpu", console=Console(stderr=True))
    print(write_study_report(out))
    publish(out, arguments.results / study.name, workers=arguments.workers)
    raise SystemExit(1 if result.failures else 0)


if __name__ == "__main__":
    main()
