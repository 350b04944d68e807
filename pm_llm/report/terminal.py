"""What a run says when it ends: the matrix, what was gained and lost, where things are and what comes next.

Lines have at most 80 columns. On a terminal, with rich installed, what was kept is green and what was lost red.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pm_llm.evaluation.matrix import UNTRAINED, Matrix
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
    say("\n" + "\n".join([*numbers(results), *lost(matrix)]))
    say(f"\nadapter: {folder / 'adapter'}\nresults: {folder / 'results.json'}\nnext:    pm-llm report {folder}")


def by_stage(matrix: Matrix, coefficients: Sequence[float]) -> list[list[Cell]]:
    """The matrix: a row a stage, a column a task."""
    rows = [[(head, "bold") for head in ("after", *matrix.tasks, "average", "coef.")]]
    for i in (UNTRAINED, *range(len(matrix.stages))):
        known = [matrix.scores.get((i, j)) for j in range(len(matrix.tasks))]
        if all(x is None for x in known):
            continue
        learned = matrix.learned(i) if i != UNTRAINED else {}
        whole = bool(learned) and all(known[j] is not None for j in learned)
        cells = [(_number(x), _style(matrix, i, j)) for j, x in enumerate(known)]
        average = f"{matrix.average_accuracy(i):.1f}" if whole else ""
        coefficient = "" if i == UNTRAINED else f"{coefficients[i]:.2f}"
        name = "(untrained)" if i == UNTRAINED else matrix.stages[i]
        rows.append([(_short(name), ""), *cells, (average, ""), (coefficient, "")])
    return rows


def by_task(matrix: Matrix) -> list[list[Cell]]:
    """A row a task: its score when it was learnt, and after the last task."""
    last = len(matrix.stages) - 1
    rows = [[(head, "bold") for head in ("task", "learnt", "now")]]
    for j, i in sorted(matrix.learned(last).items(), key=lambda found: found[1]):
        known = [_number(matrix.scores.get((stage, j))) for stage in (i, last)]
        rows.append([(_short(matrix.tasks[j]), ""), (known[0], ""), (known[1], _style(matrix, last, j))])
    return rows


def lost(matrix: Matrix) -> list[str]:
    """A line that names the tasks that lost since they were learnt; none where that was not measured."""
    last = len(matrix.stages) - 1
    changes = {matrix.tasks[j]: _change(matrix, last, j) for j, i in matrix.learned(last).items() if i < last}
    known = {name: change for name, change in changes.items() if change is not None}
    if not known:
        return []
    sign = -1 if matrix.lower_is_better else 1
    found = [f"{name} {change:+.1f}" for name, change in known.items() if sign * change <= -LOST]
    return ["lost since they were learnt: " + (", ".join(found) or "nothing")]


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
    learned = matrix.learned(stage).get(j) if stage != UNTRAINED else None
    if learned is None or learned >= stage or not {(learned, j), (stage, j)} <= matrix.scores.keys():
        return None
    return matrix.scores[stage, j] - matrix.scores[learned, j]


def _style(matrix: Matrix, stage: int, j: int) -> str:
    change = _change(matrix, stage, j)
    if change is None:
        return ""
    return "red" if (-change if matrix.lower_is_better else change) <= -LOST else "green"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1f}"


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
