"""Adapters and bases from the Hugging Face Hub, put where they predict."""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segraft.adapters import AdapterHeader
from segraft.atomic import replacing
from segraft.errors import SegraftError
from segraft.exchange import hub
from segraft.exchange.front_matter import front_matter
from segraft.exchange.hub import CARD
from segraft.jobs.bases import require_base_of
from segraft.jobs.locating import ADAPTER_FILE, read_adapter
from segraft.networks import Base, read_base
from segraft.networks.bases import FILE_NAME
from segraft.networks.trusted import require_trusted

NAMES = (ADAPTER_FILE, FILE_NAME, CARD)
"""Of the files that are pulled."""


@dataclass(frozen=True)
class Pulled:
    """Result of `pull`: the folder, its files, the commit that they are of, and what the user should know."""

    path: Path
    repository: str
    commit: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def pull(
    repository: str,
    out: str | Path,
    *,
    revision: str | None = None,
    with_base: bool = True,
    overwrite: bool = False,
    bars: bool = False,
) -> Pulled:
    """Get an adapter with its base, or a base, from the Hub, so that `predict` finds all it needs in `out`.

    Only the files of these names are fetched, checked, and then put in place: nothing half, and nothing else of what
    the repository holds. Nothing that they name is imported, but the network of a base that is known to run nothing
    else, where only building it tells whether it is the adapter's.

    Args:
        repository: owner/name.
        out: folder to write to.
        revision: branch, tag or commit; None means the main branch.
        with_base: get the adapter's base too: of the same repository, or of that which the page names as its base.
        overwrite: replace files that are there, and remove one of these names that is of another pull.
        bars: show the progress of what is fetched.

    Raises:
        SegraftError: the repository holds no file of Segraft, or a base that is not the adapter's, `out` has one
            already, or the Hub is not reached.
    """
    out, there = Path(out), hub.look(repository, revision)
    wanted = [name for name in (ADAPTER_FILE, FILE_NAME) if name in there.files]
    if not wanted:
        held = ", ".join(there.files[:5]) or "nothing"
        raise SegraftError(
            f"{repository} holds no {ADAPTER_FILE} (nor {FILE_NAME}) that `segraft push` wrote, but {held}: name "
            "another repository or revision."
        )
    if wanted[0] == ADAPTER_FILE and not with_base:
        wanted = [ADAPTER_FILE]
    _require_free(out, overwrite=overwrite)
    found = {name: hub.fetch(there, name, bars=bars) for name in (*wanted, *([CARD] if CARD in there.files else []))}
    notes: list[str] = []
    header = _checked(there, wanted[0], found[wanted[0]])
    if isinstance(header, Base):
        _require_no_other_adapter(out, found[FILE_NAME])
    else:
        notes += _with_base(header, there, found, out, with_base=with_base, bars=bars)
    notes += _vouching(header)
    notes += _put(found, out, kept=() if isinstance(header, AdapterHeader) else (ADAPTER_FILE,))
    return Pulled(out, repository, there.commit, tuple(out / name for name in found), tuple(notes))


def _with_base(
    header: AdapterHeader, there: hub.Repository, found: dict[str, Path], out: Path, *, with_base: bool, bars: bool
) -> list[str]:
    """Add an adapter's base to what was found, where it is to be had; and what is to be known of that.

    Raises:
        SegraftError: what is given as its base is none, or another.
    """
    notes: list[str] = []
    source = there.name
    if FILE_NAME in found:
        _checked(there, FILE_NAME, found[FILE_NAME])
    elif with_base:
        path, source, notes = _base_elsewhere(header, found.get(CARD), out, bars=bars)
        found |= {} if path is None else {FILE_NAME: path}
    if FILE_NAME not in found:
        return notes
    described = _described(header)
    if {"network", "arguments"} <= described.keys():
        if _own_network(header) is None:  # else whoever vouches for it finds out
            _require_its_base(header, found[FILE_NAME], source)
        if described.get("path") != FILE_NAME:
            notes.append(f"the adapter looks for its base elsewhere: predict with --base {out / FILE_NAME}.")
    return notes


def _require_its_base(header: AdapterHeader, path: Path, source: str) -> None:
    """Refuse a base that is not the adapter's, and would not predict.

    Raises:
        SegraftError: saying whose file it is.
    """
    try:
        require_base_of(header, path)
    except SegraftError as error:
        reason = str(error).replace(str(path), FILE_NAME)
        raise SegraftError(
            f"nothing was written, as {FILE_NAME} of {source} is not the adapter's base (pull without it, with "
            f"--without-base): {reason}"
        ) from error


