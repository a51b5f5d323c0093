"""A cohort: the cases, labels and modalities that are found in one of the layouts that data sets are published in."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from segraft.data.case import Case
from segraft.data.labels import Labels, paint_values
from segraft.data.layouts import read_layout
from segraft.errors import SegraftError
from segraft.structures import same_name

__all__ = ["Case", "Cohort"]

_MANY = 20  # labels: more are not listed in a message


@dataclass(frozen=True)
class Cohort:
    """What one place lists.

    Attributes:
        name: of the cohort.
        path: the list, or the folder where a layout has none.
        labels: mask values -> names, background (0) left out; or regions (`Labels`), which cover mask values.
        modalities: of the images, one per channel, in order; none where they are not named.
        cases: scans with their labels.
        patient_pattern: the expression that the patients were told by, None where there was none.
    """

    name: str
    path: Path
    labels: dict[int, str]
    modalities: tuple[str, ...]
    cases: tuple[Case, ...]
    patient_pattern: str | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        """A name for each channel of its images; of a single one it may be empty."""
        return self.modalities or ("",)

    @property
    def values(self) -> tuple[int, ...]:
        """What may stand in its masks, background left out."""
        return Labels.of(self.labels).values_covered

    @classmethod
    def read(cls, path: str | Path, *, patient_pattern: str | None = None) -> "Cohort":
        """Read a cohort in any layout of `layouts.LAYOUTS`: a `dataset.json`, TotalSegmentator, FLARE'22, or a list.

        Cases are named after their files or folders. The patient of a case is what its layout says, else the first
        group of `patient_pattern` searched in the id, else the id.

        Args:
            path: the list, or a folder.
            patient_pattern: regular expression with a group, for cohorts with several scans of a patient.

        Raises:
            SegraftError: nothing there in a layout that is known, or a pattern that fits no patient; what the reader of
                the layout refuses.
        """
        listed = read_layout(Path(path), patient_pattern)
        return cls(listed.name, listed.path, listed.labels, listed.modalities, listed.cases, patient_pattern)

    def select_labels(self, asked: Sequence[str]) -> Labels:
        """The labels asked for, by number or name, in the order asked; all if none is.

        Case does not matter, and a structure may be called as other data sets call it (`left kidney`, `kidney_left`).

        `name=1+2+3` asks for a region of that name, which covers several values of the cohort's masks, given as numbers
        or by their names. Where one is asked for so, all that are asked for are regions, which may overlap, and those
        asked for later lie above the others in masks that are written; see `paint_values` for the values there.

        Raises:
            SegraftError: a label that the cohort does not have, or one asked for twice.
        """
        mine = Labels.of(self.labels)
        covers: dict[str, tuple[int, ...]] = {}
        numbers = []
        for label in asked:
            number, (name, equals, members) = self._number(label), label.partition("=")
            if number is None and not equals:
                raise self._unknown(label)
            name = name.strip() if number is None else mine[number]
            if not name:
                raise SegraftError(f'"{label}" has no name: write a region of {self.path} as name=1+2.')
            if name.casefold() in {other.casefold() for other in covers}:
                told = f'the region "{name}"' if number is None else f"label {number} ({name})"
                raise SegraftError(f"{told} of {self.path} is asked for twice: name it once.")
            covers[name] = self._covered(members) if number is None else mine.covers(number)
            numbers.append(number)
        if None in numbers:
            regions = paint_values(covers)
            return Labels(zip(regions, covers, strict=True), regions)
        chosen = {number: mine[number] for number in numbers if number is not None} if asked else mine
        return Labels(chosen, {value: covered for value, covered in mine.regions.items() if value in chosen})

    def _number(self, label: str) -> int | None:
        """The cohort's label of this number or name."""
        numbers = {name.casefold(): number for number, name in self.labels.items()}
        numbers |= {str(number): number for number in self.labels}
        alike = Counter(same_name(name) for name in self.labels.values())
        structures = {same_name(name): n for n, name in self.labels.items() if alike[same_name(name)] == 1}
        return numbers.get(label.strip().casefold(), structures.get(same_name(label)))

    def _covered(self, members: str) -> tuple[int, ...]:
        """The values of masks that the parts of a region cover: a number is a value, not a region of that number."""
        found: dict[int, None] = {}
        for part in map(str.strip, members.split("+")):
            if not part:
                raise SegraftError(f'a region of {self.path} has an empty part ("={members}"): write it as name=1+2.')
            value, number = int(part) if part.isdecimal() else None, self._number(part)
            if value not in self.values and (value is not None or number is None):
                raise self._unknown(part)
            found |= dict.fromkeys([value] if value is not None else Labels.of(self.labels).covers(number or 0))
        return tuple(found)

    def _unknown(self, label: str) -> SegraftError:
        return SegraftError(f'{self.path} has no label "{label}": choose {self._instead_of(label)}.')

    def _instead_of(self, label: str) -> str:
        """All labels, or, of many, those whose words are closest: "left kidney" is close to `kidney_left`."""
        if len(self.labels) <= _MANY:
            return "among " + ", ".join(f"{number} ({name})" for number, name in self.labels.items())
        numbers = {_words(name): number for number, name in self.labels.items()}
        close = get_close_matches(_words(label), numbers, n=5)
        shown = [numbers[words] for words in close] or list(self.labels)[:5]
        named = ", ".join(f"{number} ({self.labels[number]})" for number in shown)
        return f"one of its {len(self.labels)}, such as {named}"


def _words(name: str) -> str:
    return " ".join(sorted(re.split(r"[\W_]+", name.casefold())))
