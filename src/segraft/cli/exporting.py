"""`segraft export`: an adapter in the formats of other tools."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from segraft.cli import options
from segraft.cli.app import show_json, show_line, show_notes
from segraft.cli.options import BasePath, Common, OutFolder, takes


@takes(common=options.common)
def export(
    *,
    adapter: Annotated[Path, typer.Argument(help="Adapter file, or the folder it is in.")],
    format: Annotated[str, typer.Option(help="peft, onnx, nnunet or monai-bundle.")],  # noqa: A002
    out: OutFolder,
    base: BasePath = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier export wrote.")] = False,
    common: Common,
) -> None:
    """Write an adapter so that another tool runs it.

    Example: `segraft export run/adapter.safetensors --format onnx -o out`
    """
    from segraft.jobs import export as job

    result = job(adapter, out, format=format, base=base, overwrite=overwrite)
    if common.as_json:
        show_json(asdict(result))
        return
    show_notes(result.notes)
    for path in result.files:
        show_line(str(path))
