"""Lower packages never import higher ones, and files stay small: docs/architecture.md, held by reading the imports."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "segraft"
FILES = sorted(SOURCE.rglob("*.py"))

GROUND = {"errors", "atomic", "_version", "structures"}
MAY_IMPORT = {
    "errors": set(),
    "_version": set(),
    "allocation": set(),
    "structures": set(),
    "atomic": {"errors"},
    "adapters": GROUND,
    "networks": GROUND | {"adapters"},
    "data": GROUND,
    "evaluation": GROUND | {"data"},
    "inference": GROUND,
    "training": GROUND | {"adapters", "networks", "data"},
    "exchange": GROUND | {"adapters", "networks", "data", "inference", "training"},
    "jobs": GROUND | {"adapters", "networks", "data", "evaluation", "inference", "training", "exchange"},
    "studies": GROUND | {"adapters", "networks", "data", "evaluation", "training", "jobs", "allocation"},
    "cli": GROUND
    | {
        "adapters",
        "networks",
        "data",
        "evaluation",
        "inference",
        "training",
        "exchange",
        "jobs",
        "allocation",
        "studies",
    },
}
"""Room -> rooms it may import, beside itself."""

NEEDED_BY_ADAPTERS = {"torch"}
NEEDED_BY_ADAPTER_FILES = NEEDED_BY_ADAPTERS | {"safetensors"}


def room(path: Path) -> str:
    """The package, or the lone module, that a file belongs to; empty for the package's own `__init__`."""
    first = path.relative_to(SOURCE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names of everything that a file imports, `from a import b` as a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(SOURCE.parent).parts[: -node.level] if node.level else ()
            module = ".".join((*package, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def of_this_package(names: Iterator[str]) -> set[str]:
    """The rooms among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("segraft.")}


def of_others(names: Iterator[str]) -> set[str]:
    """Third-party packages among imported names."""
    return {name.split(".")[0] for name in names} - {"segraft", "__future__"} - sys.stdlib_module_names


def test_every_room_has_its_place():
    assert {room(path) for path in FILES} - {""} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_lower_packages_never_import_higher_ones(path):
    here = room(path)
    if here:
        assert of_this_package(imports(path)) <= MAY_IMPORT[here] | {here}
        # `import segraft` alone would reach every room through its lazy attributes.
        assert "segraft" not in set(imports(path))


def test_the_order_has_no_cycle():
    order = list(MAY_IMPORT)
    for name, below in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(name) for other in below), name


def test_the_face_imports_nothing_heavy():
    face = SOURCE / "__init__.py"
    assert of_this_package(imports(face, top_level_only=True)) <= {"_version", "errors"}
    assert not of_others(imports(face, top_level_only=True))


@pytest.mark.parametrize("path", [path for path in FILES if room(path) == "adapters"], ids=lambda path: path.stem)
def test_the_adapter_core_needs_torch_alone(path):
    assert of_others(imports(path, top_level_only=True)) <= NEEDED_BY_ADAPTERS
    assert of_others(imports(path)) <= NEEDED_BY_ADAPTER_FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_the_reader_of_imports_reads():
    files = SOURCE / "adapters" / "files.py"
    assert of_this_package(imports(files)) == {"_version", "adapters", "atomic", "errors"}
    assert of_others(imports(files)) == {"torch", "safetensors"}
    assert of_others(imports(files, top_level_only=True)) == {"torch"}
