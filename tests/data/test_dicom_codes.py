"""Codes of structures: each keyword is in pydicom's dictionary, each name in the spelling that it is looked up by."""

import pytest
from pydicom.sr.codedict import codes

from segraft.data.dicom_codes import PAIRED, STRUCTURES, UNKNOWN, code, structure_of
from segraft.structures import same_name

CATEGORIES = {concept.value for concept in map(codes.cid7150.__getattr__, codes.cid7150.dir())}


@pytest.mark.parametrize(("name", "structure"), STRUCTURES.items(), ids=list(STRUCTURES))
def test_table(name, structure):
    assert same_name(name) == name
    assert structure_of(name) == structure
    assert code(structure.category).value in CATEGORIES
    assert code(structure.kind).scheme_designator == "SCT"
    if structure.within:
        assert code(structure.within).scheme_designator == "SCT"


@pytest.mark.parametrize("name", PAIRED)
def test_sides(name):
    for side in ("Left", "Right"):
        for spelling in (f"{side} {name}", f"{name}_{side.lower()}"):
            found = structure_of(spelling)
            assert (found.kind, found.side) == (PAIRED[name].kind, side)


@pytest.mark.parametrize(
    ("name", "meaning", "side"),
    [
        ("Postcava", "Inferior vena cava", ""),
        ("lkidney", "Kidney", "Left"),
        ("adrenal_gland_right", "Adrenal gland", "Right"),
        ("heart atrium left", "Left atrium", ""),
        ("liver_tumor", "Neoplasm", ""),
        ("rim", "Tissue", ""),
        ("left liver", "Tissue", ""),
    ],
)
def test_spellings(name, meaning, side):
    found = structure_of(name)
    assert (code(found.kind).meaning, found.side) == (meaning, side)
    assert (found is UNKNOWN) == (meaning == "Tissue")
