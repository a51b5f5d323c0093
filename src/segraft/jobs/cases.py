"""Which cases a job works on, so that none serves twice unnoticed."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from segraft.data.case import images_of
from segraft.data.cohort import Case, Cohort
from segraft.data.splits import draw
from segraft.errors import SegraftError
from segraft.jobs.locating import holds_base
from segraft.jobs.watching import watched
from segraft.networks import read_base
from segraft.networks.checkpoints import weights_file
from segraft.networks.encoder_files import holds_encoder

UNLABELLED = "unlabelled"
"""The key of a record that says that its cases served without their labels."""


@dataclass(frozen=True)
class Chosen:
    """Cases, and what the user should know of the choice."""

    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Served:
    """Images that trained a file, as its record says.

    Attributes:
        digests: of the images, by case id.
        dataset: name of the cohort they are of.
        patient_pattern: that the cohort's patients were told by.
        unlabelled: they served without their labels, in masked pre-training.
    """

    digests: Mapping[str, str] = field(default_factory=dict)
    dataset: str | None = None
    patient_pattern: str | None = None
    unlabelled: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """What the record of an adapter or a base says."""
        known = record.get("cases", {}), record.get("dataset"), record.get("patient_pattern")
        return cls(*known, unlabelled=bool(record.get(UNLABELLED)) or holds_encoder(record))

    @classmethod
    def by_weights(cls, weights: str | Path) -> Self:
        """The images that trained weights, where they are a file of ours; of others that is not known."""
        path = weights_file(weights)
        return cls.of(read_base(path).record) if holds_base(path) else cls()

    def record(self) -> dict[str, Any]:
        """What the record of a file says that was made of such weights."""
        found = {"cases": dict(self.digests), "dataset": self.dataset, "patient_pattern": self.patient_pattern}
        return {**found, **({UNLABELLED: True} if self.unlabelled else {})} if self.digests else {}

    @property
    def told(self) -> tuple[str, str]:
        """What they did, for messages, and how."""
        if self.unlabelled:
            return "pre-trained the base's encoder", "without labels"
        return "trained the base", "on its own labels"


def read_cohort(data: str | Path, patient_pattern: str | None, *served: Served) -> Cohort:
    """Read a cohort, its patients told as before where the same cohort served with a pattern and none is given now."""
    cohort = Cohort.read(data, patient_pattern=patient_pattern)
    patterns = [each.patient_pattern for each in served if each.dataset == cohort.name and each.patient_pattern]
    if patient_pattern is None and patterns:
        return Cohort.read(data, patient_pattern=patterns[0])
    return cohort


def served_cases(
    cohort: Cohort, served: Served, console: Console | None = None, *, among: Sequence[str] | None = None
) -> frozenset[str]:
    """Ids of the cases of patients any of whose images, any channel of them (recognised by content), served before.

    Every image of all patients, or of those of the cases `among`, is read for that, with a progress bar on `console`.
    """
    if not served.digests:
        return frozenset()
    known = frozenset().union(*map(images_of, served.digests.values()))
    asked = {case.patient for case in cohort.cases if among is None or case.id in set(among)}
    theirs = [case for case in cohort.cases if case.patient in asked]
    cases = watched("comparing with scans that served", console)(theirs)
    patients = {case.patient for case in cases if images_of(case.digest()) & known}
    return frozenset(case.id for case in cohort.cases if case.patient in patients)


def choose(
    cohort: Cohort,
    count: int | Sequence[str] | None,
    *,
    seed: int,
    purpose: str,
    never: Served | None = None,
    avoid: Served | None = None,
    console: Console | None = None,
) -> Chosen:
    """Draw patients of a cohort.

    Args:
        cohort: to draw from.
        count: patients; None means all that may serve. Or the ids of the cases to take.
        seed: of the draw.
        purpose: for messages, such as "to adapt to".
        never: images whose patients must not serve: those the adapter itself was trained on.
        avoid: images whose patients serve only where there are not enough others: those the base was trained on.
        console: for progress; None is silent.

    Raises:
        SegraftError: fewer patients than asked for; an id that the cohort does not have, that is named twice, or that
            must not serve.
    """
    among = None if count is None or isinstance(count, int) else count
    excluded = served_cases(cohort, never or Served(), console, among=among)
    avoid = avoid or Served()
    avoided = served_cases(cohort, avoid, console, among=among)
    did, how = avoid.told
    notes = []
    if not (count is None or isinstance(count, int)):
        cases = _by_id(cohort, count, excluded, purpose)
        again = sum(case.id in avoided for case in cases)
        return Chosen(cases, (_again(again, purpose, did, how),) if again else ())
    allowed = [case for case in cohort.cases if case.id not in excluded]
    fresh = [case for case in allowed if case.id not in avoided]
    known = [case for case in allowed if case.id in avoided]
    patients, fresh_patients = len({case.patient for case in allowed}), len({case.patient for case in fresh})
    if count is not None and count < 1:
        raise SegraftError(f"{count} cases {purpose}: ask for at least 1.")
    if patients < (count or 1):
        because = f", as {len(excluded)} of its {len(cohort.cases)} cases trained the adapter" if excluded else ""
        raise SegraftError(
            f"{count or 1} cases {purpose} were asked for, but {cohort.path} has {patients}{because}: ask for fewer, "
            "or add labelled scans."
        )
    if excluded:
        notes.append(f"{len(excluded)} cases of {cohort.name} trained the adapter and are left out.")
    if fresh_patients >= (count or 1):
        if known:
            notes.append(f"{len(known)} cases of {cohort.name} {did} and are left out.")
        return Chosen(tuple(fresh) if count is None else draw(fresh, count, seed=seed), tuple(notes))
    more = tuple(known) if count is None else draw(known, count - fresh_patients, seed=seed)
    return Chosen((*fresh, *more), (*notes, _again(len(more), purpose, did, how)))


def _again(count: int, purpose: str, did: str, how: str) -> str:
    return (
        f"{count} of the cases {purpose} also {did} ({how}), as there are not enough others; to "
        "keep cases apart, pre-train with --cases."
    )


def _by_id(cohort: Cohort, ids: Sequence[str], excluded: AbstractSet[str], purpose: str) -> tuple[Case, ...]:
    known = {case.id: case for case in cohort.cases}
    for each in ids:
        if each not in known:
            raise SegraftError(f"case {each!r} {purpose} is not in {cohort.path}: name cases by their image files.")
        if each in excluded:
            raise SegraftError(f"case {each!r} trained the adapter and must not serve {purpose}: leave it out.")
        if ids.count(each) > 1:
            raise SegraftError(f"case {each!r} is named more than once {purpose}: name it once.")
    return tuple(known[each] for each in ids)
