"""Reading a study from YAML."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from segraft.errors import SegraftError
from segraft.networks.trusted import require_trusted
from segraft.studies.spec import Study

SUFFIXES = (".yaml", ".yml")


def shipped() -> tuple[str, ...]:
    """Names of the studies that come with the package."""
    return tuple(sorted(path.name.removesuffix(".yaml") for path in files(__package__).joinpath("library").iterdir()))


def read_study(name: str | Path) -> Study:
    """A study that comes with the package, by name, or of a YAML file.

    A file may name another study under `extends`: it then holds only what differs. Mappings are merged (but for those
    that name their `kind`), all else replaces what is there.

    Raises:
        SegraftError: neither, not YAML, or a value that does not fit; the message names it. A network that no file may
            name, unless the user vouches for it (`segraft.networks.trust`).
    """
    study = checked(_content(name, ()), name)
    for base in study.bases.values():
        for part in (base, base.encoder):
            if part is not None:
                require_trusted(part.network, part.arguments, f"the study {name}")
    return study


def _content(name: str | Path, seen: tuple[Path | str, ...]) -> object:
    """What the file says, with what it extends; paths of cohorts and weights as seen from the file."""
    path, is_file = Path(name), Path(name).suffix in SUFFIXES
    where = path.resolve() if is_file else str(name)
    if where in seen:
        raise SegraftError(f"the study {name} extends itself: take its `extends` out.")
    try:
        content = yaml.safe_load(_text(name))
    except yaml.YAMLError as error:
        raise SegraftError(f"the study {name} is not YAML ({' '.join(str(error).split())}): correct it.") from error
    if not isinstance(content, dict):
        return content
    if is_file:
        bases = content.get("bases")
        known = [base for base in bases.values() if isinstance(base, dict)] if isinstance(bases, dict) else []
        for part, fields in ((content, ("data", "pretrain_data")), *((base, ("weights",)) for base in known)):
            for field in fields:
                if isinstance(part.get(field), str):
                    part[field] = str(path.parent / part[field])
    extended = content.pop("extends", None)
    if extended is None:
        return content
    below = path.parent / str(extended) if str(extended).endswith(SUFFIXES) else str(extended)
    return _merged(_content(below, (*seen, where)), content)


def _text(name: str | Path) -> str:
    path = Path(name)
    if path.suffix in SUFFIXES:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SegraftError(f"the study {path} cannot be read ({error}): give a YAML file.") from error
    if str(name) not in shipped():
        raise SegraftError(f"there is no study {str(name)!r}: choose {', '.join(shipped())}, or give a .yaml file.")
    return files(__package__).joinpath("library", f"{name}.yaml").read_text(encoding="utf-8")


def _merged(below: object, above: object) -> object:
    if not (isinstance(below, dict) and isinstance(above, dict)) or "kind" in above:
        return above  # of another kind, the fields below mean nothing
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def changed(
    study: Study,
    given: Mapping[str, Any],
    *,
    weights: Path | None = None,
    base_labels: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
) -> Study:
    """A study with what was said when it was called, checked as if the file had said it.

    Args:
        study: as read.
        given: field -> value; None leaves the study's own.
        weights: of every base that names none and does not start at random, which is then not pre-trained.
        base_labels: names of the outputs of these weights.
        arguments: of every network, beside its own.

    Raises:
        SegraftError: what `checked` refuses.
    """
    content = study.model_dump(mode="python")
    content |= {field: value for field, value in given.items() if value is not None}
    if weights is not None:
        for base in content["bases"].values():
            if base["weights"] is None and not base["random"]:
                names = tuple(base_labels) or base["labels"]
                base |= {"weights": weights, "labels": names, "encoder": None, "training": {}, "patients": None}
    elif base_labels:
        raise SegraftError("--base-labels name the outputs of weights from elsewhere: give --weights too.")
    for base in content["bases"].values():
        base["arguments"] = {**base["arguments"], **(arguments or {})}
    return checked(content, study.name)


def checked(content: object, name: str | Path) -> Study:
    """The study that these values make.

    Raises:
        SegraftError: one sentence on the first value that does not fit.
    """
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise SegraftError(f"the study {name}{place and f', {place}'}: {reason}.") from error
