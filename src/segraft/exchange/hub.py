"""The Hugging Face Hub: the files of a model repository, looked at, fetched and pushed by its own client.

Only files asked for by name are transferred. The token and the cache are the client's own: `HF_TOKEN` or a login,
`HF_HOME`; `HF_ENDPOINT` names another hub.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING

from segraft._version import __version__
from segraft.errors import SegraftError
from segraft.exchange.hub_errors import sentence

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"


@dataclass(frozen=True)
class Repository:
    """A model repository as it is at one commit.

    Attributes:
        name: owner/name.
        commit: 40 hex digits.
        private: whether only its owner sees it.
        files: that it holds.
    """

    name: str
    commit: str
    private: bool
    files: tuple[str, ...]


@dataclass(frozen=True)
class Commit:
    """What a push left: the address of the files, the commit, and whether it changed anything."""

    url: str
    commit: str
    private: bool
    changed: bool


def look(name: str, revision: str | None = None) -> Repository:
    """A repository on the Hub.

    Args:
        name: owner/name.
        revision: branch, tag or commit; None means its main branch.

    Raises:
        SegraftError: it is not there, not to be seen, or the Hub is not reached.
    """
    name = checked_name(name)
    with _telling(name, revision) as api:
        info = api.model_info(name, revision=revision)
    files = tuple(sibling.rfilename for sibling in info.siblings or ())
    return Repository(name, str(info.sha), bool(info.private), files)


def find(name: str, revision: str | None = None) -> Repository | None:
    """The same; None where there is no such repository, or no such revision of it.

    Raises:
        SegraftError: as `look`, for all other reasons.
    """
    try:
        return look(name, revision)
    except SegraftError as error:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        absent = isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError)
        if absent and not isinstance(error.__cause__, GatedRepoError):
            return None
        raise


def fetch(repository: Repository, file: str, *, bars: bool = False) -> Path:
    """A file of a repository, at its commit, in the client's cache; with its progress bar, if asked for.

    Raises:
        SegraftError: it is not there, or could not be fetched whole.
    """
    from huggingface_hub import hf_hub_download

    with _telling(repository.name, repository.commit, bars=bars):
        return Path(
            hf_hub_download(
                repository.name,
                file,
                revision=repository.commit,
                library_name="segraft",
                library_version=__version__,
            )
        )


def require_token() -> None:
    """Refuse, before anything is prepared, where nothing says who pushes.

    Raises:
        SegraftError: naming the cure.
    """
    _client()
    from huggingface_hub import get_token

    if get_token() is None:
        raise SegraftError("nothing says who pushes: set HF_TOKEN to a token that may write, or run `hf auth login`.")


def push(
    name: str,
    files: Mapping[str, Path],
    *,
    revision: str | None = None,
    private: bool = False,
    message: str,
    bars: bool = False,
) -> Commit:
    """Put files into a repository, in one commit; the repository and the branch are made where they are not there.

    Args:
        name: owner/name.
        files: name in the repository -> file.
        revision: branch; None means the main one.
        private: the repository must be, or is made, private; else it is as it is, or as its owner's new ones are.
        message: of the commit.
        bars: show the client's progress bars.

    Raises:
        SegraftError: it is public where it must be private, the token may not write, or the Hub is not reached.
    """
    from huggingface_hub import CommitOperationAdd

    before = find(name)
    if before is not None and private and not before.private:
        raise SegraftError(
            f"{name} is public, and a private repository was asked for: make it private in its settings on the Hub, "
            "or choose another name."
        )
    with _telling(name, revision, pushing=True, bars=bars) as api:
        if before is None:
            api.create_repo(name, private=True if private else None, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        parent = api.model_info(name, revision=revision)
        made = api.create_commit(
            name,
            [CommitOperationAdd(where, str(file)) for where, file in files.items()],
            commit_message=message,
            revision=revision,
            parent_commit=parent.sha,
        )
        url = f"{api.endpoint}/{name}" + ("" if revision is None else f"/tree/{revision}")
        return Commit(url, made.oid, bool(parent.private), made.oid != parent.sha)


def checked_name(name: str) -> str:
    """`owner/name` as the Hub takes it.

    Raises:
        SegraftError: it is none.
    """
    _client()
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # which it documents

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise SegraftError(
            f"{name!r} is no name of a repository: write owner/name, of letters, digits, '-', '_' and '.'."
        )
    return name


def _client() -> "HfApi":
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise SegraftError(
            "the Hugging Face Hub is reached through huggingface_hub, which is not installed: "
            "pip install 'segraft[hub]'."
        ) from error
    return HfApi(library_name="segraft", library_version=__version__)


@contextmanager
def _telling(name: str, revision: str | None, *, pushing: bool = False, bars: bool = False) -> Iterator["HfApi"]:
    """The client; what goes wrong with it becomes one sentence, and it says nothing besides.

    Raises:
        SegraftError: from the client's error.
    """
    api = _client()
    with _silent(bars=bars):
        try:
            yield api
        except SegraftError:
            raise
        except Exception as error:
            told = sentence(error, f"{api.endpoint}", name, revision, pushing=pushing)
            if told is None:
                raise
            raise SegraftError(told) from error


@contextmanager
def _silent(*, bars: bool) -> Iterator[None]:
    """Without the client's warnings, and without its progress bars unless asked for; as they were afterwards."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = HF_HUB_DISABLE_PROGRESS_BARS is None and not (bars or are_progress_bars_disabled())
    level = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hide:
            enable_progress_bars()
