"""A run's tables as text, from its `results.json` alone. The page is in `page.py`, the figures in `figures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pm_llm.evaluation.matrix import Matrix, gap_closed
from pm_llm.methods import knows_task, preset_of

LABELS = {
    "average_accuracy": "average accuracy",
    "average_over_time": "average over time",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "forgetting": "forgetting",
    "plasticity": "plasticity",
    "fuar": "FUAR",
}


def describe(results: dict[str, Any]) -> str:
    """The matrix with coefficients, and the numbers below it."""
    lines = [f"method {results['config']['method']}", ""]
    lines += [Matrix.from_results(results).table(results["coefficients"]), ""]
    return "\n".join(lines + numbers(results))


def numbers(results: dict[str, Any]) -> list[str]:
    """A line for each number of a run; FUAR is None where nothing was gained."""
    known = [(label, results[key]) for key, label in LABELS.items() if key in results]
    if knows_task(results["config"]["method"], results["method"]):
        known = [(f"{label}, each task by its own adapter", x) for label, x in known[:1]]
    return [f"{label}: nothing was gained" if x is None else f"{label}: {x:.2f}" for label, x in known]


def compare(runs: Sequence[dict[str, Any]], joint: float | None = None, names: Sequence[str] = ()) -> str:
    """A row a run, side by side, as Markdown."""
    header, rows = comparison(runs, joint, names)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def comparison(
    runs: Sequence[dict[str, Any]], joint: float | None = None, names: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of methods: the numbers that runs have, and the gap closed where it can be had.

    Args:
        runs: Their `results.json`.
        joint: Final average of joint training; by default the mean of the runs of the preset `joint`.
        names: What to call the runs; by default, by their methods.
    """
    keys = [key for key in LABELS if any(run.get(key) is not None for run in runs)]
    lower, upper = _final(runs, "seqlora"), _final(runs, "joint") if joint is None else joint
    gap = lower is not None and upper is not None and lower != upper
    header = ["method", *(LABELS[key] for key in keys), *(["gap closed"] if gap else []), "coefficients"]
    rows = []
    for run, name in zip(runs, names or [run["config"]["method"] for run in runs], strict=True):
        row = [name, *("-" if run.get(key) is None else f"{run[key]:.1f}" for key in keys)]
        if lower is not None and upper is not None and gap:
            final = run.get("average_accuracy")
            row.append("-" if final is None else f"{gap_closed(final, lower, upper):.2f}")
        rows.append([*row, ", ".join(f"{c:.2f}" for c in run["coefficients"])])
    return header, rows


def _final(runs: Sequence[dict[str, Any]], preset: str) -> float | None:
    """The mean final average of the runs of a preset as it is; None if there is none."""
    its_runs = [run for run in runs if run["config"]["method"] == preset and preset_of(preset, run["method"])]
    found = [run["average_accuracy"] for run in its_runs]
    return fmean(found) if found else None


def words(choice: Any) -> str:
    """One of the three words with its options, or a list of them, in plain text."""
    if isinstance(choice, list):
        return " + ".join(map(words, choice)) or "none"
    if isinstance(choice, dict):
        options = ", ".join(f"{key} {value}" for key, value in choice.items() if key != "name")
        return f"{choice['name']} ({options})"
    return str(choice)
