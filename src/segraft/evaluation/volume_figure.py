"""The picture of predicted against annotated volumes."""

from collections.abc import Sequence

import numpy as np

from segraft.evaluation.agreement import Agreement
from segraft.evaluation.figures import COLOURS, figure_of, finished_axes, png


def volume_figure(
    predicted_ml: Sequence[float], annotated_ml: Sequence[float], found: Agreement, *, title: str = ""
) -> bytes:
    """Draw every patient, the identity line, the fitted line with its confidence band, and the agreement in numbers.

    Args:
        predicted_ml: one per patient, in mL.
        annotated_ml: likewise.
        found: of these.
        title: printed at the top.

    Returns:
        A PNG file.
    """
    predicted, annotated = np.asarray(predicted_ml, dtype=np.float64), np.asarray(annotated_ml, dtype=np.float64)
    end = 1.05 * float(max(predicted.max(), annotated.max(), 1e-6))
    figure, ax = figure_of(4.6, 4.9, left=0.75, below=1.25, above=0.45)
    x = np.linspace(annotated.min(), annotated.max(), 100)
    line, low, high = found.line(x)
    ax.plot([0, end], [0, end], color="#5b636d", linestyle="--", linewidth=1, label="predicted = annotated")
    ax.fill_between(x, low, high, color=COLOURS[1], alpha=0.3, linewidth=0, label=f"{found.confidence:.0%} band")
    ax.plot(x, line, color=COLOURS[-1], linewidth=1.8, label=f"fit: {found.slope:.2f} · x {found.intercept:+.2f} mL")
    ax.scatter(annotated, predicted, s=20, color=COLOURS[5], alpha=0.8, linewidth=0, zorder=3, label="patient")
    ax.set(xlim=(0, end), ylim=(min(0.0, float(low.min())), end))
    finished_axes(ax, xlabel="Annotated volume (mL)", ylabel="Predicted volume (mL)", title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.15), ncols=2, frameon=False, fontsize=8.5, handlelength=1.6)
    return png(figure)
