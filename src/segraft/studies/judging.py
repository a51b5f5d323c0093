"""What a cross-validated study found: the ranks chosen, the tests against the reference, the volumes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from segraft.errors import SegraftError
from segraft.evaluation.agreement import Agreement, agreement
from segraft.evaluation.selection import best_on_all, nested, scores_of_choice
from segraft.evaluation.statistics import best_arm, compare
from segraft.studies.scores import Scores, counted
from segraft.studies.spec import BEST_STRATEGY


@dataclass(frozen=True)
class Entrant:
    """What takes part in the comparison: an arm, or a family at its chosen rank.

    Attributes:
        name: such as `dora_c 64 (unet)`, or `dora_c, nested (unet)`.
        family: without the rank.
        arm: the arm that it is; of a nested choice the one most often chosen, as examples are drawn from it.
        dice: patient -> Dice.
        ranks: chosen, in the order of the folds for a nested choice.
    """

    name: str
    family: str
    arm: str
    dice: Mapping[str, float]
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """Attributes:
    strategies: arms without factors, in the study's order.
    methods: families with factors, each at the rank with the best mean Dice over all patients.
    nested: the same families, their rank chosen inside the training folds; empty if the study does not.
    reference: the entrant that methods are tested against; None if it is not complete.
    nested_reference: the same, with its rank chosen inside the training folds if it is a family.
    tests: of `methods` against it, as of `compare`; None without a reference.
    nested_tests: of `nested` likewise.
    best: the entrant with the highest mean Dice.
    agreement: of its volumes; None with fewer than three patients, or where all annotated volumes are equal.
    strata: name -> patients, by annotated volume.
    notes: what is missing, and why.
    """

    strategies: tuple[Entrant, ...]
    methods: tuple[Entrant, ...]
    nested: tuple[Entrant, ...]
    reference: Entrant | None
    nested_reference: Entrant | None
    tests: pd.DataFrame | None
    nested_tests: pd.DataFrame | None
    best: Entrant | None
    agreement: Agreement | None
    strata: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def judge(scores: Scores) -> Judgement:
    """Compare all that is complete; what is not is named in the notes and left out, never filled up."""
    study, missing = scores.plan.study, scores.missing
    notes = []
    whole = []
    for name in scores.plan.arms:
        if lacking := scores.lacking(name):
            notes.append(f"{name}: {counted(len(lacking))}, so it is left out of the comparison.")
        else:
            whole.append(name)
    arms = scores.plan.arms
    strategies = tuple(Entrant(arm, arms[arm].family, arm, scores.dice(arm)) for arm in whole if arms[arm].rank is None)
    methods = _at_best(scores, _table(scores, [arm for arm in whole if arms[arm].rank is not None]))
    several = [family for family in _families(scores) if study.nested and (study.folds or 0) > 2]
    unready = {arms[arm].family for arm in missing if arm in arms}
    notes += [
        f"{family}: its rank cannot be chosen inside the training folds, as runs are missing."
        for family in several
        if family in unready
    ]
    ready = [name for name, arm in arms.items() if arm.family in several and arm.family not in unready]
    inside = _chosen_inside(scores, _table(scores, ready))
    reference = _reference(scores, study.reference, strategies, methods, whole)
    if reference is None:
        notes.append(f"The reference of the tests, {study.reference}, has no complete result, so nothing is tested.")
    # A method's choice inside the training folds is held against the reference's own, if that is a method too.
    inner = next((entrant for entrant in inside if entrant.family == study.reference), reference)
    best = _best((*strategies, *methods))
    return Judgement(
        strategies,
        methods,
        inside,
        reference,
        inner,
        _tests(methods, reference),
        _tests(inside, inner),
        best,
        _agreement(scores, best),
        strata(scores.annotated_ml(), study.strata_ml),
        tuple(notes),
    )


def strata(volumes_ml: Mapping[str, float], ends: Sequence[float] | str) -> dict[str, tuple[str, ...]]:
    """Name -> patients, by annotated volume: (low, high] in mL.

    Args:
        volumes_ml: patient -> annotated volume in mL.
        ends: upper ends in mL; or `tertiles`, a third of the patients each. What is above the last end has a stratum
            of its own, as has 0 mL, if there is any.
    """
    if not volumes_ml:
        return {}
    if isinstance(ends, str):
        ends = sorted({float(np.quantile(list(volumes_ml.values()), part)) for part in (1 / 3, 2 / 3, 1)})
    edges = [0.0, *ends]
    texts = _told_apart(edges)
    named = dict(zip((f"({low}, {high}]" for low, high in pairwise(texts)), pairwise(edges), strict=True))
    found = {name: [p for p, v in volumes_ml.items() if low < v <= high] for name, (low, high) in named.items()}
    nothing = [p for p, v in volumes_ml.items() if v <= 0]
    above = [p for p, v in volumes_ml.items() if v > edges[-1]]
    whole = {**({"none": nothing} if nothing else {}), **found, **({f">{texts[-1]}": above} if above else {})}
    return {name: tuple(patients) for name, patients in whole.items()}


def _told_apart(numbers: Sequence[float]) -> list[str]:
    """With three digits, or as many more as make each a text of its own."""
    for digits in range(3, 17):
        texts = [np.format_float_positional(n, digits, unique=False, fractional=False, trim="-") for n in numbers]
        if len(set(texts)) == len(texts):
            break
    return texts


def _families(scores: Scores) -> list[str]:
    """Those with more ranks than one."""
    families = [arm.family for arm in scores.plan.arms.values()]
    return [family for family in dict.fromkeys(families) if families.count(family) > 1]


def _table(scores: Scores, arms: Sequence[str]) -> pd.DataFrame:
    """Of these arms, as `segraft.evaluation.selection` takes it: a method is a family here."""
    rows = scores.table[scores.table["arm"].isin(arms)]
    return rows.drop(columns="method").rename(columns={"family": "method"})


def _at_best(scores: Scores, table: pd.DataFrame) -> tuple[Entrant, ...]:
    if table.empty:
        return ()
    choice = best_on_all(table)
    dice = scores_of_choice(table, choice)
    arms = {(arm.family, arm.rank): name for name, arm in scores.plan.arms.items()}
    return tuple(
        Entrant(arms[family, rank], family, arms[family, rank], dice[family], (rank,))
        for family, rank in choice.items()
    )


def _chosen_inside(scores: Scores, table: pd.DataFrame) -> tuple[Entrant, ...]:
    if table.empty:
        return ()
    choice = nested(table)
    dice = scores_of_choice(table, choice)
    arms = {(arm.family, arm.rank): name for name, arm in scores.plan.arms.items()}
    entrants = []
    for family in dict.fromkeys(family for family, _ in choice):
        ranks = tuple(rank for (each, _), rank in sorted(choice.items()) if each == family)
        often = max(sorted(set(ranks)), key=ranks.count)
        name = scores.plan.arms[arms[family, often]].at("/".join(map(str, ranks)))
        entrants.append(Entrant(name, family, arms[family, often], dice[family], ranks))
    return tuple(entrants)


def _reference(
    scores: Scores, asked: str, strategies: Sequence[Entrant], methods: Sequence[Entrant], whole: Sequence[str]
) -> Entrant | None:
    if asked == BEST_STRATEGY:
        return _best(strategies)
    if asked in whole:  # an arm, whether or not its rank is the best
        arm = scores.plan.arms[asked]
        return Entrant(asked, arm.family, asked, scores.dice(asked), () if arm.rank is None else (arm.rank,))
    return next((entrant for entrant in methods if entrant.family == asked), None)


def _best(entrants: Sequence[Entrant]) -> Entrant | None:
    if not entrants:
        return None
    dice = {entrant.name: entrant.dice for entrant in entrants}
    name = best_arm(dice, list(dice))
    return next(entrant for entrant in entrants if entrant.name == name)


def _tests(entrants: Sequence[Entrant], reference: Entrant | None) -> pd.DataFrame | None:
    others = [entrant for entrant in entrants if reference is not None and entrant.name != reference.name]
    if reference is None or not others:
        return None
    return compare({entrant.name: entrant.dice for entrant in (reference, *others)}, reference.name)


def _agreement(scores: Scores, best: Entrant | None) -> Agreement | None:
    if best is None:
        return None
    volumes = scores.volumes_ml(best.arm)
    try:
        return agreement([p for p, _ in volumes.values()], [t for _, t in volumes.values()])
    except SegraftError:
        return None
