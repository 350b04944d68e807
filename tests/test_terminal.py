"""What a run says when it ends: 80 columns, colours on a terminal alone, what was lost by name."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from pm_llm.evaluation.matrix import Matrix
from pm_llm.report import terminal
from pm_llm.run.record import Facts, Results


def results(n: int = 3, scorer: str = "exact_match") -> Results:
    """`n` tasks; the first has lost 30 points of 90 by the end, or gained as many of a perplexity."""
    names = [f"task-{i}" for i in range(n)]

    def score(stage: int, j: int) -> float | None:
        return None if j > stage else 90.0 if j == stage else 60.0 if j == 0 else 89.5

    matrix = [[score(stage, j) for j in range(n)] for stage in range(n)]
    lower = scorer == "perplexity"
    return Results(
        config={"method": "pm_curvature"},
        method={"start": "fresh", "constrain": [], "merge": "sum"},
        tasks=names,
        stages=names,
        matrix=matrix,
        coefficients=[1.0] * n,
        scorers=[scorer] * n,
        lower_is_better=lower,
        numbers={"average_accuracy": 80.0},
    )


def said(found: Results, capsys) -> str:
    terminal.closing(found, Path("runs/x"))
    return capsys.readouterr().out


def test_the_end_of_a_run(capsys) -> None:
    text = said(results(), capsys)
    assert "after     task-0  task-1  task-2  average  coef." in text
    assert "task-2      60.0    89.5    90.0     79.8   1.00" in text
    assert "lost since they were learnt: task-0 -30.0\n" in text
    assert "\x1b" not in text
    for line in ("adapter: runs/x/adapter", "next:    pm-llm report runs/x"):
        assert line in text
    assert "lost since they were learnt: nothing" in said(results(scorer="perplexity"), capsys)
    assert "lost since" not in said(results(1), capsys)


def test_many_tasks_are_told_one_a_line(capsys) -> None:
    text = said(results(20), capsys)
    assert max(map(len, text.splitlines())) <= terminal.WIDTH
    assert "task       learnt   now" in text
    assert "task-0       90.0  60.0" in text
    assert len([line for line in text.splitlines() if line.startswith("task-")]) == 20


class Terminal(io.StringIO):
    """Takes itself for one."""

    def isatty(self) -> bool:
        return True


def test_colours_on_a_terminal(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal.closing(results(), Path("runs/x"))
    (last,) = [line for line in sys.stdout.getvalue().splitlines() if line.startswith("task-2")]
    assert "\x1b[31m    60.0\x1b[0m" in last
    assert "\x1b[32m    89.5\x1b[0m" in last
    assert "90.0" in last.rpartition("\x1b[0m")[2]


def test_an_adapter_for_each_task_loses_nothing(capsys) -> None:
    found = results()
    found.facts = Facts(knows_task=True)
    assert "lost since" not in said(found, capsys)


def test_without_rich(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "task-2      60.0    89.5    90.0" in said(results(), capsys)


def test_a_task_that_was_not_scored_again(capsys) -> None:
    found = results()
    found.matrix = [[90.0, None, None], [None, 90.0, None], [None, None, 90.0]]
    matrix = Matrix.from_results(found)
    assert terminal.lost(matrix) == []
