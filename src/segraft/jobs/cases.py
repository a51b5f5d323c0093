"""Which cases a job works on, so that none serves twice unnoticed."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from segraft.data.cohort import Case, Cohort
from segraft.data.splits import draw
from segraft.errors import SegraftError


@dataclass(frozen=True)
class Chosen:
    """Cases, and what the user should know of the choice."""

    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()


def served_cases(cohort: Cohort, digests: Mapping[str, str]) -> frozenset[str]:
    """Ids of the cases of patients any of whose images (recognised by content) served before."""
    if not digests:
        return frozenset()
    known = set(digests.values())
    patients = {case.patient for case in cohort.cases if case.digest() in known}
    return frozenset(case.id for case in cohort.cases if case.patient in patients)


def choose(
    cohort: Cohort,
    count: int | Sequence[str] | None,
    *,
    seed: int,
    never: Mapping[str, str],
    avoid: Mapping[str, str],
    purpose: str,
) -> Chosen:
    """Draw patients of a cohort.

    Args:
        cohort: to draw from.
        count: patients; None means all that may serve. Or the ids of the cases to take.
        seed: of the draw.
        never: images (id -> digest) whose patients must not serve: those the adapter itself was trained on.
        avoid: images whose patients serve only where there are not enough others: those the base was trained on.
        purpose: for messages, such as "to adapt to".

    Raises:
        SegraftError: fewer patients than asked for; an id that the cohort does not have, or that must not serve.
    """
    excluded, avoided = served_cases(cohort, never), served_cases(cohort, avoid)
    if not (count is None or isinstance(count, int)):
        return Chosen(_by_id(cohort, count, excluded, purpose))
    allowed = [case for case in cohort.cases if case.id not in excluded]
    fresh = [case for case in allowed if case.id not in avoided]
    patients = len({case.patient for case in allowed})
    if count is not None and count < 1:
        raise SegraftError(f"{count} cases {purpose}: ask for at least 1.")
    if patients < (count or 1):
        because = f", as {len(excluded)} of its {len(cohort.cases)} cases trained the adapter" if excluded else ""
        raise SegraftError(
            f"{count or 1} cases {purpose} were asked for, but {cohort.path} has {patients}{because}: ask for fewer, "
            "or add labelled scans."
        )
    notes = []
    if excluded:
        notes.append(f"{len(excluded)} cases of {cohort.name} trained the adapter and are left out.")
    if len({case.patient for case in fresh}) >= (count or 1):
        if len(fresh) < len(allowed):
            notes.append(f"{len(allowed) - len(fresh)} cases of {cohort.name} trained the base and are left out.")
        pool: Sequence[Case] = fresh
    else:
        notes.append(
            f"All or nearly all cases of {cohort.name} also trained the base (on its own labels), so some of them "
            f"serve {purpose}; to keep cases apart, pre-train with --cases."
        )
        pool = allowed
    cases = tuple(pool) if count is None else draw(pool, count, seed=seed)
    return Chosen(cases, tuple(notes))


def _by_id(cohort: Cohort, ids: Sequence[str], excluded: AbstractSet[str], purpose: str) -> tuple[Case, ...]:
    known = {case.id: case for case in cohort.cases}
    for each in ids:
        if each not in known:
            raise SegraftError(f"case {each!r} {purpose} is not in {cohort.path}: name cases by their image files.")
        if each in excluded:
            raise SegraftError(f"case {each!r} trained the adapter and must not serve {purpose}: leave it out.")
    return tuple(known[each] for each in ids)
