"""What the report of a cross-validated study says, as the haemorrhage paper does."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from segraft.evaluation.figures import dice_figure
from segraft.evaluation.volume_figure import volume_figure
from segraft.studies import tables
from segraft.studies.judging import Judgement
from segraft.studies.pages import Shown
from segraft.studies.scores import Scores

OPTIMISTIC = (
    "The best rank of a method is chosen on the very patients its Dice is then reported for, as the paper does: that "
    "is optimistic. Where a row names one rank per fold, each was chosen inside the training folds, without the fold "
    "that it is tested on. The best strategy, where it is the reference, is chosen on the same patients too."
)


@dataclass(frozen=True)
class FoldsPage:
    """A `Page` of what `judge` found."""

    scores: Scores
    judgement: Judgement

    def lead(self) -> str:
        """The best arm, beside the reference."""
        best, reference = self.judgement.best, self.judgement.reference
        if best is None:
            return "No arm is complete yet."
        text = f"Highest mean Dice: {best.name}, {np.mean(list(best.dice.values())):.3f}"
        if reference is None or reference is best:
            return f"{text}."
        return f"{text}; the reference, {reference.name}, has {np.mean(list(reference.dice.values())):.3f}."

    def notes(self) -> list[str]:
        """How ranks were chosen, and what is missing."""
        return [OPTIMISTIC, *self.judgement.notes]

    def tables(self) -> list[tuple[str, pd.DataFrame]]:
        """Those of the paper, and the arms' own."""
        found = self.judgement
        against, against_inside = (
            "" if reference is None else f" against {reference.name} {tables.TESTED}"
            for reference in (found.reference, found.nested_reference)
        )
        return [
            ("Modules that each strategy trains whole", tables.modules(self.scores.plan.study)),
            ("Arms", tables.arms(self.scores)),
            (
                "Strategies: Dice by annotated volume, mean (SD) over patients",
                tables.by_volume(found, found.strategies),
            ),
            ("Methods at their best rank: Dice by annotated volume", tables.by_volume(found, found.methods)),
            ("Methods, rank chosen inside the training folds (one per fold)", tables.by_volume(found, found.nested)),
            (f"Methods at their best rank{against}", tables.tests(found.tests)),
            (f"Methods, rank chosen inside the training folds{against_inside}", tables.tests(found.nested_tests)),
            ("Predicted and annotated volumes", tables.volumes(found)),
        ]

    def figures(self) -> list[tuple[str, bytes]]:
        """Dice by rank, Dice of all, volumes."""
        scores, judgement = self.scores, self.judgement
        figures = []
        for family in dict.fromkeys(entrant.family for entrant in judgement.methods):
            arms = {name: arm for name, arm in scores.plan.arms.items() if arm.family == family and scores.dice(name)}
            if len(arms) > 1:
                groups = {f"R = {arm.rank}": list(scores.dice(name).values()) for name, arm in arms.items()}
                figures.append((f"Dice by rank: {family}", dice_figure(groups)))
        everyone = (*judgement.strategies, *judgement.methods)
        if everyone:
            groups = {entrant.name: list(entrant.dice.values()) for entrant in everyone}
            figures.append(("Dice of the patients, methods at their best rank", dice_figure(groups)))
        if judgement.best is not None and judgement.agreement is not None:
            volumes = scores.volumes_ml(judgement.best.arm)
            predicted, annotated = ([pair[which] for pair in volumes.values()] for which in (0, 1))
            png = volume_figure(predicted, annotated, judgement.agreement)
            figures.append((f"Volumes: {judgement.best.name}", png))
        return figures

    def shown(self) -> list[Shown]:
        """The methods beside the reference, as figure 4 of the paper; without methods, all."""
        found = self.judgement
        if not found.methods:
            return [Shown(entrant.name, entrant.arm) for entrant in found.strategies]
        reference = [] if found.reference is None else [found.reference]
        everyone = [*reference, *(entrant for entrant in found.methods if entrant not in reference)]
        return [Shown(entrant.name, entrant.arm) for entrant in everyone]

    def values(self) -> dict[str, Any]:
        """Patients' Dice stand under every entrant."""
        scores, found = self.scores, self.judgement
        return {
            "arms": {
                name: {
                    "dice": scores.dice(name),
                    "trained": scores.trained(name),
                    "bytes": scores.bytes(name),
                    "runs": scores.runs(name),
                }
                for name in scores.plan.arms
            },
            "strata": found.strata,
            "annotated_ml": scores.annotated_ml(),
            "strategies": [asdict(entrant) for entrant in found.strategies],
            "methods": [asdict(entrant) for entrant in found.methods],
            "nested": [asdict(entrant) for entrant in found.nested],
            "reference": None if found.reference is None else found.reference.name,
            "tests": None if found.tests is None else found.tests.to_dict(orient="index"),
            "nested_tests": None if found.nested_tests is None else found.nested_tests.to_dict(orient="index"),
            "best": None if found.best is None else found.best.name,
            "agreement": None if found.agreement is None else asdict(found.agreement),
        }
