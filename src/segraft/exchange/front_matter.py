"""The metadata in front of a page on the Hub, which anyone may have written: read as texts."""

from collections.abc import Collection
from typing import Any

import yaml

LONGEST = 100_000
"""Characters of metadata that are read; those of real pages have some thousand at most."""


def front_matter(card: str) -> dict[str, Any]:
    """The metadata in front of a page, all values as texts; none where there is none, or it is not readable."""
    try:
        found = yaml.load(_head(card), yaml.BaseLoader)  # noqa: S506  of which every value is a text
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def metadata_of_others(card: str, ours: Collection[str]) -> str:
    """Lines of YAML with the metadata of a page that is not ours, as it stands there.

    Args:
        card: text of the page.
        ours: keys to leave out.
    """
    try:
        found = yaml.compose(_head(card), yaml.SafeLoader)
        if not isinstance(found, yaml.MappingNode):
            return ""
        found.value = [(key, value) for key, value in found.value if key.value not in ours]
        found.flow_style = False
        return yaml.serialize(found, Dumper=yaml.SafeDumper, allow_unicode=True) if found.value else ""
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return ""


def _head(card: str) -> str:
    head, *rest = card[: LONGEST + 8].removeprefix("---\n").split("\n---", 1)
    return head if card.startswith("---\n") and rest else ""
