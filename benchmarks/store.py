"""The results file: a long benchmark may be run in pieces, which add up in one file."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.ratios import Network, Ratio
from segraft.atomic import replacing
from segraft.errors import SegraftError

FORMAT = 1


def load(path: Path) -> dict[str, Any]:
    """The content of a results file.

    Raises:
        SegraftError: it is none, or of another format.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SegraftError(f"{path} is no results file ({error}): choose another one.") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise SegraftError(f"{path} is no results file of format {FORMAT}: choose another one.")
    return results


def opened(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds already, or a beginning.

    Args:
        path: of the file, which need not exist.
        header: machine, versions and settings; results of others do not go into the same file.

    Raises:
        SegraftError: the file holds results of another machine, version or setting.
    """
    header = json.loads(json.dumps(header))
    if not path.exists():
        return {"format": FORMAT, **header, "networks": {}}
    results = load(path)
    differing = [key for key, value in header.items() if results.get(key) != value]
    if differing:
        raise SegraftError(f"{path} was measured with other {', '.join(differing)}: choose another --out.")
    return results


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    # The numbers of a list on one line: a file of rounds has thousands.
    text = re.sub(r"\[[\d\s.,e+-]+\]", lambda found: " ".join(found[0].split()), text)
    with replacing(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def add_run(results: dict[str, Any], network: Mapping[str, Any], run: dict[str, Any]) -> None:
    """Add a run to a network, and take out runs that tell nothing more beside it.

    Args:
        results: of all networks.
        network: name, title, family, shape, precision of this one.
        run: group, date, rounds and variants: name -> row. Ratios to the run's references are written into the rows.
    """
    before = results["networks"].get(network["name"], {"runs": []})
    kept = [
        old
        for old in before["runs"]
        if old["group"] != run["group"] or not old["variants"].keys() <= run["variants"].keys()
    ]
    record = {key: value for key, value in network.items() if key != "name"} | {"runs": [*kept, run]}
    alone = Network({**record, "runs": [run]})
    for name, row in run["variants"].items():
        row["ratios"] = _ratios(alone, name, run["references"])
    results["networks"][network["name"]] = record


def has(results: Mapping[str, Any], network: str, group: str, names: Iterable[str]) -> bool:
    """Whether one run of this group has all these variants, none of them failed."""
    wanted = set(names)
    return any(
        run["group"] == group and wanted <= {name for name, row in run["variants"].items() if "failed" not in row}
        for run in results["networks"].get(network, {"runs": []})["runs"]
    )


def _ratios(run: Network, name: str, references: Iterable[str]) -> dict[str, Any]:
    """For people who read the file; the report takes them from the seconds anew."""
    found: dict[str, Any] = {}
    for reference in references:
        for what in ("step", "evaluation"):
            ratio = run.over(name, reference, what)
            if ratio is not None:
                found[f"{what}/{reference}"] = _spelled(ratio)
        memory = run.memory_over(name, reference)
        if memory is not None:
            found[f"memory/{reference}"] = memory
    ratio = run.evaluation_over_base(name)
    if ratio is not None:
        found["evaluation/base"] = _spelled(ratio)
    return found


def _spelled(ratio: Ratio) -> dict[str, Any]:
    return {"median": ratio.median, "quartiles": [ratio.low, ratio.high]}
