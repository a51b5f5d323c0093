"""Metadata of pages that anyone may have written."""

import pytest
import yaml

from segraft.exchange.front_matter import LONGEST, front_matter, metadata_of_others

OURS = ("tags", "license")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("2001-13-41", "2001-13-41"), ("2001-01-01", "2001-01-01"), ("no", "no"), ("1_0", "1_0"), ("!!int x", "x")],
)
def test_values_are_texts(value, wanted):
    assert front_matter(f"---\nbase_model: {value}\n---\n") == {"base_model": wanted}


@pytest.mark.parametrize(
    "head", ["a: " + "[" * 5000, "{" * 5000, "a: [", "a: *b", "\x00", "x" * (LONGEST + 1), "- a", "? {a: 1}\n: b"]
)
def test_what_cannot_be_read_is_none(head):
    card = f"---\n{head}\n---\n"
    assert front_matter(card) == {}
    metadata_of_others(card, OURS)


def test_what_a_person_added_stays_as_it_is():
    head = "tags: [a]\nextra_gated_prompt: |\n  Sign\n  the DUA: now\ninference: false\n"
    head += "language: [en, 'no']\nlicense: mit\nn: 1.0\n"
    kept = metadata_of_others(f"---\n{head}---\n# page", OURS)
    assert yaml.safe_load(kept) == {
        "extra_gated_prompt": "Sign\nthe DUA: now\n",
        "inference": False,
        "language": ["en", "no"],
        "n": 1.0,
    }
    assert metadata_of_others("---\ntags: [a]\n---\n", OURS) == metadata_of_others("no head", OURS) == ""
