"""What a file's record may hold: any entry, but those that Segraft reads are of these types.

Files come from others too. `read_base` and `segraft.jobs.locating.read_adapter` check them, and who reads a record of
theirs relies on that.
"""

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], str | None]
"""Of a JSON value: None where it is right, else where it is wrong and what it should be."""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is(accepts: Callable[[Any], bool], what: str) -> Check:
    return lambda value: None if accepts(value) else f" is no {what}"


_TEXT = _is(lambda value: isinstance(value, str), "text")
_NUMBER = _is(_whole, "whole number")
_REAL = _is(lambda value: _whole(value) or isinstance(value, float), "number")
_OBJECT = _is(lambda value: isinstance(value, dict), "object")


def _or_null(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _list_of(each: Check, what: str) -> Check:
    return _is(lambda value: isinstance(value, list) and not any(map(each, value)), f"list of {what}")


def _by_value(each: Check, what: str) -> Check:
    """An object whose keys are values of voxels."""

    def accepts(value: Any) -> bool:
        return isinstance(value, dict) and all(
            key.lstrip("-").isdecimal() and each(inner) is None for key, inner in value.items()
        )

    return _is(accepts, f"object of {what} by number")


def _entries(checks: Mapping[str, Check]) -> Check:
    """An object, of which these entries are right where they are there."""

    def check(value: Any) -> str | None:
        problem = _OBJECT(value)
        if problem is not None:
            return problem
        found = ((name, each(value[name])) for name, each in checks.items() if name in value)
        return next((f".{name}{problem}" for name, problem in found if problem is not None), None)

    return check


_ENTRIES: dict[str, Check] = {
    "labels": _by_value(_TEXT, "names"),
    "regions": _by_value(_list_of(_NUMBER, "values"), "lists of values"),
    "channels": _list_of(_TEXT, "names"),
    "cases": _is(
        lambda value: isinstance(value, dict) and not any(map(_TEXT, value.values())), "object of digests by id"
    ),
    "dataset": _or_null(_TEXT),
    "patient_pattern": _or_null(_TEXT),
    "preparation": _OBJECT,
    "settings": _OBJECT,
    "training": _entries({"losses": _list_of(_REAL, "numbers")}),
    "versions": _OBJECT,
    "imported": _OBJECT,
    "untrained": _entries({"outputs": _list_of(_NUMBER, "places"), "parts": _list_of(_TEXT, "names")}),
    "encoder": _entries({"prefix": _TEXT, "img_size": _list_of(_NUMBER, "sizes")}),
    "base": _entries(
        {
            "network": _TEXT,
            "arguments": _entries({"in_channels": _NUMBER, "out_channels": _NUMBER}),
            "path": _TEXT,
            "fingerprint": _TEXT,
            "outputs": _or_null(_list_of(_or_null(_NUMBER), "places")),
            "background": _or_null(_NUMBER),
        }
    ),
}
"""Entry of a record -> its check. To read another entry, add it."""


def record_problem(record: object) -> str | None:
    """What is wrong with a record, such as `labels is no object of names by number`; None where nothing is."""
    problem = _entries(_ENTRIES)(record)
    return None if problem is None else f"its record{problem}"
