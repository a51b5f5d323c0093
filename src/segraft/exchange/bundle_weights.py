"""Which file of a MONAI bundle its configuration loads the network's weights from."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from segraft.errors import SegraftError
from segraft.exchange.bundle_config import Config

LOADER = "CheckpointLoader"
DISABLED = '"_disabled_": true'
SHOWN = 80
"""Letters of a path that a message shows."""


def weights_of(path: Path, config: Config) -> Path:
    """The state dict: the file that the configuration's loader names, else `models/model.pt`.

    Args:
        path: the bundle's folder.
        config: of it.

    Raises:
        SegraftError: the file is not there, lies outside of the bundle, or cannot be told without running something.
    """
    named = list(dict.fromkeys(_named(path, each, config) for each in _loaders(config.values, config)))
    if len(named) > 1:
        listed = ", ".join(_short(each.name) for each in named)
        raise SegraftError(
            f"{config.path} loads weights from several files ({listed}): disable all loaders but one ({DISABLED})."
        )
    found = named[0] if named else path / "models" / "model.pt"
    if not found.resolve().is_relative_to(path.resolve()):
        usual = path / "models" / "model.pt"
        raise SegraftError(f"{config.path} loads weights from outside of the bundle ({found}): copy them to {usual}.")
    if found.is_file():
        return found
    if any((path / "models").glob("*.ts")) and not any((path / "models").glob("*.pt")):
        raise SegraftError(
            f"{path} has its weights as TorchScript alone (models/*.ts), which has no layers to graft on: save the "
            "state dict of the network as models/model.pt."
        )
    name = found.relative_to(path) if found.is_relative_to(path) else found
    raise SegraftError(f"{path} has no {name}: download the bundle's large files, or copy the weights there.")


def _loaders(values: Any, config: Config) -> Iterator[Mapping[str, Any]]:
    """Loaders anywhere in a configuration that are in use."""
    if isinstance(values, Mapping):
        name = str(values.get("_target_", "")).rpartition(".")[2]
        if name == LOADER and "load_path" in values and not config.disabled(values):
            yield values
    for value in values.values() if isinstance(values, Mapping) else values if isinstance(values, list) else ():
        yield from _loaders(value, config)


def _named(path: Path, loader: Mapping[str, Any], config: Config) -> Path:
    """The file, as it is named or from the bundle's folder."""
    text = config.resolve(loader["load_path"])
    try:
        found = Path(text) if isinstance(text, str) and text and "\0" not in text else None
        if found is not None:
            return path / found if not found.is_file() and (path / found).is_file() else found
    except OSError:  # too long for any file
        pass
    raise SegraftError(
        f"the load_path of {LOADER} in {config.path} is {_short(repr(text))}, which is no path of a file: correct it."
    )


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
