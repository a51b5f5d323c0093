"""docs/performance.md from the committed results: `python -m benchmarks.report`.

It reads `docs/results/performance-*.json`, and at the end puts `benchmarks/notes.md`, where there is one.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.ratios import Network, Ratio
from benchmarks.targets import Outcome, Value, number, ours, outcomes
from segraft.atomic import replacing
from segraft.errors import SegraftError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "docs/results"
PAGE = ROOT / "docs" / "performance.md"
NOTES = ROOT / "benchmarks" / "notes.md"

HEAD = """# Speed and memory

Generated from {sources} by `python -m benchmarks.report`; `make bench` measures.

- *step*: forward, backward and AdamW (default settings) on one image, the same for all. *full*: full fine-tuning.
  *bound*: forward and all input gradients of the frozen network, with the image's own. *bound, no image gradient*: the
  same, ending at the outputs of the layers that see the image: no method that adapts these layers can do less.
- All variants of one kind (LoRA or DoRA) and rank take their steps in turn, round after round, in one process with a
  fixed number of threads, each round in another order. A ratio is taken within each round; shown are the median over
  the rounds and, in brackets, the quartiles.
- *evaluation / base*: the forward pass of the unmerged network without gradients by that of the plain network, which
  runs beside it each time, by turns before and after.
- *memory*: peak of a step, counted from before the network was built: parameters, gradients, optimiser, activations.
  On a CPU it is summed from PyTorch's own allocations, as its profiler records them in a step outside the timing;
  scratch space that oneDNN takes by itself is not in it. On a GPU it is the allocator's peak.
- Peers adapt every layer that they support; what they leave out is said in the row. α = 2·R everywhere.
- On a CPU memory is taken as Segraft's commands take it: kept, and in huge pages. "How memory is taken", at the end,
  tells what that brings.
