"""`segraft study run` and `segraft study show`."""

from pathlib import Path
from typing import Annotated

import typer

from segraft.allocation import keep_freed_memory
from segraft.cli.app import err, json_object, show_frame, show_json, show_line, show_notes, split
from segraft.cli.options import Labels, NetworkArguments, Trust, vouch
from segraft.cli.spreading import SpreadingCommand

study = typer.Typer(help="Studies: grids of adaptations, each trained once, and their report.", add_completion=False)


@study.command(cls=SpreadingCommand)
def run(
    name: Annotated[
        str, typer.Argument(help="A study that comes with Segraft (sah, few_shot, smoke), or a .yaml file.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the study; started again, it goes on there.")],
    data: Annotated[Path | None, typer.Option(help="Cohort to adapt to: a dataset.json, or its folder.")] = None,
    pretrain_data: Annotated[Path | None, typer.Option(help="Cohort that the bases learn from.")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Weights (.safetensors, .pt) of every base that names none, in place of pre-training."),
    ] = None,
    base_labels: Annotated[
        list[str] | None, typer.Option(help="Names of the outputs of these weights, in order; or btcv, fseft.")
    ] = None,
    network_args: NetworkArguments = None,
    labels: Labels = None,
    shots: Annotated[
        list[int] | None, typer.Option(help="Patients to adapt to, each number for itself: --shots 5 10.")
    ] = None,
    test_patients: Annotated[
        int | None, typer.Option(help="Patients to test on, of a study of shots [half of them].")
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option(help="Every adaptation is done once with each: --seeds 0 1 2.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray (a cluster; its address in RAY_ADDRESS).")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time (ray: per machine).")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    trust: Trust = None,
) -> None:
    """Run a study; what is finished is not done again. Options stand above what the study's file says.

    Examples: `segraft study run sah --data cohort/dataset.json --pretrain-data tbi/dataset.json --out study`,
    `segraft study run few_shot --data dataset.json --weights foundation.pt --shots 5 10 --seeds 0 1 2 --out study`
    """
    from segraft.studies.reading import changed, read_study
    from segraft.studies.report import results_of, write_study_report
    from segraft.studies.run import told
    from segraft.studies.running import run_study

    vouch(trust)
    given = {
        "data": data,
        "pretrain_data": pretrain_data,
        "labels": split(labels) or None,
        "shots": shots or None,
        "test_patients": test_patients,
        "seeds": seeds or None,
    }
    arguments = json_object(network_args, "--network-args")
    read = changed(read_study(name), given, weights=weights, base_labels=split(base_labels), arguments=arguments)
    if not read.recomputes:  # else memory is short
        keep_freed_memory()
    result = run_study(read, out, engine=engine, workers=workers, device=device, console=err)
    report = write_study_report(out)
    scores, _ = results_of(out)
    show_notes([*scores.of_bases, *told(result.failures)])
    waiting = f", {result.waiting} wait for a base" if result.waiting else ""
    show_line(f"{report}: {result.done} runs done, {result.before} before, {len(result.failures)} failed{waiting}")
    if result.failures:
        raise typer.Exit(1)


@study.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of a study.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
) -> None:
    """Show the tables of a study as far as it is, and write its report anew.

    Example: `segraft study show study`
    """
    from segraft.studies.report import as_json as everything
    from segraft.studies.report import results_of, tables_of, write_study_report
    from segraft.studies.run import told

    scores, judgement = results_of(folder)
    report = write_study_report(folder)
    if as_json:
        show_json(everything(scores, judgement))
        return
    for caption, frame in tables_of(scores, judgement):
        show_frame(frame, caption)
    show_notes([*scores.plan.study.notes, *scores.of_bases, *judgement.notes, *told(scores.failures)])
    show_line(str(report))
