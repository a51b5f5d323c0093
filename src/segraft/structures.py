"""Names of anatomical structures, which every data set spells its own way."""

import re

SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("right kidney", "kidney right", "rkidney"),
    ("left kidney", "kidney left", "lkidney"),
    ("gallbladder", "gall bladder", "gall"),
    ("esophagus", "oesophagus"),
    ("inferior vena cava", "ivc", "postcava"),
    ("portal and splenic veins", "portal vein and splenic vein", "psv"),
    ("right adrenal gland", "adrenal gland right", "radrenal", "rag"),
    ("left adrenal gland", "adrenal gland left", "ladrenal", "lag"),
    ("bladder", "urinary bladder"),
    ("prostate or uterus", "prostate/uterus", "prost ut"),
    ("celiac trunk", "celiac truck"),
    ("right lung", "rlung"),
    ("left lung", "llung"),
    ("left atrium", "heart atrium left"),
    ("right atrium", "heart atrium right"),
    ("left ventricle", "heart ventricle left"),
    ("right ventricle", "heart ventricle right"),
    ("myocardium", "heart myocardium"),
)
"""Names of one structure in BTCV, AMOS, FLARE'22, TotalSegmentator and the few-shot paper's templates."""

_COLOURS = (
    "red|green|blue|yellow|orange|purple|violet|pink|brown|gold|olive|cyan|magenta|turquoise|teal|lime|navy|maroon|"
    "black|white|gr[ae]y|silver"
)
_GENERIC = re.compile(
    r"(unnamed |new )?(segment|segmentation|label|mask|roi|region|structure|object|class|value)? ?\d*|"
    rf"((light|dark|bright|pale) )?({_COLOURS})( ?\d+)?"
)
_FIRST_NAME = {name: names[0] for names in SYNONYMS for name in names}


def same_name(name: str) -> str:
    """What two names of one structure have in common: case, `_`, `-` and blanks do not count, nor do `SYNONYMS`."""
    plain = " ".join(re.split(r"[\s_-]+", name.strip().casefold()))
    return _FIRST_NAME.get(plain, plain)


def has_synonyms(name: str) -> bool:
    """Whether a name is in `SYNONYMS`."""
    return same_name(name) in _FIRST_NAME


def says_nothing(name: str) -> bool:
    """Whether a name is one that tools give where nobody named a structure: none, a number, "Segment 1", a colour."""
    return _GENERIC.fullmatch(same_name(name)) is not None
