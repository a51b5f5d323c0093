"""Configurations of MONAI bundles read as data: references are followed, and no expression is ever run.

In MONAI's language `@a#b` (or `@a::b`) is the value at that place, `%a#b` its text, `$…` a Python expression, and
`_target_` the class of an object.
"""

import ast
import json
import operator
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from segraft.errors import SegraftError

SUFFIXES = (".json", ".yaml", ".yml")
DEPTH = 50
"""References in a row, after which they are taken to lead in a circle."""

_REFERENCE = re.compile(r"@(?:[A-Za-z_]\w*)(?:(?:#|::)\w+)*")
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "os.path.join": posixpath.join,
    "os.path.exists": lambda path: Path(path).exists(),
    "os.path.isfile": lambda path: Path(path).is_file(),
}
"""The only calls that are done, by functions of ours, as bundles name their weights' file so."""

NESTED = 100
"""Lists and mappings one inside the other, more than which no configuration has."""


class Config:
    """A configuration, of which values are asked for by place.

    Args:
        values: as in the file.
        path: of it, for messages.
        known: values that stand in place of the file's, such as where the bundle is.
    """

    def __init__(self, values: Mapping[str, Any], path: Path, known: Mapping[str, Any] | None = None) -> None:
        self.values, self.path = {**values, **(known or {})}, path

    def has(self, place: str) -> bool:
        """Whether there is anything at `a#b`."""
        try:
            self._raw(place)
        except KeyError:
            return False
        return True

    def raw(self, place: str) -> Any:
        """What stands at `a#b`, as it is; None where there is nothing."""
        return self._raw(place) if self.has(place) else None

    def value(self, place: str) -> Any:
        """What stands at `a#b`, with references followed and arithmetic done.

        Raises:
            SegraftError: there is nothing, or it would have to be run.
        """
        return self._at(place, 0)

    def resolve(self, raw: Any) -> Any:
        """Any part of the file, likewise."""
        return self._resolved(raw, 0)

    def followed(self, raw: Any) -> Any:
        """The same with references followed at the outermost level alone."""
        for _ in range(DEPTH):
            if not (isinstance(raw, str) and _REFERENCE.fullmatch(raw)):
                return raw
            raw = self._required(raw[1:])
        raise self._circle()

    def disabled(self, part: Mapping[str, Any]) -> bool:
        """Whether a component is switched off, as MONAI reads it.

        Raises:
            SegraftError: that would have to be run.
        """
        value = self.resolve(part.get("_disabled_", False))
        return value.strip().casefold() == "true" if isinstance(value, str) else bool(value)

    def _raw(self, place: str) -> Any:
        found: Any = self.values
        for step in place.replace("::", "#").split("#"):
            if isinstance(found, Mapping) and step in found:
                found = found[step]
            elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            else:
                raise KeyError(place)
        return found

    def _required(self, place: str) -> Any:
        try:
            return self._raw(place)
        except KeyError as error:
            raise SegraftError(f"{self.path} refers to {place!r}, which is not in it: correct it.") from error

    def _at(self, place: str, depth: int) -> Any:
        return self._resolved(self._required(place), depth)

    def _resolved(self, raw: Any, depth: int) -> Any:
        if depth > DEPTH:
            raise self._circle()
        if isinstance(raw, Mapping):
            return {key: self._resolved(value, depth + 1) for key, value in raw.items()}
        if isinstance(raw, list):
            return [self._resolved(value, depth + 1) for value in raw]
        if not isinstance(raw, str):
            return raw
        if raw.startswith("$"):
            return self._computed(raw, depth)
        if _REFERENCE.fullmatch(raw):
            return self._at(raw[1:], depth + 1)
        if raw.startswith("%"):
            return self._at(raw[1:], depth + 1) if self.has(raw[1:]) else raw
        return raw

    def _computed(self, text: str, depth: int) -> Any:
        """An expression of literals, references, arithmetic and conditions."""
        names: dict[str, str] = {}

        def named(match: re.Match[str]) -> str:
            return names.setdefault(match[0], f"_reference_{len(names)}")

        replaced = _REFERENCE.sub(named, text[1:].strip())
        places = {name: place[1:] for place, name in names.items()}
        try:
            tree = ast.parse(replaced, mode="eval").body
            return self._evaluated(tree, places, depth)
        except SegraftError:
            raise
        except (SyntaxError, TypeError, ValueError, ArithmeticError, OSError, RecursionError) as error:
            raise SegraftError(
                f"{self.path} computes {text!r}, and expressions of bundles are not run: write its value there."
            ) from error

    def _evaluated(self, node: ast.AST, places: Mapping[str, str], depth: int) -> Any:
        def inner(part: ast.AST) -> Any:
            return self._evaluated(part, places, depth)

        if isinstance(node, ast.Name) and node.id in places:
            return self._at(places[node.id], depth + 1)
        for part in (_contained, _operated, _chosen, _called):
            found = part(node, inner)
            if found is not _NOT:
                return found
        raise ValueError(ast.dump(node))

    def _circle(self) -> SegraftError:
        return SegraftError(f"{self.path} has references that lead in a circle: correct it.")


