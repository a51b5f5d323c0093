"""The page of a file on the Hub, written from its own record: nothing stands there that the file does not say."""

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from segraft.adapters import PRESETS, AdapterHeader, AdapterSpec
from segraft.networks import Base
from segraft.networks.encoder_files import ENCODER

MARK = "<!-- `segraft push` writes this page anew each time; take this line out to keep it as you change it. -->"
TAGS = ("segraft", "medical")
OURS = ("library_name", "pipeline_tag", "tags", "base_model", "base_model_relation", "license")
"""Metadata that a page is written with; what else stands there is a person's."""


@dataclass(frozen=True)
class Published:
    """What a card says besides the file's record.

    Attributes:
        repository: owner/name.
        bytes: of the file.
        base_along: the base is in the same repository.
        base_repository: owner/name of that of the base, if it has its own.
        license: as the Hub calls it; None where nobody said.
        evaluation: summary by label's name, of `segraft evaluate`.
        metadata: lines of YAML that a person added to the page's.
    """

    repository: str
    bytes: int
    base_along: bool = False
    base_repository: str | None = None
    license: str | None = None
    evaluation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metadata: str = ""


def adapter_card(header: AdapterHeader, published: Published) -> str:
    """Markdown of an adapter's page, with the metadata that the Hub reads in front."""
    spec, record = header.spec, header.record
    metadata: dict[str, Any] = {"tags": [*TAGS, "adapter", spec.method]}
    if published.base_repository is not None:
        metadata |= {"base_model": published.base_repository, "base_model_relation": "adapter"}
    base = record.get("base", {})
    what = {
        "segments": _labels(record),
        "base network": _network(base.get("network"), base.get("arguments", {})),
        "base's fingerprint": f"`{header.fingerprint}`",
        "base": _where(published, base.get("path")),
        "method": f"{spec.method}: W = {PRESETS[spec.method].formula} ({PRESETS[spec.method].source})",
        **_size(header, spec),
        "bytes": f"{published.bytes:,}",
        "trained on": _cases(record),
    }
    name = published.repository.partition("/")[2]
    return _page(
        metadata,
        published,
        f"# {name}",
        f"A small adapter that makes a pre-trained network segment {_names(record)}, made with Segraft "
        f"{header.version}. Research software, not a medical device.",
        _table(("", ""), what.items()),
        *_use(record, published),
        *_sections(record, published),
    )


def base_card(base: Base, published: Published) -> str:
    """Markdown of a base's page."""
    encoder = base.record.get(ENCODER)
    what = {
        "outputs": _labels(base.record)
        if encoder is None
        else "none: it is an encoder, which segments nothing by itself",
        "network": _network(base.network, base.arguments),
        "fingerprint": f"`{base.fingerprint}`",
        "bytes": f"{published.bytes:,}",
        "trained on": _cases(base.record),
    }
    imported = base.record.get("imported")
    if imported:
        kind = imported.get("layout") or imported.get("weights") or "of a file that is not named"
        what["imported from"] = f"weights made elsewhere ({_text(kind)})"
    name = published.repository.partition("/")[2]
    return _page(
        {"tags": [*TAGS, "base"]},
        published,
        f"# {name}",
        "A pre-trained network for Segraft to adapt. Research software, not a medical device.",
        _table(("", ""), what.items()),
        "## Use",
        _commands(f"segraft pull {published.repository} -o base", _adapting(encoder)),
        *_sections(base.record, published),
    )


def _adapting(encoder: Mapping[str, Any] | None) -> str:
    """The command that adapts a base; of an encoder, a network that takes it."""
    if encoder is None:
        return "segraft adapt --base base --data dataset.json --out run"
    arguments = shlex.quote(json.dumps({"img_size": encoder.get("img_size")}))
    return (
        f"segraft adapt --base unetr_channelwise --weights base --network-args {arguments} --train decoder "
        "--data dataset.json --out run"
    )


def by_hand(card: str) -> bool:
    """Whether a page holds text that somebody else wrote, and not only metadata, as new repositories' pages do."""
    text = card.removeprefix("---\n").split("\n---", 1)[-1] if card.startswith("---\n") else card
    return MARK not in card and bool(text.strip("-\n "))


def _page(metadata: Mapping[str, Any], published: Published, *parts: str) -> str:
    front = {"library_name": "segraft", "pipeline_tag": "image-segmentation", **metadata}
    if published.license is not None:
        front["license"] = published.license
    lines = yaml.safe_dump(front, sort_keys=False) + published.metadata
    return "\n\n".join((f"---\n{lines}---", MARK, *parts)) + "\n"


def _use(record: Mapping[str, Any], published: Published) -> list[str]:
    channels = record.get("channels", ())
    scan = " ".join(f"--channel {shlex.quote(f'{name}=scan{n}.nii.gz')}" for n, name in enumerate(channels, start=1))
    found = published.base_along or published.base_repository is not None
    base = "" if found else " --base BASE"
    return [
        "## Use",
        _commands(
            f"segraft pull {published.repository} -o run",
            f"segraft predict run {scan or 'scan.nii.gz'}{base} -o mask.nii.gz",
        ),
        "The mask has the scan's own grid; its values are those of the labels."
        + (
            ""
            if found
            else " `BASE` is the base file (or the published weights) with the fingerprint above: any other is refused."
        ),
    ]


