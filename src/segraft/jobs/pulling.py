"""Adapters and bases from the Hugging Face Hub, put where they predict."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segraft.adapters import AdapterHeader, read_header
from segraft.atomic import replacing
from segraft.errors import SegraftError
from segraft.exchange import hub
from segraft.exchange.hub import CARD
from segraft.exchange.model_card import front_matter
from segraft.jobs.locating import ADAPTER_FILE
from segraft.networks import Base, read_base
from segraft.networks.bases import FILE_NAME


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
    the repository holds.

    Args:
        repository: owner/name.
        out: folder to write to.
        revision: branch, tag or commit; None means the main branch.
        with_base: get the adapter's base too: of the same repository, or of that which the page names as its base.
        overwrite: replace files that are there.
        bars: show the progress of what is fetched.

    Raises:
        SegraftError: the repository holds no file of Segraft, `out` has one already, or the Hub is not reached.
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
    _require_free(out, [*wanted, CARD], overwrite=overwrite)
    found = {name: hub.fetch(there, name, bars=bars) for name in (*wanted, *([CARD] if CARD in there.files else []))}
    notes: list[str] = []
    header = _checked(there, wanted[0], found[wanted[0]])
    if isinstance(header, AdapterHeader) and with_base and FILE_NAME not in found:
        base, notes = _base_elsewhere(header, found.get(CARD), out, bars=bars)
        if base is not None:
            _require_free(out, [FILE_NAME], overwrite=overwrite)
            found[FILE_NAME] = base
    elif FILE_NAME in found:
        _checked(there, FILE_NAME, found[FILE_NAME])
    sought = _described(header).get("path") if isinstance(header, AdapterHeader) else FILE_NAME
    if FILE_NAME in found and sought != FILE_NAME:
        notes.append(f"the adapter looks for its base elsewhere: predict with --base {out / FILE_NAME}.")
    for name in sorted(found, key=(CARD, FILE_NAME, ADAPTER_FILE).index):  # what predicts comes last
        with replacing(out / name) as aside:
            shutil.copyfile(found[name], aside)
    return Pulled(out, repository, there.commit, tuple(out / name for name in found), tuple(notes))


def _require_free(out: Path, names: list[str], *, overwrite: bool) -> None:
    """Refuse to write over files, unless asked to.

    Raises:
        SegraftError: naming the first.
    """
    if out.exists() and not out.is_dir():
        raise SegraftError(f"{out} is a file: choose a folder with --out.")
    taken = [out / name for name in names if (out / name).exists()]
    if taken and not overwrite:
        raise SegraftError(f"{taken[0]} exists: choose another --out, or pass --overwrite.")


def _checked(there: hub.Repository, name: str, path: Path) -> AdapterHeader | Base:
    """The header of a fetched file.

    Raises:
        SegraftError: it is not what its name says.
    """
    try:
        return read_base(path) if name == FILE_NAME else read_header(path)
    except SegraftError as error:
        reason = str(error).replace(str(path), name)
        raise SegraftError(f"nothing was written, as {name} of {there.name} cannot be used: {reason}") from error


def _base_elsewhere(
    header: AdapterHeader, card: Path | None, out: Path, *, bars: bool
) -> tuple[Path | None, list[str]]:
    """The base of the repository that an adapter's page names, or how to go on without.

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
        return None, [needed]
    try:
        there = hub.look(named)
    except SegraftError as error:
        raise SegraftError(
            f"the base that the page names cannot be had (pull without it, with --without-base): {error}"
        ) from error
    if FILE_NAME not in there.files:
        return None, [f"{named}, which the page names as the base, holds no {FILE_NAME}: {needed}"]
    path = hub.fetch(there, FILE_NAME, bars=bars)
    _checked(there, FILE_NAME, path)
    return path, [f"its base is from {named}, commit {there.commit[:12]}."]


def _described(header: AdapterHeader) -> dict[str, Any]:
    """What an adapter says of its base; a file of others may say anything."""
    base = header.record.get("base")
    return base if isinstance(base, dict) else {}