def _require_no_other_adapter(out: Path, path: Path) -> None:
    """Refuse to put a base beside an adapter that would take it for its own.

    Raises:
        SegraftError: there is one of another base.
    """
    beside = out / ADAPTER_FILE
    if not beside.exists():
        return
    try:
        require_base_of(read_adapter(beside), path)
    except SegraftError as error:
        raise SegraftError(
            f"nothing was written, as {beside} is there, an adapter of another base: choose another --out."
        ) from error


def _own_network(header: AdapterHeader | Base) -> SegraftError | None:
    """Why the network that a file names is not built without its user's word; None where it is."""
    if isinstance(header, Base):
        network, arguments = header.network, header.arguments
    else:
        network, arguments = (
            _described(header).get(name, start) for name, start in (("network", ""), ("arguments", {}))
        )
    try:
        require_trusted(network, arguments, header.path.name)
    except SegraftError as error:
        return error
    return None


def _vouching(header: AdapterHeader | Base) -> list[str]:
    refusal = _own_network(header)
    return [] if refusal is None else [f"it will not be built without your word: {refusal}"]


def _put(found: dict[str, Path], out: Path, *, kept: tuple[str, ...]) -> list[str]:
    """Put files in place: all or, where one cannot be written, none; of another pull nothing stays among them.

    Returns:
        What was removed.
    """
    with ExitStack() as moved_at_its_end:  # the last to enter is moved first: what predicts comes last
        for name in (name for name in NAMES if name in found):
            shutil.copyfile(found[name], moved_at_its_end.enter_context(replacing(out / name)))
    others = [name for name in NAMES if name not in (*found, *kept) and (out / name).exists()]
    for name in others:
        (out / name).unlink()
    return [f"{out / name} was there, is not of this pull, and was removed." for name in others]


def _require_free(out: Path, *, overwrite: bool) -> None:
    """Refuse to write over files or to mix them with those of another pull, unless asked to.

    Raises:
        SegraftError: naming the first.
    """
    if out.exists() and not out.is_dir():
        raise SegraftError(f"{out} is a file: choose a folder with --out.")
    taken = [out / name for name in NAMES if (out / name).exists()]
    folder = next((path for path in taken if path.is_dir()), None)
    if folder is not None:
        raise SegraftError(f"{folder} is a folder, where a file is to be put: choose another --out.")
    if taken and not overwrite:
        raise SegraftError(f"{taken[0]} exists: choose another --out, or pass --overwrite.")


def _checked(there: hub.Repository, name: str, path: Path) -> AdapterHeader | Base:
    """The header of a fetched file.

    Raises:
        SegraftError: it is not what its name says.
    """
    try:
        return read_base(path) if name == FILE_NAME else read_adapter(path)
    except SegraftError as error:
        reason = str(error).replace(str(path), name)
        raise SegraftError(f"nothing was written, as {name} of {there.name} cannot be used: {reason}") from error


def _base_elsewhere(
    header: AdapterHeader, card: Path | None, out: Path, *, bars: bool
) -> tuple[Path | None, str, list[str]]:
    """The base of the repository that an adapter's page names, and which that is; or how to go on without.

    Raises:
        SegraftError: that repository is not to be had.
    """
    named = (
        front_matter(card.read_text(encoding="utf-8", errors="replace")).get("base_model") if card is not None else None
    )
    network = _described(header).get("network", "not recorded")
    needed = (
        f"its base (network {network}, fingerprint {header.fingerprint[:16]}) is not with it: say where you have it, "
        f"segraft predict {out} SCAN --base BASE."
    )
    if not isinstance(named, str):
        return None, "", [needed]
    try:
        there = hub.look(named)
    except SegraftError as error:
        raise SegraftError(
            f"the base that the page names cannot be had (pull without it, with --without-base): {error}"
        ) from error
    if FILE_NAME not in there.files:
        return None, named, [f"{named}, which the page names as the base, holds no {FILE_NAME}: {needed}"]
    path = hub.fetch(there, FILE_NAME, bars=bars)
    _checked(there, FILE_NAME, path)
    return path, named, [f"its base is from {named}, commit {there.commit[:12]}."]


def _described(header: AdapterHeader) -> dict[str, Any]:
    """What an adapter says of its base."""
    base: dict[str, Any] = header.record.get("base", {})
    return base