def _sections(record: Mapping[str, Any], published: Published) -> list[str]:
    """What the record says of preparation, evaluation, training and versions, where it does."""
    found = []
    if "preparation" in record:
        found += ["## Preparation of scans", _table(("", ""), _preparation(record["preparation"]).items())]
    if published.evaluation:
        rows = [
            [
                "all labels" if name == "all" else _text(name),
                f"{row['n']:g}",
                _mean(row, "dice", 3),
                _mean(row, "hausdorff95_mm", 2),
            ]
            for name, row in published.evaluation.items()
        ]
        found += [
            "## Evaluation",
            "Measured by `segraft evaluate` on cases that did not train it, on the scans' own grids; n counts labels.",
            _table(("", "n", "Dice, mean (SD)", "HD95 in mm, mean (SD)"), rows),
        ]
    training = record.get("training", {})
    settings = {name.replace("_", " "): _text(value) for name, value in record.get("settings", {}).items()}
    if training.get("losses"):
        settings["epochs trained"] = f"{len(training['losses'])}" + (
            " (until it converged)" if training.get("converged") else ""
        )
        settings["training loss, first and last epoch"] = f"{training['losses'][0]:.4g}, {training['losses'][-1]:.4g}"
    if settings:
        found += ["## Training", _table(("", ""), settings.items())]
    if "versions" in record:
        found.append(f"Made with {', '.join(f'{name} {_text(value)}' for name, value in record['versions'].items())}.")
    return found


def _names(record: Mapping[str, Any]) -> str:
    names = [_text(name) for name in record.get("labels", {}).values()]
    return ", ".join(names) or "what its maker knows"


def _labels(record: Mapping[str, Any]) -> str:
    regions = record.get("regions", {})
    covers = {value: f", of values {' + '.join(map(str, values))}" for value, values in regions.items()}
    labels = [f"{value}: {_text(name)}{covers.get(value, '')}" for value, name in record.get("labels", {}).items()]
    return "; ".join(labels) or "not recorded"


def _network(network: object, arguments: Mapping[str, Any]) -> str:
    if network is None:
        return "not recorded"
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    own = ": a class of its maker, which must be installed" if ":" in str(network) else ""
    return f"{_code(f'{network}({given})')}{own}"


def _where(published: Published, path: object) -> str:
    if published.base_along:
        return "`base.safetensors`, in this repository"
    if published.base_repository is not None:
        return f"[{published.base_repository}](https://huggingface.co/{published.base_repository})"
    file = f" ({_code(str(path).replace(chr(92), '/').rpartition('/')[2])} where it was trained)" if path else ""
    return f"not in this repository{file}; needed to predict, and known by its fingerprint"


def _size(header: AdapterHeader, spec: AdapterSpec) -> dict[str, str]:
    count = sum(math.prod(shape) for shape in header.tensors.values())
    found = {"parameters": f"{count:,}"}
    if spec.factorisation is not None:
        used, start = (sum(pair[which] for pair in header.ranks.values()) for which in (0, 1))
        others = f", {len(spec.ranks)} places with others" if spec.ranks else ""
        in_use = f" at the start; {used:,} of {start:,} directions in use" if header.ranks else ""
        found["rank"] = f"{spec.rank}{others}{in_use}"
        found["scale"] = f"{spec.scale}, α = {'2·R' if spec.alpha is None else f'{spec.alpha:g}'}"
        if spec.scale == "alpha":
            found["scale"] = f"α = {1.0 if spec.alpha is None else spec.alpha:g}"
        if spec.targets:
            found["adapted"] = ", ".join(map(_code, spec.targets))
        if spec.channels > 1:
            found["channels"] = f"factors of their own for each of {spec.channels}"
    if spec.train:
        found["trained whole"] = ", ".join(map(_code, spec.train))
    return found


def _cases(record: Mapping[str, Any]) -> str:
    return f"{len(record['cases'])} cases" if record.get("cases") else "not recorded"


def _preparation(values: Mapping[str, Any]) -> dict[str, str]:
    known = dict(values)
    spacing, intensity, patch = (known.pop(name, None) for name in ("spacing", "intensity", "patch"))
    each = intensity if isinstance(intensity, list | tuple) else [intensity] if intensity else []
    found = {
        "spacing in mm": " × ".join(f"{size:g}" for size in spacing) if spacing else "each scan's own",
        "intensities": "; ".join(map(_intensity, each)),
        "patch in voxels": " × ".join(map(str, patch or ())),
    }
    return {name: text for name, text in found.items() if text} | {
        name.replace("_", " "): _text(value) for name, value in known.items()
    }


def _intensity(values: Mapping[str, Any]) -> str:
    bounds = {"window": ("low", "high", ""), "percentiles": ("lower", "upper", "percentile ")}
    if values.get("kind") not in bounds:
        return _text(", ".join(f"{name} {value}" for name, value in values.items()))
    low, high, unit = bounds[values["kind"]]
    return f"{unit}{values[low]:g} becomes 0, {unit}{values[high]:g} becomes 1"


def _mean(row: Mapping[str, Any], name: str, digits: int) -> str:
    mean, deviation = row.get(f"{name}_mean"), row.get(f"{name}_sd")
    if mean is None:
        return "–"
    return f"{mean:.{digits}f} ({'–' if deviation is None else f'{deviation:.{digits - 1}f}'})"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _commands(*lines: str) -> str:
    return "\n".join(("```bash", *lines, "```"))


def _text(value: object) -> str:
    """A value as it stands in a table: on one line, without what Markdown or HTML would read."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    words = {True: "yes", False: "no", None: "none"}
    shown = words[value] if isinstance(value, bool) or value is None else str(value)
    shown = " ".join(shown.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return shown.replace("`", "'").replace("[", "&#91;")


def _code(text: str) -> str:
    """The same as code."""
    shown = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`"
