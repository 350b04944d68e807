"""A run's tables as text, from its `results.json` alone. The page is in `page.py`, the figures in `figures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pm_llm.evaluation.matrix import Matrix, gap_closed

LABELS = {
    "average_accuracy": "average accuracy",
    "average_over_time": "average over time",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "forgetting": "forgetting",
    "plasticity": "plasticity",
}


def describe(results: dict[str, Any]) -> str:
    """The matrix with coefficients, and the numbers below it."""
    lines = [f"method {results['config']['method']}", ""]
    lines += [Matrix.from_results(results).table(results["coefficients"]), ""]
    lines += [f"{label}: {results[key]:.2f}" for key, label in LABELS.items() if key in results]
    return "\n".join(lines)


def compare(runs: Sequence[dict[str, Any]], joint: float | None = None) -> str:
    """A row a run, side by side, as Markdown."""
    header, rows = comparison(runs, joint)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def comparison(runs: Sequence[dict[str, Any]], joint: float | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of methods: the numbers all runs have, and the gap closed where it can be had.

    Args:
        runs: Their `results.json`.
        joint: Final average of joint training; by default that of a run of the method `joint`, if there is one.
    """
    keys = [key for key in LABELS if all(key in run for run in runs)]
    finals = {run["config"]["method"]: run["average_accuracy"] for run in runs}
    upper = finals.get("joint") if joint is None else joint
    gap = upper is not None and "seqlora" in finals
    header = ["method", *(LABELS[key] for key in keys), *(["gap closed"] if gap else []), "coefficients"]
    rows = []
    for run in runs:
        row = [run["config"]["method"], *(f"{run[key]:.1f}" for key in keys)]
        if gap and upper is not None:
            row.append(f"{gap_closed(run['average_accuracy'], finals['seqlora'], upper):.2f}")
        rows.append([*row, ", ".join(f"{c:.2f}" for c in run["coefficients"])])
    return header, rows


def words(choice: Any) -> str:
    """One of the three words with its options, or a list of them, in plain text."""
    if isinstance(choice, list):
        return " + ".join(map(words, choice)) or "none"
    if isinstance(choice, dict):
        options = ", ".join(f"{key} {value}" for key, value in choice.items() if key != "name")
        return f"{choice['name']} ({options})"
    return str(choice)
