"""`segraft params` and `segraft inspect`: what something is, without running it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segraft.cli import options
from segraft.cli.app import json_object, show_json, show_line, show_table
from segraft.cli.options import Common, Network, NetworkArguments, takes

if TYPE_CHECKING:
    from segraft.adapters import AdapterSpec
    from segraft.jobs.papers import PaperTable


@takes(spec=options.adapter, common=options.common)
def params(
    *,
    network: Network = "unet",
    network_args: NetworkArguments = None,
    paper: Annotated[
        str | None, typer.Option(help="Count a paper's table on the real network: sah, arena, channelwise.")
    ] = None,
    spec: "AdapterSpec",
    common: Common,
) -> None:
    """Count trainable and frozen parameters of a network with an adapter, and the bytes that training them takes.

    Example: `segraft params --network unet --method dora_c --rank 64`, or `segraft params --paper sah`
    """
    from segraft.jobs.papers import paper_table
    from segraft.jobs.params import count

    if paper is not None:
        _show_paper(paper_table(paper, spec.rank), spec.rank, as_json=common.as_json)
        return
    counted = count(network, spec, json_object(network_args, "--network-args"))
    table = counted.adapted
    if common.as_json:
        show_json(table.to_dict() | {"full_state_bytes": counted.full.state.to_dict()})
        return
    rows = [[row.owner, row.part, row.kind, f"{row.trainable:,}", f"{row.frozen:,}"] for row in table.rows]
    show_table(
        f"{network}, {spec.method}, R = {spec.rank}",
        ["owner", "part", "kind", "trainable", "frozen"],
        [*rows, ["sum", "", "", f"{table.trainable:,}", f"{table.frozen:,}"]],
        right=2,
    )
    show_line(f"{100 * table.trainable / table.total:.2f} % of {table.total:,} parameters train.")
    states = {"this": table.state, "full fine-tuning": counted.full.state}
    show_table(
        "What a training with AdamW holds beside activations, in MB",
        ["", "trainable", "gradients", "moments", "their sum", "frozen"],
        ([name, *(f"{value / 1e6:,.3f}" for value in state.to_dict().values())] for name, state in states.items()),
        right=5,
    )


def _show_paper(table: "PaperTable", rank: int, *, as_json: bool) -> None:
    if as_json:
        show_json({"rank": rank, "rows": table.rows})
        return
    texts = ([_counted(row[key]) for key in table.columns] for row in table.rows)
    show_table(table.title, list(table.columns.values()), texts, right=len(table.columns) - 1)
    show_line(table.remarks)


def _counted(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,}"


@takes(common=options.common)
def inspect(
    *,
    path: Annotated[Path, typer.Argument(help="Adapter file or base file, or the folder it is in.")],
    common: Common,
) -> None:
    """What a file of Segraft is: spec, base, labels, preparation, training record; where ranks adapt, those in use.

    Example: `segraft inspect run/adapter.safetensors`
    """
    from segraft.jobs.inspecting import describe

    described = describe(path)
    if common.as_json:
        show_json(described)
        return
    ranks = described.pop("ranks", {})
    cases = list(described.pop("cases", []))
    rows = [[name, _brief(value)] for name, value in described.items() if name != "path"]
    shown = [["cases", f"{len(cases)}: {', '.join(cases[:3])}{' …' if len(cases) > 3 else ''}"]] if cases else []
    show_table("", ["", described["path"]], [*rows, *shown])
    if ranks:
        used, start = (sum(pair[which] for pair in ranks.values()) for which in (0, 1))
        bars = ([key, _bar(*pair), f"{pair[0]} / {pair[1]}"] for key, pair in ranks.items())
        title = f"Rank in use: {used} of {start} directions, {used / len(ranks):.1f} per weight"
        show_table(title, ["weight", "", "in use"], bars, right=1)


WIDEST = 32
"""Characters of the longest bar."""


def _bar(used: int, start: int) -> str:
    """One block per direction, or per several where a line would not hold them."""
    each = -(-start // WIDEST)
    full = -(-used // each)
    return "█" * full + "░" * (-(-start // each) - full)


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_brief(each)}" for name, each in value.items())
    if isinstance(value, list | tuple) and len(value) > 12:
        return f"{', '.join(_brief(each) for each in value[:3])} … {_brief(value[-1])} ({len(value)})"
    if isinstance(value, list | tuple):
        return ", ".join(_brief(each) for each in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
