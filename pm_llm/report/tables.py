"""A run's tables as text, from its `results.json` alone. The page is in `page.py`, the figures in `figures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pm_llm.evaluation.matrix import Matrix, gap_closed
from pm_llm.run.record import NUMBERS, Results


def describe(results: Results) -> str:
    """The matrix with coefficients, and the numbers below it."""
    lines = [f"method {results.preset}{how_scored(results)}", ""]
    lines += [Matrix.from_results(results).table(results.coefficients), ""]
    return "\n".join(lines + numbers(results))


def how_scored(results: Results) -> str:
    """In brackets, what is unusual in how a run was scored; empty if nothing is."""
    said = ["validation rows"] if results.split == "validation" else []
    said += ["answers chosen among the labels"] if results.mode == "labels" else []
    said += ["lower is better"] if results.lower_is_better else []
    said += [f"of {', '.join(results.aside)} lower is better, and no average is of it"] if results.aside else []
    return f" ({'; '.join(said)})" if said else ""


def numbers(results: Results) -> list[str]:
    """A line for each number of a run; FUAR is None where nothing was gained."""
    known = [(label, results.numbers[key]) for key, label in NUMBERS.items() if key in results.numbers]
    if results.facts.knows_task:
        known = [(f"{label}, each task by its own adapter", x) for label, x in known[:1]]
    lines = [f"{label}: nothing was gained" if x is None else f"{label}: {x:.2f}" for label, x in known]
    gap = "not measured: a task's score after later ones (keep_test_rows is false: its test rows are not kept)"
    return lines if results.config.get("keep_test_rows", True) else [*lines, gap]


def compare(runs: Sequence[Results], joint: float | None = None, names: Sequence[str] = ()) -> str:
    """A row a run, side by side, as Markdown."""
    return markdown(*comparison(runs, joint, names))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table, numbers to the right of the first column."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def harness_table(paths: Sequence[str | Path]) -> str:
    """Files of lm-evaluation-harness's results side by side, as Markdown. Raises PmLlmError if one is none."""
    from pm_llm.evaluation.harness import read_results

    files = [read_results(path) for path in paths]
    names = dict.fromkeys(name for one in files for name in one)
    rows = [[name, *(_with_error(*one.get(name, (None, None))) for one in files)] for name in names]
    return markdown(["lm-evaluation-harness", *(Path(path).stem for path in paths)], rows)


def _with_error(value: float | None, error: float | None) -> str:
    shown = "" if value is None else f"{value:.4g}"
    return shown if error is None else f"{shown} ± {error:.2g}"


def comparison(
    runs: Sequence[Results], joint: float | None = None, names: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of methods: the numbers that runs have, and the gap closed where it can be had.

    That needs runs of `seqlora` (and of `joint`, or its number) of one model, on the same tasks, scored alike.

    Args:
        runs: Their results.
        joint: Final average of joint training, scored as the first run was; by default that of the preset's runs.
        names: What to call the runs; by default, by their methods.
    """
    keys = [key for key in NUMBERS if any(run.numbers.get(key) is not None for run in runs)]
    gaps = [_gap(run, runs, joint) for run in runs]
    shown = any(gap is not None for gap in gaps)
    header = ["method", *(NUMBERS[key] for key in keys), *(["gap closed"] if shown else []), "coefficients"]
    rows = []
    for run, name, gap in zip(runs, names or [run.preset for run in runs], gaps, strict=True):
        row = [name, *("-" if run.numbers.get(key) is None else f"{run.numbers[key]:.1f}" for key in keys)]
        row += ["-" if gap is None else f"{gap:.2f}"] if shown else []
        rows.append([*row, ", ".join(f"{c:.2f}" for c in run.coefficients)])
    return header, rows


def _scored(run: Results) -> tuple[Any, ...]:
    """What must be equal in two runs for their final averages to be comparable; the seed need not be."""
    columns = zip(run.tasks, run.scorers, run.test_rows, strict=True)
    tasks = sorted(column for column in columns if column[0] in run.stages)
    return run.config["model"], run.split, run.mode, tasks


def _gap(run: Results, runs: Sequence[Results], joint: float | None) -> float | None:
    alike = [one for one in runs if _scored(one) == _scored(run)]
    given = joint if _scored(run) == _scored(runs[0]) else None
    final, lower = run.numbers.get("average_accuracy"), _final(alike, "seqlora")
    upper = _final(alike, "joint") if given is None else given
    if final is None or lower is None or upper is None or lower == upper:
        return None
    return gap_closed(final, lower, upper)


def _final(runs: Sequence[Results], preset: str) -> float | None:
    """The mean final average of the runs of a preset as it is; None if there is none."""
    its_runs = [run for run in runs if run.preset == preset and run.facts.is_preset]
    found = [x for run in its_runs if (x := run.numbers.get("average_accuracy")) is not None]
    return fmean(found) if found else None


def words(choice: Any) -> str:
    """One of the three words with its options, or a list of them, in plain text."""
    if isinstance(choice, list):
        return " + ".join(map(words, choice)) or "none"
    if isinstance(choice, dict):
        options = ", ".join(f"{key} {value}" for key, value in choice.items() if key != "name")
        return f"{choice['name']} ({options})"
    return str(choice)
