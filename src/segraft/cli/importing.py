"""`segraft import`: weights of others as a base."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from segraft.cli import options
from segraft.cli.app import json_object, show_json, show_line, show_notes, split
from segraft.cli.options import Common, Network, NetworkArguments, OutFolder, takes
from segraft.errors import SegraftError


@takes(preparation=options.preparation, common=options.common)
def import_(
    *,
    weights: Annotated[
        Path,
        typer.Argument(help="Weights from elsewhere (.safetensors, .pt, .pth), or a folder of an adapter of PEFT."),
    ],
    out: OutFolder,
    base: Annotated[
        str | None, typer.Option(help="Of an adapter of PEFT: the base it was trained on; --out is then a file.")
    ] = None,
    network: Network = "swin_unetr",
    network_args: NetworkArguments = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            help="Names of the outputs, in order, or btcv, fseft; some of them, where the file names its own."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a base that is there.")] = False,
    preparation: dict[str, Any],
    common: Common,
) -> None:
    """Make a base of weights from elsewhere, or an adapter file of an adapter of PEFT (with --base).

    What was loaded is said, and missing encoder weights are an error. With the preparation that they were trained
    with, the base segments by itself (zero-shot).

    Example: `segraft import foundation.pt --spacing 1.5 1.5 1.5 --window -175 250 --crop-foreground --out base`
    """
    of_peft = (weights / "adapter_config.json").is_file()
    if of_peft and network_args:
        raise SegraftError("--network-args goes with weights; the base of an adapter of PEFT has its own.")
    if of_peft or base is not None:
        _of_peft(weights, out, base, labels=split(labels), preparation=preparation, overwrite=overwrite, common=common)
        return
    from segraft.jobs import import_base

    result = import_base(
        weights,
        out,
        network=network,
        network_arguments=json_object(network_args, "--network-args"),
        labels=split(labels),
        preparation=preparation,
        overwrite=overwrite,
    )
    if common.as_json:
        show_json(asdict(result))
        return
    show_notes(result.notes)
    shown = list(result.labels.values())
    names = ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
    show_line(f"{result.path}: {len(shown)} outputs ({names}), fingerprint {result.fingerprint[:16]}")


def _of_peft(folder: Path, out: Path, base: str | None, *, common: options.Common, **given: Any) -> None:
    from segraft.jobs import import_peft

    if base is None:
        raise SegraftError(f"{folder} is an adapter of PEFT: name the base that it was trained on, with --base.")
    result = import_peft(folder, out, base=base, **given)
    if common.as_json:
        show_json({"path": result.path, "labels": result.labels, "notes": result.notes})
        return
    show_notes(result.notes)
    show_line(f"{result.path}: {result.parameters.trainable} parameters for {', '.join(result.labels.values())}")
