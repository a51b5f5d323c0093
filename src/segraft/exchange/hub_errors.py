"""What goes wrong with the Hugging Face Hub, in one sentence with its cure."""

from collections.abc import Callable

LOG_IN = "log in (HF_TOKEN, or `hf auth login`)"
AGAIN = "no file was written, so try again"
Sentence = Callable[[str, str, str | None], str]

KINDS: tuple[tuple[str, Sentence], ...] = (
    (
        "GatedRepoError",
        lambda hub, name, _: f"{name} is gated: ask for access at {hub}/{name}, and {LOG_IN} as who was given it.",
    ),
    (
        "DisabledRepoError",
        lambda hub, name, _: f"{name} was disabled by {hub}: ask its owner for the files.",
    ),
    (
        "RepositoryNotFoundError",
        lambda hub, name, _: (
            f"there is no model repository {name} at {hub}, or it is private and you may not see it: check the name, "
            f"or {LOG_IN}."
        ),
    ),
    (
        "RevisionNotFoundError",
        lambda _, name, revision: f"{name} has no revision {revision}: name a branch, tag or commit of it.",
    ),
    (
        "EntryNotFoundError",
        lambda hub, name, _: f"{name} at {hub} does not hold the file (any more): look at what it holds there.",
    ),
    (
        "OfflineModeIsEnabled",
        lambda _, name, __: f"{name} is on the Hub, and HF_HUB_OFFLINE says to stay offline: unset it.",
    ),
)
"""Error of the client -> what it says to a person, the first that it is one of; given the hub, repository, revision."""

STATUS: dict[int, str] = {
    401: f"does not accept the token: {LOG_IN} with a valid one",
    403: f"says that you may not read this: {LOG_IN} as who may, or ask its owner",
    409: "says that somebody else changed the repository meanwhile: look at it, and push again",
    412: "says that somebody else changed the repository meanwhile: look at it, and push again",
    413: "says that the files are too large: push without the base",
    429: "says that there were too many requests: wait some minutes, and try again",
}
"""Answer of the hub -> what it means."""

WHEN_PUSHING: dict[int, str] = {
    403: "says that your token may not do this: use one that may write to that owner's repositories",
}
"""The same where it is another thing when something is pushed."""

CONNECTIONS = ("httpx", "httpx2", "httpcore", "httpcore2", "hf_xet", "requests")
"""Packages whose errors are those of a connection."""


def sentence(error: BaseException, hub: str, name: str, revision: str | None, *, pushing: bool) -> str | None:
    """What an error of the client says to a person; None for one that is no error of its.

    Args:
        error: that the client raised.
        hub: address that was asked.
        name: owner/name that it was about.
        revision: that was asked for.
        pushing: whether something was being pushed.
    """
    from huggingface_hub import errors

    reason = error.__cause__
    wrapped = isinstance(error, errors.LocalEntryNotFoundError | RuntimeError)
    if wrapped and reason is not None:
        return sentence(reason, hub, name, revision, pushing=pushing)
    for kind, says in KINDS:
        if isinstance(error, getattr(errors, kind)) and not isinstance(error, errors.LocalEntryNotFoundError):
            return says(hub, name, revision)
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        said = " ".join((error.server_message or "no reason given").split())
        meaning = (STATUS | WHEN_PUSHING if pushing else STATUS).get(
            status,
            f"has trouble of its own ({status}): try again later"
            if status >= 500
            else f"refuses this ({status}: {said}): mend that, and try again",
        )
        return f"{hub} {meaning} ({name})."
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        what = " ".join(str(error).split()[4:])
        return f"{hub} refuses the model card of {name} ({what}): give a --license that it knows."
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{name}: {error.strerror}{where}: see that the client's cache, HF_HOME, can be written to."
    root = type(error).__module__.partition(".")[0]
    if root in CONNECTIONS or isinstance(error, OSError | RuntimeError | errors.LocalEntryNotFoundError):
        what = f"{name} could not be pushed to {hub}" if pushing else f"{name} could not be fetched from {hub}"
        said = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        return f"{what} ({said}): check the connection; {AGAIN}."
    return None
