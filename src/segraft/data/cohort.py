"""A cohort: the cases, labels and modalities that are found in one of the layouts that data sets are published in."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from segraft.data.case import Case
from segraft.data.layouts import read_layout
from segraft.errors import SegraftError
from segraft.structures import same_name

__all__ = ["Case", "Cohort"]

_MANY = 20  # labels: more are not listed in a message


@dataclass(frozen=True)
class Cohort:
    """What one place lists. `labels` maps mask values to names, background (0) left out.

    `path` is the list, or the folder where a layout has none. `patient_pattern` is the expression that the patients
    were told by, None where there was none.
    """

    name: str
    path: Path
    labels: dict[int, str]
    modalities: tuple[str, ...]
    cases: tuple[Case, ...]
    patient_pattern: str | None = None

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

    def select_labels(self, asked: Sequence[str]) -> dict[int, str]:
        """The labels asked for, by number or name, in the order asked; all if none is.

        Case does not matter, and a structure may be called as other data sets call it (`left kidney`, `kidney_left`).

        Raises:
            SegraftError: a label that the cohort does not have, or one asked for twice.
        """
        if not asked:
            return dict(self.labels)
        numbers = {name.casefold(): number for number, name in self.labels.items()}
        numbers |= {str(number): number for number in self.labels}
        alike = Counter(same_name(name) for name in self.labels.values())
        structures = {same_name(name): n for n, name in self.labels.items() if alike[same_name(name)] == 1}
        selected: dict[int, str] = {}
        for label in asked:
            number = numbers.get(label.strip().casefold(), structures.get(same_name(label)))
            if number is None:
                raise SegraftError(f'{self.path} has no label "{label}": choose {self._instead_of(label)}.')
            if number in selected:
                raise SegraftError(
                    f"label {number} ({self.labels[number]}) of {self.path} is asked for twice: name it once."
                )
            selected[number] = self.labels[number]
        return selected

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