_NOT = object()
Inner = Callable[[ast.AST], Any]


def _contained(node: ast.AST, inner: Inner) -> Any:
    """A literal, or a list or mapping of parts."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [inner(part) for part in parts]
        case ast.Dict(keys=keys, values=parts) if None not in keys:
            return {inner(key): inner(part) for key, part in zip(keys, parts, strict=True) if key is not None}
    return _NOT


def _operated(node: ast.AST, inner: Inner) -> Any:
    """Arithmetic, and equality."""
    match node:
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](inner(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            values = inner(left), inner(right)
            _require_short(op, *values)
            return _OPERATORS[type(op)](*values)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](inner(left), inner(right))
    return _NOT


def _chosen(node: ast.AST, inner: Inner) -> Any:
    """Conditions."""
    match node:
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(inner(part) for part in parts)
        case ast.BoolOp(op=ast.Or(), values=parts):
            return any(inner(part) for part in parts)
        case ast.IfExp(test=test, body=body, orelse=other):
            return inner(body) if inner(test) else inner(other)
    return _NOT


def _called(node: ast.AST, inner: Inner) -> Any:
    """One of few functions of texts."""
    match node:
        case ast.Call(func=ast.Attribute() as function, args=parts, keywords=[]) if ast.unparse(function) in _CALLS:
            given = [inner(part) for part in parts]
            if not all(isinstance(each, str) for each in given):
                raise ValueError("a path is no text")
            return _CALLS[ast.unparse(function)](*given)
    return _NOT


def _require_short(op: ast.operator, left: Any, right: Any) -> None:
    """Refuse arithmetic that repeats or formats text and lists without end."""
    long = isinstance(left, str | list) or isinstance(right, str | list)
    if long and not isinstance(op, ast.Add):
        raise ValueError("arithmetic with text")


def read_config(path: Path, known: Mapping[str, Any] | None = None) -> Config:
    """A configuration file.

    Raises:
        SegraftError: it cannot be read, or holds no mapping.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SegraftError(f"{path} is not a readable configuration ({error}): is it complete?") from error
    if not isinstance(values, dict):
        raise SegraftError(f"{path} holds no mapping of names to values: is it a configuration of a bundle?")
    _require_shallow(values, path)
    return Config(values, path, known)


def _require_shallow(values: dict[str, Any], path: Path) -> None:
    """Refuse what is nested without end, such as a YAML file's list that holds itself."""
    level: list[Any] = [values]
    for _ in range(NESTED):
        parts = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
        level = list({id(part): part for part in parts if isinstance(part, dict | list)}.values())
        if not level:
            return
    raise SegraftError(f"{path} has more than {NESTED} lists and mappings one inside the other: is it a configuration?")


def config_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of these names that is there, with any suffix of a configuration."""
    found = (folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES)
    return next((path for path in found if path.is_file()), None)
