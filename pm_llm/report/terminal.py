"""What a run says when it ends: the matrix, what was gained and lost, where things are and what comes next.

Lines have at most 80 columns. On a terminal, with rich installed, what was kept is green and what was lost red.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pm_llm.evaluation.matrix import UNTRAINED, Matrix, cell
from pm_llm.report.tables import how_scored, numbers
from pm_llm.run.record import Results
from pm_llm.system.progress import say

WIDTH, LONGEST = 80, 24  # of a line, and of a name in it
LOST = 1.0  # points from which less is called a loss
Cell = tuple[str, str]  # a text and how it is shown: bold, green, red or ""


def closing(results: Results, folder: Path) -> None:
    """Print what came of a finished run."""
    matrix = Matrix.from_results(results)
    say(f"\nmethod {results.preset}{how_scored(results)}\n")
    _print(aligned(by_stage(matrix, results.coefficients)) or aligned(by_task(matrix), whole=True))
    losses = [] if results.facts.knows_task else lost(matrix)  # each task is answered by its own stage's adapter
    say("\n" + "\n".join([*numbers(results), *losses]))
    say(f"\nadapter: {folder / 'adapter'}\nresults: {folder / 'results.json'}\nnext:    pm-llm report {folder}")


def by_stage(matrix: Matrix, coefficients: Sequence[float]) -> list[list[Cell]]:
    """The matrix: a row a stage, a column a task."""
    rows = [[(head, "bold") for head in ("after", *matrix.tasks, "average", "coef.")]]
    for i, name, scores, average in matrix.lines():
        cells = [(cell(x), _style(matrix, i, j)) for j, x in enumerate(scores)]
        coefficient = "" if i == UNTRAINED else f"{coefficients[i]:.2f}"
        rows.append([(_short(name), ""), *cells, (cell(average), ""), (coefficient, "")])
    return rows


def by_task(matrix: Matrix) -> list[list[Cell]]:
    """A row a task: its score when it was learnt, and after the last task."""
    last = len(matrix.stages) - 1
    rows = [[(head, "bold") for head in ("task", "learnt", "now")]]
    for j, i in sorted(matrix.learned(last).items(), key=lambda found: found[1]):
        learnt, now = (cell(matrix.scores.get((stage, j))) for stage in (i, last))
        rows.append([(_short(matrix.tasks[j]), ""), (learnt, ""), (now, _style(matrix, last, j))])
    return rows


def lost(matrix: Matrix) -> list[str]:
    """A line that names the tasks that lost since they were learnt; none where that was not measured."""
    last = len(matrix.stages) - 1
    changes = {j: change for j in range(len(matrix.tasks)) if (change := _change(matrix, last, j)) is not None}
    found = [f"{matrix.tasks[j]} {change:+.1f}" for j, change in changes.items() if _is_loss(matrix, change)]
    return ["lost since they were learnt: " + (", ".join(found) or "nothing")] if changes else []


def aligned(rows: Sequence[Sequence[Cell]], whole: bool = False) -> list[list[Cell]]:
    """Cells padded to columns; none if a line would be too long (but with `whole`)."""
    widths = [max(len(text) for text, _ in column) + 2 for column in zip(*rows, strict=True)]
    if sum(widths) > WIDTH and not whole:
        return []
    pads = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return [
        [(pad(text, width), style) for (text, style), width, pad in zip(row, widths, pads, strict=True)]
        for row in rows
    ]


def _change(matrix: Matrix, stage: int, j: int) -> float | None:
    """What task `j` has gained at `stage` since it was learnt; None: not measured, or not learnt before."""
    pair = matrix.since_learnt(stage).get(j)
    return None if pair is None or matrix.learned(stage)[j] == stage else pair[1] - pair[0]


def _is_loss(matrix: Matrix, change: float) -> bool:
    return (-change if matrix.lower_is_better else change) <= -LOST


def _style(matrix: Matrix, stage: int, j: int) -> str:
    change = _change(matrix, stage, j)
    return "" if change is None else "red" if _is_loss(matrix, change) else "green"


def _short(name: str) -> str:
    half = (LONGEST - 3) // 2
    return name if len(name) <= LONGEST else f"{name[:half]}...{name[-half:]}"


def _print(lines: Sequence[Sequence[Cell]]) -> None:
    plain = "\n".join("".join(text for text, _ in line).rstrip() for line in lines)
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        say(plain)
        return
    console = Console(file=sys.stdout, width=WIDTH, highlight=False)
    if not console.is_terminal:
        say(plain)
        return
    for line in lines:
        console.print(Text.assemble(*line))
