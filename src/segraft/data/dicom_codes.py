"""What structures are called in DICOM: SNOMED CT codes, by the keywords of pydicom's dictionary (`codes.SCT`)."""

import re
from typing import TYPE_CHECKING, NamedTuple

from segraft.structures import has_synonyms, same_name

if TYPE_CHECKING:
    from pydicom.sr.coding import Code


class Structure(NamedTuple):
    """What a segment is of.

    Attributes:
        kind: keyword of the segmented property's type.
        side: "Left" or "Right", where the code has none.
        within: keyword of the structure that something abnormal lies in.
        category: keyword of the segmented property's category, as in CID 7150.
    """

    kind: str
    side: str = ""
    within: str = ""
    category: str = "AnatomicalStructure"


UNKNOWN = Structure("Tissue", category="Tissue")
"""Of names that are not in the table: what they are is in the segment's label alone."""

_ABNORMAL = "MorphologicallyAbnormalStructure"


def _organs(*keywords: str) -> dict[str, Structure]:
    """Names that are the keyword in words: `InferiorVenaCava` is "inferior vena cava"."""
    return {re.sub("(?<!^)(?=[A-Z])", " ", keyword).lower(): Structure(keyword) for keyword in keywords}


def _in_organs(word: str, kind: str, **keywords: str) -> dict[str, Structure]:
    """Names such as "liver tumor"."""
    return {
        f"{organ} {word}": Structure(kind, within=keyword, category=_ABNORMAL) for organ, keyword in keywords.items()
    }


PAIRED = _organs("Kidney", "AdrenalGland", "Lung", "Femur", "Hippocampus", "Scapula", "Clavicle", "Humerus")
"""Those that there is one of on each side, by one code."""

STRUCTURES: dict[str, Structure] = {
    **_organs(
        *("Liver", "Spleen", "Pancreas", "Gallbladder", "Stomach", "Duodenum", "Esophagus", "Colon", "Bladder"),
        *("Prostate", "Uterus", "Aorta", "InferiorVenaCava", "SuperiorVenaCava", "PortalVein", "Heart", "Trachea"),
        *("Brain", "SpinalCord", "Skull", "Sacrum", "LeftAtrium", "RightAtrium", "LeftVentricle", "RightVentricle"),
        *("PulmonaryArtery", "SmallIntestine", "Bone"),
    ),
    **PAIRED,
    "celiac trunk": Structure("CeliacAxis"),
    **_in_organs("tumor", "Neoplasm", liver="Liver", kidney="Kidney", lung="Lung", pancreas="Pancreas", colon="Colon"),
    **{name: Structure("Neoplasm", category=_ABNORMAL) for name in ("tumor", "tumour", "neoplasm")},
    "lesion": Structure("Lesion", category=_ABNORMAL),
    "edema": Structure("Edema", category=_ABNORMAL),
    **{name: Structure("Hematoma", category=_ABNORMAL) for name in ("hematoma", "haematoma")},
    **{name: Structure("Hemorrhage", category=_ABNORMAL) for name in ("hemorrhage", "haemorrhage")},
}
"""Name as `structures.same_name` gives it -> its codes."""


def structure_of(name: str) -> Structure:
    """The codes of a label, by its name in any spelling that `structures` knows; "left …" and "… left" are a side."""
    known = same_name(name)
    if known in STRUCTURES:
        return STRUCTURES[known]
    for side in ("Left", "Right"):
        bare = known.removeprefix(f"{side.lower()} ").removesuffix(f" {side.lower()}")
        if bare != known and bare in PAIRED:
            return PAIRED[bare]._replace(side=side)
    return UNKNOWN


def is_known(name: str) -> bool:
    """Whether a label's name, in any spelling, is a structure's in the tables here or in `structures`."""
    return structure_of(name) is not UNKNOWN or has_synonyms(name)


def code(keyword: str) -> "Code":
    """The SNOMED CT code of a keyword."""
    from pydicom.sr.codedict import codes

    found: Code = getattr(codes.SCT, keyword)
    return found
