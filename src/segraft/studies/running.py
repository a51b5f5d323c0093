"""Running a study: planning it, doing what is not done, writing its report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from segraft.errors import SegraftError
from segraft.studies.checking import check_study
from segraft.studies.designs import Design, Planned, design_of
from segraft.studies.engines import ENGINES
from segraft.studies.phantoms import with_phantoms
from segraft.studies.planning import PLAN, Plan, plan
from segraft.studies.run import Outcome, Runs, is_finished
from segraft.studies.spec import Study

RUNS, PHANTOMS = "runs", "phantoms"


@dataclass(frozen=True)
class Studied:
    """Result of `run_study`.

    Attributes:
        path: the study's folder.
        plan: its runs.
        done: runs done now.
        before: runs that were finished before.
        failures: key -> reason.
        waiting: runs that were not tried, as their base failed.
    """

    path: Path
    plan: Plan
    done: int
    before: int
    failures: dict[str, str]
    waiting: int = 0


def run_study(
    study: Study,
    out: str | Path,
    *,
    engine: str = "local",
    workers: int = 1,
    device: str = "auto",
    console: Console | None = None,
) -> Studied:
    """Do every run of a study that is not finished; started again, it goes on where it was.

    Args:
        study: with its cohorts, or with `phantoms`, which are drawn into the folder then.
        out: folder of the study.
        engine: a key of `ENGINES`.
        workers: runs at a time (of Ray: per machine).
        device: `auto`, `cpu`, `cuda`, `mps`.
        console: for progress; None is silent.

    Raises:
        SegraftError: bad input of any kind, `out` holds another study or cannot be written to, or the engine is not
            there.
    """
    if engine not in ENGINES:
        raise SegraftError(f"unknown engine {engine!r}: choose {', '.join(ENGINES)}.")
    if workers < 1:
        raise SegraftError(f"{workers} workers: give at least 1.")
    out = Path(out).absolute()
    if (out / PLAN).is_file() and (there := Plan.read(out / PLAN).study.name) != study.name:
        raise SegraftError(f"{out} holds the study {there}: choose another --out for {study.name}.")
    check_study(study)
    study = with_phantoms(study, out / PHANTOMS)
    runs = Runs(out / RUNS)
    planned = plan(study, runs, device=device, console=console)
    planned.write(out / PLAN)
    names = {run.key: _name(design_of(planned.study), run) for run in planned.runs}
    outcomes: list[Outcome] = []
    waves = [_keys(planned, bases=bases) for bases in (True, False)]  # an adaptation waits for its base
    left = [[runs.folder(key) for key in wave if not is_finished(runs.folder(key))] for wave in waves]
    if any(left):
        with ENGINES[engine](workers) as do:
            for wave in left:
                # An adaptation whose base has failed waits until that is mended.
                folders = [folder for folder in wave if _has_base(planned, runs, folder.name)]
                for number, outcome in enumerate(do(folders), start=1):
                    outcomes.append(outcome)
                    if console is not None:
                        line = f"{number}/{len(folders)} {names[outcome.key]} ({outcome.key}) {_how(outcome)}"
                        console.print(line, highlight=False, markup=False, soft_wrap=True)
    before = sum(map(len, waves)) - sum(map(len, left))
    failures = {outcome.key: outcome.failure for outcome in outcomes if outcome.failure}
    waiting = sum(map(len, left)) - len(outcomes)
    return Studied(out, planned, len(outcomes) - len(failures), before, failures, waiting)


def _has_base(planned: Plan, runs: Runs, key: str) -> bool:
    base = next(run.base for run in planned.runs if run.key == key)
    return base is None or is_finished(runs.folder(base))


def _keys(planned: Plan, *, bases: bool) -> Sequence[str]:
    """In order, each once: two arms may be the same run."""
    return list(dict.fromkeys(run.key for run in planned.runs if (run.base is None) is bases))


def _how(outcome: Outcome) -> str:
    if outcome.failure is not None:
        return f"failed: {outcome.failure}"
    return "was done meanwhile" if outcome.seconds is None else f"done, {outcome.seconds:.0f} s"


def _name(design: Design, run: Planned) -> str:
    return f"{' '.join(filter(None, (run.arm, design.told(run))))}, seed {run.seed}"
