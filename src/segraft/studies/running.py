"""Running a study: planning it, doing what is not done, writing its report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from segraft.errors import SegraftError
from segraft.studies.engines import ENGINES
from segraft.studies.planning import PLAN, Plan, plan
from segraft.studies.run import Outcome, Runs, is_finished
from segraft.studies.spec import Study

RUNS = "runs"


@dataclass(frozen=True)
class Studied:
    """Result of `run_study`.

    Attributes:
        path: the study's folder.
        plan: its runs.
        done: runs done now.
        before: runs that were finished before.
        failures: key -> reason.
    """

    path: Path
    plan: Plan
    done: int
    before: int
    failures: dict[str, str]


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
        study: with its cohorts.
        out: folder of the study.
        engine: a key of `ENGINES`.
        workers: runs at a time (of Ray: per machine).
        device: `auto`, `cpu`, `cuda`, `mps`.
        console: for progress; None is silent.

    Raises:
        SegraftError: bad input of any kind, or `out` holds another study.
    """
    if engine not in ENGINES:
        raise SegraftError(f"unknown engine {engine!r}: choose {', '.join(ENGINES)}.")
    if workers < 1:
        raise SegraftError(f"{workers} workers: give at least 1.")
    out = Path(out)
    if (out / PLAN).is_file() and (there := Plan.read(out / PLAN).study.name) != study.name:
        raise SegraftError(f"{out} holds the study {there}: choose another --out for {study.name}.")
    runs = Runs(out / RUNS)
    planned = plan(study, runs, device=device, console=console)
    planned.write(out / PLAN)
    say: Callable[[str], None] = (lambda _: None) if console is None else console.print
    names = {run.key: _name(run.arm, run.held_out, run.seed) for run in planned.runs}
    outcomes: list[Outcome] = []
    before = 0
    for wave in (_keys(planned, bases=True), _keys(planned, bases=False)):
        open_ = [key for key in wave if not is_finished(runs.folder(key))]
        before += len(wave) - len(open_)
        for number, outcome in enumerate(ENGINES[engine]([runs.folder(key) for key in open_], workers), start=1):
            outcomes.append(outcome)
            how = f"failed: {outcome.failure}" if outcome.failure else "done"
            say(f"{number}/{len(open_)} {names[outcome.key]} ({outcome.key}) {how}")
    failures = {outcome.key: outcome.failure for outcome in outcomes if outcome.failure}
    return Studied(out, planned, len(outcomes) - len(failures), before, failures)


def _keys(planned: Plan, *, bases: bool) -> Sequence[str]:
    """In order, each once: two arms may be the same run."""
    return list(dict.fromkeys(run.key for run in planned.runs if (run.base is None) is bases))


def _name(arm: str, held_out: tuple[int, ...], seed: int) -> str:
    folds = f" without fold {' and '.join(str(fold + 1) for fold in held_out)}" if held_out else ""
    return f"{arm}{folds}, seed {seed}"
