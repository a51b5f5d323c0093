"""Putting adapters and bases on the Hugging Face Hub, each with a page written from its record."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from segraft.adapters import AdapterHeader
from segraft.data.scan_preparation import recorded_preparation
from segraft.errors import SegraftError
from segraft.exchange import hub
from segraft.exchange.front_matter import front_matter, metadata_of_others
from segraft.exchange.hub import CARD
from segraft.exchange.model_card import OURS, Published, adapter_card, base_card, by_hand
from segraft.exchange.outgoing import Record, beside, outgoing, without_cases, without_digests
from segraft.jobs.bases import base_file_of
from segraft.jobs.locating import ADAPTER_FILE, header_of, holds_base, read_adapter
from segraft.networks import Base, read_base
from segraft.networks.bases import FILE_NAME

SMALL = 50_000_000
"""Bytes up to which a base that Segraft trained goes along with an adapter, unless told otherwise."""


@dataclass(frozen=True)
class Pushed:
    """Result of `push`.

    Attributes:
        repository: owner/name.
        url: of its page; None where nothing was sent.
        commit: 40 hex digits; None where nothing was sent.
        private: whether only its owner sees it; None where nothing was sent.
        files: name in the repository -> bytes.
        card: text of the page; None where the page there is kept.
        notes: what the user should know.
    """

    repository: str
    url: str | None
    commit: str | None
    private: bool | None
    files: dict[str, int]
    card: str | None
    notes: tuple[str, ...]


def push(
    file: str | Path,
    repository: str,
    *,
    revision: str | None = None,
    private: bool = False,
    base: str | None = None,
    with_base: bool | None = None,
    base_path: str | Path | None = None,
    license: str | None = None,  # noqa: A002
    cases: bool = True,
    digests: bool = True,
    dry_run: bool = False,
    bars: bool = False,
) -> Pushed:
    """Put an adapter, or a base, on the Hub, with a page written from its record.

    In the file there, the base's path is but its file's name, as `pull` puts it beside; all tensors are the same.

    Args:
        file: an adapter file, a base file, or the folder of one.
        repository: owner/name; made where it is not there.
        revision: branch; made where it is not there. None means the main one.
        private: the repository must be private.
        base: repository in which an adapter's base is.
        with_base: push an adapter's base along, into the same repository. None: if it is a base file that Segraft
            trained, of `SMALL` bytes at most, and `base` names no repository.
        base_path: where that base is, if it was moved.
        license: as the Hub calls it (`apache-2.0`); None: as the page there says, or none.
        cases: False: the ids of the cases that trained it become numbers, and their data set and files of weights have
            no names.
        digests: False: nothing of them is left.
        dry_run: send nothing.
        bars: show the progress of what is sent.

    Raises:
        SegraftError: it is none of Segraft's files, its base cannot go along, or the Hub refuses it or is not reached.
    """
    header = header_of(Path(file))
    if "preparation" in header.record:
        recorded_preparation(header.record["preparation"], header.path)
    hub.checked_name(repository)
    if not dry_run:
        hub.require_token()
    along, notes = _base_along(header, base, with_base=with_base, base_path=base_path)
    there = None if dry_run else hub.find(repository, revision) or (hub.find(repository) if revision else None)
    page = "" if there is None else _page_beside(header, there, along=along is not None)
    if base is not None and not dry_run:
        hub.look(base)
    said = front_matter(page).get("license")
    with TemporaryDirectory(prefix="segraft-") as folder:
        sent_along = FILE_NAME if along is not None or base is not None else None
        files, told = _files(header, along, Path(folder), base_name=sent_along, cases=cases, digests=digests)
        summary, stale = _evaluation(header)
        published = Published(
            repository,
            files[_name(header)].stat().st_size,
            base_along=along is not None,
            base_repository=base,
            license=license or (str(said) if said else None),
            evaluation=summary,
            metadata=metadata_of_others(page, OURS),
        )
        sent = header_of(files[_name(header)]).record | {"cases": header.record.get("cases", {})}  # to tell how many
        card = None if by_hand(page) else _card(replace(header, record=sent), published)
        if card is None:
            notes.append(f"{CARD} of {repository} was written or changed by hand, and stays as it is there.")
        else:
            files[CARD] = Path(folder) / CARD
            files[CARD].write_text(card, encoding="utf-8")
        notes += [*told, *stale]
        if there is not None and not (cases and digests) and {ADAPTER_FILE, FILE_NAME} & set(there.files):
            notes.append(f"earlier commits of {repository} stay as they are, with the cases that its files named then.")
        sizes = {name: path.stat().st_size for name, path in files.items()}
        if dry_run:
            return Pushed(repository, None, None, None, sizes, card, tuple(notes))
        what = "base" if isinstance(header, Base) else f"adapter ({header.spec.method})"
        done = hub.push(repository, files, revision=revision, private=private, message=f"Segraft {what}", bars=bars)
    if not done.changed:
        notes.append(f"{repository} held just this already, so nothing was sent.")
    return Pushed(repository, done.url, done.commit, done.private, sizes, card, tuple(notes))


def _name(header: AdapterHeader | Base) -> str:
    return FILE_NAME if isinstance(header, Base) else ADAPTER_FILE


def _card(header: AdapterHeader | Base, published: Published) -> str:
    return base_card(header, published) if isinstance(header, Base) else adapter_card(header, published)


def _page_beside(header: AdapterHeader | Base, there: hub.Repository, *, along: bool) -> str:
    """The page of a repository that is pushed to; empty where it has none.

    Raises:
        SegraftError: it holds a file that would be taken for the one that goes with this.
    """
    if isinstance(header, AdapterHeader) and not along and FILE_NAME in there.files:
        raise SegraftError(
            f"{there.name} holds a {FILE_NAME}, which whoever pulls would take for this adapter's base: push with "
            "--with-base, or to another repository."
        )
    if isinstance(header, Base) and ADAPTER_FILE in there.files:
        raise SegraftError(
            f"{there.name} holds an {ADAPTER_FILE}, which needs its own base: push this base to another repository, or "
            "along with its adapter (--with-base)."
        )
    return hub.fetch(there, CARD).read_text(encoding="utf-8", errors="replace") if CARD in there.files else ""


def _base_along(
    header: AdapterHeader | Base, repository: str | None, *, with_base: bool | None, base_path: str | Path | None
) -> tuple[Path | None, list[str]]:
    """The base file that goes along with an adapter, and what is to be known of that.

    Raises:
        SegraftError: it cannot, though it was asked for.
    """
    if isinstance(header, Base):
        if repository is not None or with_base or base_path is not None:
            raise SegraftError(f"{header.path} is a base itself: leave --base, --with-base and --base-path out.")
        return None, _elsewhere(header)
    if repository is not None and with_base:
        raise SegraftError(f"--base {repository} says that the base is there already: leave that or --with-base out.")
    if with_base is False or repository is not None:
        return None, []
    try:
        where = base_file_of(header, base_path, option="--base-path")
    except SegraftError as error:
        if with_base or base_path is not None:
            raise
        return None, [f"the base is not pushed along: {error}"]
    if not holds_base(where):
        if with_base:
            raise SegraftError(
                f"{where} is no base file of Segraft, and only such are pushed: name the repository in which the "
                "weights are published with --base, or make a base of them (segraft import), and adapt that."
            )
        return None, [f"the base, {where.name}, is of another format and not pushed along; its fingerprint is said."]
    base = read_base(where)
    size = where.stat().st_size
    if with_base is None and ("imported" in base.record or size > SMALL):
        why = "its weights were made elsewhere" if "imported" in base.record else f"it has {size / 1e6:.0f} MB"
        return None, [f"the base is not pushed along, as {why}: add --with-base, or say where it is with --base."]
    chosen = [] if with_base else [f"the base goes along ({size / 1e6:.2g} MB): leave it out with --without-base."]
    return where, [*chosen, *_elsewhere(base)]


def _elsewhere(base: Base) -> list[str]:
    """That weights of others have a licence of theirs."""
    if "imported" not in base.record:
        return []
    return [f"the weights of {base.path} were made elsewhere: see that their licence lets you publish them."]


def _files(
    header: AdapterHeader | Base,
    along: Path | None,
    folder: Path,
    *,
    base_name: str | None,
    cases: bool,
    digests: bool,
) -> tuple[dict[str, Path], list[str]]:
    """Name in the repository -> file, with what it says of cases left out as asked; and what it does say."""
    sources = {_name(header): header.path} | ({} if along is None else {FILE_NAME: along})

    def change(record: Record) -> dict[str, Any]:
        kept = record if cases and digests else without_cases(record) if digests else without_digests(record)
        return beside(kept, base_name)

    files = {name: outgoing(path, folder / name, change) for name, path in sources.items()}
    notes = []
    for name, path in files.items():
        record = header_of(path).record if name == FILE_NAME else read_adapter(path).record
        ids = list(record.get("cases", {}))
        if ids and cases and digests:
            notes.append(
                f"{name} names its {len(ids)} cases (such as {ids[0]}) and their data set, {record.get('dataset')}: to "
                "push it without, pass --without-cases."
            )
        elif ids:
            notes.append(
                f"{name} holds numbers for the ids of its {len(ids)} cases and no name of their data set; digests of "
                "their images stay, by which whoever has one can tell that it served: --without-digests drops them."
            )
        weights = record.get("imported", {}).get("weights")
        if weights is not None:
            notes.append(
                f"{name} says that the file its weights are from was called {weights}: --without-cases leaves that out."
            )
    if not digests:
        notes.append("without digests, nothing keeps the cases that trained a file from being evaluated on.")
    return files, notes


def _evaluation(header: AdapterHeader | Base) -> tuple[Mapping[str, Mapping[str, Any]], list[str]]:
    """The summary of the evaluation beside a file, if there is one that is of it.

    Raises:
        SegraftError: it is not readable.
    """
    path = header.path.parent / "evaluation.json"
    if not path.is_file():
        return {}, []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        summary, model = {str(name): _row(row) for name, row in found["summary"].items()}, found["record"].get("model")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SegraftError(f"{path} is not what `segraft evaluate` writes: evaluate again, or remove it.") from error
    if model != header.path.name:
        return {}, [f"{path} is of another file, and not on the page."]
    if path.stat().st_mtime < header.path.stat().st_mtime:
        return {}, [f"{path} is older than {header.path.name}, and not on the page: evaluate again."]
    return summary, []


def _row(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a summary's row.

    Raises:
        KeyError: it does not count anything.
        TypeError, ValueError: one of them is none.
    """
    numbers = {name: value for name, value in row.items() if name == "n" or name.endswith(("_mean", "_sd"))}
    return {"n": float(numbers.pop("n"))} | {
        name: None if value is None else float(value) for name, value in numbers.items()
    }
