"""Tables and the heat map of a run, from its `results.json` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.matrix import Matrix

LABELS = {
    "average_accuracy": "average accuracy",
    "average_over_time": "average over time",
    "backward_transfer": "backward transfer",
    "forgetting": "forgetting",
    "plasticity": "plasticity",
}


def describe(results: dict[str, Any]) -> str:
    """The matrix with coefficients, and the numbers below it."""
    matrix = Matrix.from_rows(results["tasks"], results["matrix"])
    lines = [f"method {results['config']['method']}", "", matrix.table(results["coefficients"]), ""]
    lines += [f"{label}: {results[key]:.2f}" for key, label in LABELS.items() if key in results]
    return "\n".join(lines)


def compare(runs: list[dict[str, Any]]) -> str:
    """A row a run, side by side."""
    keys = [key for key in LABELS if all(key in run for run in runs)]
    lines = ["| method | " + " | ".join(LABELS[key] for key in keys) + " | coefficients |"]
    lines.append("|---|" + "---:|" * len(keys) + "---|")
    for run in runs:
        numbers = " | ".join(f"{run[key]:.1f}" for key in keys)
        coefficients = ", ".join(f"{c:.2f}" for c in run["coefficients"])
        lines.append(f"| {run['config']['method']} | {numbers} | {coefficients} |")
    return "\n".join(lines)


def draw_matrix(results: dict[str, Any], path: str | Path) -> None:
    """The matrix as a heat map PNG. Raises PmLlmError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise PmLlmError('the heat map needs matplotlib: pip install "pm_llm[report]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, rows = results["tasks"], results["matrix"]
    values = [[float("nan") if x is None else x for x in row] for row in rows]
    side = 1.6 + 0.75 * len(names)
    figure, axes = pyplot.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("score on")
    axes.set_ylabel("after training")
    axes.set_title(f"{results['config']['method']}: average {results['average_accuracy']:.1f}")
    for i, row in enumerate(rows):
        for j, x in enumerate(row):
            if x is not None:
                axes.text(j, i, f"{x:.0f}", ha="center", va="center", color="white" if x < 60 else "black")
    figure.colorbar(image, shrink=0.8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
