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

_FIRST_NAME = {name: names[0] for names in SYNONYMS for name in names}


def same_name(name: str) -> str:
    """What two names of one structure have in common: case, `_`, `-` and blanks do not count, nor do `SYNONYMS`."""
    plain = " ".join(re.split(r"[\s_-]+", name.strip().casefold()))
    return _FIRST_NAME.get(plain, plain)
