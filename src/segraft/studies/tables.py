"""The tables of a study's report, numbered as the haemorrhage paper's where they are the same."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from segraft.evaluation.results import MISSING, mean_sd
from segraft.studies.judging import Entrant, Judgement
from segraft.studies.scores import Scores
from segraft.studies.spec import Study, arms_of


def modules(study: Study) -> pd.DataFrame:
    """Table 2: what each strategy trains."""
    rows = {
        (arm.strategy, arm.base): ", ".join(_in_words(place) for place in arm.train) or "nothing"
        for arms in study.arms
        for arm in arms_of(arms)
        if arm.method == "none"
    }
    return pd.DataFrame(
        [{"Network": base, "Strategy": strategy, "Modules": trained} for (strategy, base), trained in rows.items()]
    )


def _in_words(place: str) -> str:
    """A selector of what is trained whole."""
    kind, colon, where = place.rpartition(":")
    where = "everything" if where == ".*" else where
    return f"{'norms' if kind == 'norm' else 'biases'} of {where}" if colon else where


def arms(scores: Scores) -> pd.DataFrame:
    """Table 3, counted and for every arm: trained parameters; with file size, time and Dice."""
    rows = []
    for name in scores.plan.arms:
        dice = list(scores.dice(name).values())
        trained, size, seconds = scores.trained(name), scores.bytes(name), scores.seconds(name)
        rows.append(
            {
                "Arm": name,
                "Trained parameters": MISSING if trained is None else f"{trained:,}",
                "Tensors (kB)": MISSING if size is None else f"{size / 1000:,.0f}",
                "Training (s)": MISSING if seconds is None else f"{seconds:,.0f}",
                "Patients": len(dice),
                "Dice, mean (SD)": mean_sd(dice),
            }
        )
    return pd.DataFrame(rows)


def by_volume(judgement: Judgement, entrants: Sequence[Entrant]) -> pd.DataFrame:
    """Tables 4 and 5: Dice by stratum of annotated volume, and over all patients."""
    rows = []
    for entrant in entrants:
        row = {"": entrant.name}
        for name, patients in judgement.strata.items():
            row[f"{name} mL, n = {len(patients)}"] = mean_sd([entrant.dice[p] for p in patients])
        row[f"All, n = {len(entrant.dice)}"] = mean_sd(list(entrant.dice.values()))
        rows.append(row)
    return pd.DataFrame(rows)


TESTED = "(one-sided tests: is the Dice higher? Benjamini-Hochberg corrected over the rows)"


def tests(found: pd.DataFrame | None) -> pd.DataFrame:
    """Table 6: 95 % interval of the mean paired difference, and one-sided tests, Benjamini-Hochberg corrected."""
    if found is None:
        return pd.DataFrame()
    return pd.DataFrame(
        {
            "Arm": name,
            "Mean Δ Dice": f"{row['mean_difference']:+.3f}",
            "95 % CI": f"[{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]",
            "p, t-test": _p(row["p_t_adjusted"]),
            "p, Wilcoxon": _p(row["p_wilcoxon_adjusted"]),
            "n": int(row["n"]),
        }
        for name, row in found.iterrows()
    )


def _p(value: float) -> str:
    stars = "".join("*" for level in (0.05, 0.01, 0.001) if value < level)
    return f"{value:.4f}{stars}" if value >= 0.0001 else f"<0.0001{stars}"


def volumes(judgement: Judgement) -> pd.DataFrame:
    """Predicted against annotated volume of the best arm."""
    found = judgement.agreement
    if found is None or judgement.best is None:
        return pd.DataFrame()
    return pd.DataFrame(
        [
            {
                "Arm": judgement.best.name,
                "Slope (95 % CI)": f"{found.slope:.3f} [{found.slope_low:.3f}, {found.slope_high:.3f}]",
                "Intercept (mL)": f"{found.intercept:.2f}",
                "r": MISSING if np.isnan(found.r) else f"{found.r:.3f}",
                "Bias (mL)": f"{found.bias_ml:+.2f}",
                "Limits of agreement (mL)": f"[{found.limits_low_ml:+.2f}, {found.limits_high_ml:+.2f}]",
                "n": found.n,
            }
        ]
    )


def runs(scores: Scores) -> pd.DataFrame:
    """Every run: where each number comes from."""
    means = scores.table.groupby("run")["dice"].mean()
    rows = []
    for run in scores.plan.runs:
        state = "finished" if run.key in scores.finished else scores.failures.get(run.key, "not done")
        rows.append(
            {
                "Run": run.key,
                "Arm": run.arm,
                "Training": scores.design.told(run) or MISSING,
                "Seed": run.seed,
                "Dice": f"{means[run.key]:.3f}" if run.key in means.index else MISSING,
                "State": state,
            }
        )
    return pd.DataFrame(rows)
