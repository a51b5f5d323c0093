"""`segraft push` and `segraft pull`: adapters on the Hugging Face Hub."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from segraft.cli import options
from segraft.cli.app import progress_console, show_json, show_line, show_notes, show_table
from segraft.cli.options import Common, OutFolder, takes

Repository = Annotated[str, typer.Argument(help="Model repository on the Hub, as owner/name.", metavar="OWNER/NAME")]


@takes(common=options.common)
def push(
    *,
    file: Annotated[Path, typer.Argument(help="Adapter file (or base file), or the folder it is in.")],
    repository: Repository,
    revision: Annotated[str | None, typer.Option(help="Branch; made where it is not there [main].")] = None,
    private: Annotated[bool, typer.Option("--private", help="Only you shall see the repository.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Repository that the adapter's base is in, if it has its own (owner/name).")
    ] = None,
    with_base: Annotated[
        bool | None,
        typer.Option(
            "--with-base/--without-base",
            help="Push the adapter's base along [if Segraft trained it, and up to 50 MB].",
        ),
    ] = None,
    base_path: Annotated[Path | None, typer.Option(help="Where that base is, if it was moved.")] = None,
    license: Annotated[str | None, typer.Option(help="For the page, such as apache-2.0.")] = None,  # noqa: A002
    without_cases: Annotated[
        bool,
        typer.Option("--without-cases", help="Numbers for the ids of cases; no names of data set and files."),
    ] = False,
    without_digests: Annotated[
        bool, typer.Option("--without-digests", help="Nothing of the cases, not even digests of their images.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the page and the files; send nothing.")] = False,
    common: Common,
) -> None:
    """Put an adapter on the Hugging Face Hub, with a page written from its record.

    The token is HF_TOKEN's or that of `hf auth login`. Example: `segraft push run/adapter.safetensors owner/name`
    """
    from segraft.jobs import push as job

    result = job(
        file,
        repository,
        revision=revision,
        private=private,
        base=base,
        with_base=with_base,
        base_path=base_path,
        license=license,
        cases=not (without_cases or without_digests),
        digests=not without_digests,
        dry_run=dry_run,
        bars=progress_console(as_json=common.as_json) is not None,
    )
    if common.as_json:
        show_json(asdict(result))
        return
    show_notes(result.notes)
    if dry_run and result.card is not None:
        show_line(result.card)
    rows = ([name, f"{size:,}"] for name, size in result.files.items())
    show_table(repository, ["file", "bytes"], rows, right=1)
    if result.url is not None:
        show_line(f"{result.url} ({'private' if result.private else 'public'}), commit {result.commit}")


@takes(common=options.common)
def pull(
    *,
    repository: Repository,
    out: OutFolder,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit [main].")] = None,
    without_base: Annotated[bool, typer.Option("--without-base", help="Not the adapter's base.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    common: Common,
) -> None:
    """Get an adapter from the Hugging Face Hub, with its base where the Hub has it.

    Example: `segraft pull owner/name -o run`, then `segraft predict run scan.nii.gz -o mask.nii.gz`
    """
    from segraft.jobs import pull as job

    result = job(
        repository,
        out,
        revision=revision,
        with_base=not without_base,
        overwrite=overwrite,
        bars=progress_console(as_json=common.as_json) is not None,
    )
    if common.as_json:
        show_json(asdict(result))
        return
    show_notes(result.notes)
    for path in result.files:
        show_line(str(path))
    show_line(f"{repository}, commit {result.commit}")