"""


def markdown(results: Mapping[str, Mapping[str, Any]], notes: str = "") -> str:
    """The page.

    Args:
        results: path, as the page shall name it -> content of the results file.
        notes: a section written by hand.
    """
    sources = ", ".join(f"[{Path(path).name}]({path.removeprefix('docs/')})" for path in results)
    parts = [HEAD.format(sources=sources)]
    for content in results.values():
        parts.extend(device_section(content))
    if notes:
        parts.append(notes.strip() + "\n")
    return "\n".join(parts)


def device_section(results: Mapping[str, Any]) -> Iterator[str]:
    """Everything that was measured on one machine."""
    networks = [Network(record) for record in results["networks"].values()]
    yield f"## {_machine(results)}\n"
    yield _circumstances(results, networks) + "\n"
    yield "### What we aim for\n"
    if results["device"] != "cpu":
        yield "Set for a CPU; on this device for comparison.\n"
    yield table(
        ("what we aim for", "network", "worst", "which", "reached"),
        (_outcome(outcome) for outcome in outcomes(networks)),
    )
    for network in networks:
        yield f"### {network.title}\n"
        yield from network_section(network)


def network_section(network: Network) -> Iterator[str]:
    """The tables of one network."""
    seconds = network.seconds("full")
    if seconds is not None:
        rounds = _between([run["rounds"] for run in network.runs if run["rounds"]])
        beside = [run["evaluations"] for run in network.runs if run.get("evaluations")]
        more = f", {_between(beside)} of evaluation beside the base" if beside else ""
        yield f"A step of full fine-tuning takes {_seconds(seconds)} here; {rounds} rounds{more}.\n"
    yield table(
        ("variant", "step / bound", "step / full", "memory / full", "evaluation / base", ""),
        (
            (
                name,
                text(network.over(name, "bound")),
                text(network.over(name, "full")),
                text(network.memory_over(name, "full")),
                text(network.evaluation_over_base(name)),
                _remark(row),
            )
            for name, row in network.rows()
        ),
    )
    pairs = list(peer_rows(network))
    if pairs:
        yield "Peers by ours, from the same rounds: above 1 ours is better. **Bold**: the peer wins.\n"
        columns = ("peer", "ours", "same kind", "step", "memory", "evaluation", "the peer wins in")
        yield table(columns, pairs)
    options = network.rows(options=True)
    if options:
        reference = options[0][0]
        yield f"Options of one adapted network, by {reference}:\n"
        yield table(
            ("option", "step", "memory", ""),
            (
                (name, text(network.over(name, reference)), text(network.memory_over(name, reference)), _remark(row))
                for name, row in options[1:]
            ),
        )


def peer_rows(network: Network) -> Iterator[tuple[str, ...]]:
    """Each peer against each method of ours that was measured in the same rounds."""
    for peer, row in network.rows():
        for mine in ours(network):
            if not row.get("nearest") or network.over(peer, mine) is None:
                continue
            values: dict[str, Value] = {
                "step": network.over(peer, mine),
                "memory": network.memory_over(peer, mine),
                "evaluation": network.over(peer, mine, "evaluation"),
            }
            wins = [what for what, value in values.items() if value is not None and number(value) < 1]
            cells = (f"**{text(value)}**" if what in wins else text(value) for what, value in values.items())
            yield peer, mine, "yes" if mine == row["nearest"] else "no", *cells, ", ".join(wins)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def text(value: Value, digits: int = 2) -> str:
    """A ratio with its quartiles."""
    if value is None:
        return ""
    if isinstance(value, Ratio):
        return f"{value.median:.{digits}f} ({value.low:.{digits}f}–{value.high:.{digits}f})"
    return f"{value:.{digits}f}"


def _outcome(outcome: Outcome) -> tuple[str, ...]:
    reached = {True: "yes", False: "**no**", None: "not measured"}[outcome.reached]
    # Three digits: 1.02 must be seen to be 1.02.
    worst = "failed" if outcome.of and outcome.value is None else text(outcome.value, 3)
    which = f"{outcome.worst}, worst of {outcome.of}" if outcome.of else ""
    return outcome.target.text, outcome.network.title, worst, which, reached


def _remark(row: Mapping[str, Any]) -> str:
    return f"not measured: {row['failed']}" if "failed" in row else row.get("note", "")


def _between(values: Sequence[Any]) -> str:
    return " to ".join(dict.fromkeys((str(min(values)), str(max(values)))))


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _machine(results: Mapping[str, Any]) -> str:
    machine, threads = results["machine"], results["settings"]["threads"]
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {threads} thread{'s' if threads > 1 else ''}"
    return (
        f"CPU: {cpu}; {results['settings']['malloc']}"
        if results["device"] == "cpu"
        else f"GPU: {machine['device']} ({cpu})"
    )


def _circumstances(results: Mapping[str, Any], networks: Iterable[Network]) -> str:
    runs = [run for network in networks for run in network.runs]
    sources = sorted({run["source"] for run in runs})
    dates = _between([run["date"][:10] for run in runs])
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    malloc = (
        f"Allocation of memory: {results['settings']['malloc']}. (By default glibc gives large blocks back at every "
        "step and takes them anew, and the kernel's clearing of their pages hides what the methods cost.)"
    )
    lines = [f"{results['machine']['system']}; {versions}. Measured {dates}.", malloc]
    if "tf32" in results["settings"]:
        allowed = ", ".join(f"{what} {'yes' if on else 'no'}" for what, on in results["settings"]["tf32"].items())
        tries = "on" if results["settings"]["cudnn_benchmark"] else "off"
        lines.append(f"TF32 in float32: {allowed}; cuDNN's search for kernels {tries}.")
    if len(sources) > 1:
        lines.append(f"Measured in pieces, with {len(sources)} states of Segraft's source; no ratio is across pieces.")
    return "\n".join(lines)


def committed() -> dict[str, dict[str, Any]]:
    """The committed results, by path."""
    found = sorted((ROOT / RESULTS).glob("performance-*.json"))
    return {path.relative_to(ROOT).as_posix(): store.load(path) for path in found}


def page() -> str:
    """What docs/performance.md should hold.

    Raises:
        SegraftError: there are no results.
    """
    results = committed()
    if not results:
        raise SegraftError(f"no {RESULTS}/performance-*.json: make one with `make bench` and put it there.")
    notes = NOTES.read_text(encoding="utf-8") if NOTES.is_file() else ""
    for name, made in (("PROFILE", profile_table), ("OVERHEAD", overhead_table), ("ALLOCATION", allocation_table)):
        notes = notes.replace(f"{{{name}}}", made())
    return markdown(results, notes)


def profile_table() -> str:
    """What `benchmarks.profiling` measured, in milliseconds of a step."""
    path = ROOT / RESULTS / "profile-cpu.json"
    if not path.is_file():
        return ""
    networks = json.loads(path.read_text(encoding="utf-8"))["networks"]
    rows = [
        (network, name, *(f"{value:.0f}" for value in row["milliseconds"].values()))
        for network, variants in networks.items()
        for name, row in variants.items()
    ]
    kinds = next(iter(next(iter(networks.values())).values()))["milliseconds"]
    return table(("network", "variant", *kinds), rows)


def overhead_table() -> str:
    """What `benchmarks.overhead` measured, by how much it makes evaluation longer."""
    path = ROOT / RESULTS / "overhead-cpu.json"
    if not path.is_file():
        return ""
    rows = []
    for network, variants in json.loads(path.read_text(encoding="utf-8"))["networks"].items():
        base = variants["full"]
        for name, row in variants.items():
            more = f"{1 + (row['beside'] - base['beside']) / base['whole']:.3f}" if name != "full" else ""
            rows.append((network, name, f"{row['whole']:.0f}", f"{row['beside']:.1f}", more))
    return table(("network", "variant", "evaluation", "of it in layers beside their arithmetic", "makes × base"), rows)


def allocation_table() -> str:
    """What `benchmarks.allocating` measured."""
    path = ROOT / RESULTS / "allocation-cpu.json"
    if not path.is_file():
        return ""
    rows = []
    for network, tasks in json.loads(path.read_text(encoding="utf-8"))["networks"].items():
        for task, settings in tasks.items():
            for row in settings.values():
                seconds = ", ".join(f"{value:.2f}" for value in sorted(row["seconds"]))
                held, huge = (statistics.median(row[key]) for key in ("GiB", "in huge pages"))
                rows.append((network, task, row["allocation"], seconds, f"{held:.2f}", f"{huge:.0%}"))
    columns = ("network", "task", "memory", "seconds, of each process", "most memory held, GiB", "in huge pages")
    return table(columns, rows)


def main() -> None:
    try:
        content = page()
    except SegraftError as error:
        raise SystemExit(str(error)) from error
    with replacing(PAGE) as aside:
        aside.write_text(content, encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
