"""Masks that a bundle's function paints region by region."""

import ast
from typing import Any, NamedTuple


class Painted(NamedTuple):
    """An output, the value that it is painted with, and where: above a cut (or at it, where that is inclusive)."""

    output: int
    value: int
    cut: float
    inclusive: bool


def painting_of(function: Any) -> tuple[Painted, ...]:
    """In the order of painting, of `$lambda x: torch.where(x[[2]] > 0, 4, torch.where(…, 0))`.

    The expression is looked at, not run; empty where it is of another form.
    """
    try:
        tree = ast.parse(str(function).removeprefix("$").strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    node: ast.AST = tree.body if isinstance(tree, ast.Lambda) else tree
    order = []
    while True:
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="torch"), attr="where"),
                args=[
                    ast.Compare(
                        left=ast.Subscript(value=ast.Name(), slice=place),
                        ops=[ast.Gt() | ast.GtE() as operator],
                        comparators=[ast.Constant(value=int() | float() as cut)],
                    ),
                    ast.Constant(value=int(value)),
                    rest,
                ],
            ):
                output = place.elts[0] if isinstance(place, ast.List) and len(place.elts) == 1 else place
                if not (isinstance(output, ast.Constant) and isinstance(output.value, int)):
                    return ()
                order.append(Painted(output.value, value, cut, isinstance(operator, ast.GtE)))
                node = rest
            case ast.Constant(value=0):
                return tuple(reversed(order))
            case _:
                return ()
