"""Writing a finished adapter in the format of another tool."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from segraft import adapters
from segraft.atomic import replacing_folder
from segraft.errors import SegraftError
from segraft.exchange.formats import Finished, exporter, require_replaceable
from segraft.jobs.bases import base_file_of, image_channels, load_base_of
from segraft.jobs.locating import file_in, holds_base, read_adapter
from segraft.jobs.task import task_of


@dataclass(frozen=True)
class Exported:
    """Result of `export`: the folder, the files in it, and what the user should know of them."""

    path: Path
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def export(
    adapter: str | Path,
    out: str | Path,
    *,
    format: str,  # noqa: A002
    base: str | Path | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write `out`, a folder that another tool reads.

    Args:
        adapter: an adapter file, or the folder that `adapt` wrote.
        out: folder to write to.
        format: a key of `segraft.exchange.formats.FORMATS`.
        base: where the base is, if it is no longer where it was when the adapter was trained.
        overwrite: replace a folder that an earlier export wrote.

    Raises:
        SegraftError: the format cannot express the adapter, its base is not found, or the folder is there already, or
            is none that may be replaced; nothing is written then.
    """
    write, out = exporter(format), Path(out)
    if out.exists() and not (overwrite or (out.is_dir() and not any(out.iterdir()))):
        raise SegraftError(f"{out} exists: choose another --out, or pass --overwrite.")
    require_replaceable(out)
    finished = finished_adapter(adapter, base)
    _keep(finished, out)
    with replacing_folder(out) as aside:
        notes = write(finished, aside)
    return Exported(out, tuple(sorted(path for path in out.rglob("*") if path.is_file())), notes)


def _keep(finished: Finished, out: Path) -> None:
    """Refuse to replace the folder that one is in, or one that holds what is exported.

    Raises:
        SegraftError: naming it.
    """
    for what, path in (("the adapter", finished.source), ("its base", finished.base)):
        if any(each.is_relative_to(out.resolve()) for each in (path.absolute(), path.resolve())):
            raise SegraftError(f"{out} holds {what} {path}, which would be gone: choose another --out.")
    if Path.cwd().is_relative_to(out.resolve()):
        raise SegraftError(f"{out} is, or holds, the folder that the command runs in: name another with --out.")


def finished_adapter(adapter: str | Path, base: str | Path | None = None) -> Finished:
    """An adapter with its base, for an exporter.

    Raises:
        SegraftError: it is none, or its base is not found.
    """
    path = file_in(Path(adapter))
    if holds_base(path):
        raise SegraftError(f"{path} is a base, and only adapters are exported: adapt it first.")
    header = read_adapter(path)
    found = base_file_of(header, base)
    described = header.record["base"]
    model = task_of(path, header.record, image_channels(described))
    channels = {"in_channels": image_channels(described), "out_channels": len(model.labels)}

    def grafted() -> nn.Module:
        net, _ = load_base_of(header, base)
        adapters.load(net, path)
        return net.eval()

    def merged() -> nn.Module:
        net = grafted()
        if header.spec.channels > 1:
            raise SegraftError(
                f"{path} has factors of its own for each of {header.spec.channels} channels, which do not merge into "
                "one weight: it cannot leave Segraft."
            )
        adapters.merge(net, reversible=False)
        return net.eval()

    return Finished(
        source=path,
        header=header,
        base=found,
        network=described["network"],
        arguments=described["arguments"] | channels,
        labels=model.labels,
        preparation=model.preparation,
        channels=model.channels,
        grafted=grafted,
        merged=merged,
    )
