"""The figures of a report. Each function draws one and returns it; nothing is shown on a screen."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import chain
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pm_llm.evaluation.matrix import UNTRAINED, Matrix
from pm_llm.report.data import Run
from pm_llm.run.record import Results

MANY = 8
WIDTH = 4.8  # inches: the text stays readable where the page is as wide as a phone
# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "pm_llm", "font.size": 9, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "axes.grid": False, "text.parse_math": False}  # a name may hold dollar signs


def matrix(results: Results) -> Figure:
    """The accuracy matrix as a heat map; lower scores are better where the scorer says so."""
    found = Matrix.from_results(results)
    names = [*(["(untrained)"] if results.untrained else []), *found.stages]
    first = UNTRAINED if results.untrained else 0
    nan = float("nan")
    rows = [[found.scores.get((first + i, j), nan) for j in range(len(found.tasks))] for i in range(len(names))]
    known = [x for row in rows for x in row if x == x]
    top = max(known) if results.lower_is_better else 100
    figure, axes = _new(max(WIDTH, 1.7 + 0.42 * len(found.tasks)), 1.3 + 0.34 * len(names))
    heat_map(axes, rows, top, results.lower_is_better)
    _name_columns(axes, range(len(found.tasks)), found.tasks)
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_xlabel("score on")
    axes.set_ylabel("after training")
    return figure


def heat_map(axes: Any, rows: Sequence[Sequence[float]], top: float = 100, lower_is_better: bool = False) -> None:
    """Scores from 0 to `top` as colours with their numbers; what is NaN stays empty."""
    image = axes.imshow(rows, vmin=0, vmax=top, cmap="viridis_r" if lower_is_better else "viridis", aspect="auto")
    for i, row in enumerate(rows):
        for j, x in enumerate(row):
            if x == x:
                red, green, blue, _ = image.cmap(image.norm(x))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                text = f"{x:.1f}" if x < 10 and lower_is_better else f"{x:.0f}"
                axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black")


def kept(runs: Sequence[Run]) -> Figure | None:
    """Of each task its score when it was learnt (a ring) and after the last task (a dot), a line between them; None
    where no task was scored again."""
    pairs = [_learnt_and_now(run) for run in runs]
    tasks = list(dict.fromkeys(chain(*pairs)))
    if len(tasks) < 2:
        return None
    figure, axes = _new(WIDTH, 1.1 + (0.22 + 0.12 * len(runs)) * len(tasks))
    for k, (run, some, colour) in enumerate(zip(runs, pairs, _colours(len(runs)), strict=True)):
        at = [tasks.index(name) + (k - (len(runs) - 1) / 2) * 0.7 / len(runs) for name in some]
        before, now = zip(*some.values(), strict=True) if some else ((), ())
        axes.hlines(at, before, now, color=colour, linewidth=1.5)
        axes.plot(before, at, "o", color=colour, markerfacecolor="none", clip_on=False)
        axes.plot(now, at, "o", color=colour, label=run.name, clip_on=False)
    axes.set_yticks(range(len(tasks)), [_short(name) for name in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_xlim(left=0, right=max(100, axes.get_xlim()[1]))
    axes.set_xlabel("score: ring when learnt, dot after the last task")
    figure.legend(frameon=False, loc="outside upper left", ncols=2)
    return figure


def _learnt_and_now(run: Run) -> dict[str, tuple[float, float]]:
    if run.results.facts.knows_task:
        return {}
    return {run.matrix.tasks[j]: pair for j, pair in run.matrix.since_learnt(len(run.matrix.stages) - 1).items()}


def losses(run: Run) -> Figure | None:
    """The training loss at every log line, the tasks one after the other; None where nothing was logged."""
    figure, axes = _new(WIDTH, 2.6)
    drawn = _plot_logged(axes, run, "loss", COLOURS[0])
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    return figure if drawn else None


def _plot_logged(axes: Any, run: Run, key: str, colour: str) -> bool:
    """What was logged under a key, by step, the tasks one after the other; whether anything was."""
    begin, named = 0, False
    for log in run.logs:
        points = [(begin + line["step"], line[key]) for line in log if key in line]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, marker=".", color=colour, label=None if named else run.name)
            named = True
        begin += max((line["step"] for line in log), default=0)
        axes.axvline(begin, color="#cccccc", linewidth=0.6, zorder=0)
    axes.set_xlabel("step (a line where a task ends)")
    return named


def accuracy_over_time(runs: Sequence[Run]) -> Figure:
    """Average accuracy on the tasks so far, a line a run, with bands that hold 95 % of the bootstrap."""
    figure, axes = _new(WIDTH, 3.2, len(runs[0].matrix.stages))
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        stages = sorted(run.averages)
        at = [stage + 1 for stage in stages]
        found = [run.averages[stage] for stage in stages]
        axes.plot(at, [x.value for x in found], marker="o", color=colour, label=run.name, clip_on=False)
        axes.fill_between(at, [x.low for x in found], [x.high for x in found], color=colour, alpha=0.15, linewidth=0)
    _name_stages(axes, runs, first=1)
    axes.set_ylabel("average score on tasks so far")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="best")
    return figure


def coefficients(runs: Sequence[Run]) -> Figure:
    """The merge coefficient of each task; where modules have their own, their range as a bar."""
    figure, axes = _new(WIDTH, 2.8, len(runs[0].matrix.stages))
    for k, (run, colour) in enumerate(zip(runs, _colours(len(runs)), strict=True)):
        values = run.results.coefficients
        at = [i + (k - (len(runs) - 1) / 2) * 0.12 for i in range(len(values))]
        axes.plot(at, values, marker="o", linestyle="none", color=colour, label=run.name, clip_on=False)
        for x, modules in zip(at, run.results.module_coefficients, strict=True):
            if modules and len(set(modules.values())) > 1:
                axes.vlines(x, min(modules.values()), max(modules.values()), color=colour, linewidth=3, alpha=0.35)
    _name_stages(axes, runs)
    axes.set_ylabel("coefficient of the new adapter")
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.legend(frameon=False)
    return figure


def module_coefficients(run: Run) -> Figure | None:
    """Coefficients of single modules as a heat map; None where all modules share one."""
    stages = run.results.module_coefficients
    if not any(modules and len(set(modules.values())) > 1 for modules in stages):
        return None
    names = sorted({name for modules in stages for name in modules or {}})
    rows = [[(modules or {}).get(name, float("nan")) for modules in stages] for name in names]
    figure, axes = _new(WIDTH, 1.6 + 0.16 * len(names), len(stages))
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0)
    _name_stages(axes, [run])
    axes.set_yticks(range(len(names)), [_short(name, 34) for name in names], fontsize=6)
    figure.colorbar(image, label="coefficient")
    return figure


def curvature(runs: Sequence[Run]) -> Figure | None:
    """The estimated curvature along each task vector while it is trained; None where no run estimated it."""
    figure, axes = _new(WIDTH, 2.9)
    drawn = [_plot_logged(axes, run, "curvature", c) for run, c in zip(runs, _colours(len(runs)), strict=True)]
    axes.axhline(0, color="#cccccc", linewidth=0.6, zorder=0)
    axes.set_ylabel("curvature along the task vector")
    if not any(drawn):
        return None
    axes.legend(frameon=False)
    return figure


def truncation(runs: Sequence[Run]) -> Figure | None:
    """Relative error of the truncation to the running rank, a line a run; None where nothing was truncated."""
    if not any(max(run.results.truncation_errors) > 1e-6 for run in runs):
        return None
    figure, axes = _new(WIDTH, 2.6, len(runs[0].matrix.stages))
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        axes.plot(run.results.truncation_errors, marker="o", color=colour, label=run.name)
    _name_stages(axes, runs)
    axes.set_ylabel("relative truncation error")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def costs(run: Run) -> Figure:
    """Seconds of each stage's parts, stacked, and the peak of memory as a line."""
    figure, axes = _new(WIDTH, 2.9, len(run.matrix.stages))
    stages = run.results.seconds
    bottom = [0.0] * len(stages)
    for part, colour in zip(stages[0], COLOURS, strict=False):
        values = [seconds[part] for seconds in stages]
        axes.bar(range(len(stages)), values, bottom=bottom, color=colour, label=part, width=0.6)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    _name_stages(axes, [run])
    axes.set_ylabel("seconds")
    right = axes.twinx()
    right.plot([n / 2**30 for n in run.results.peak_memory_bytes], color="#000000", marker="_", linestyle=":")
    right.set_ylabel("peak memory, GiB (dotted)")
    right.set_ylim(bottom=0)
    right.spines["right"].set_visible(True)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def matrix_png(results: Results) -> bytes:
    """The heat map as a PNG file."""
    content = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        matrix(results).savefig(content, dpi=120, format="png")
    return content.getvalue()


def _new(width: float, height: float, columns: int = 0) -> tuple[Figure, Any]:
    """An empty figure, in inches; with many named columns it is higher, for their names stand upright."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height + 0.9 * (columns > MANY)), layout="constrained")
        return figure, figure.subplots()


def _name_stages(axes: Any, runs: Sequence[Run], first: int = 0) -> None:
    """The stages' tasks along the axis, where all runs have the same ones."""
    if len({tuple(run.matrix.stages) for run in runs}) == 1:
        names = runs[0].matrix.stages
        _name_columns(axes, range(first, first + len(names)), names)
    else:
        axes.set_xlabel("stage")


def _name_columns(axes: Any, at: Sequence[int], names: Sequence[str]) -> None:
    turned = (
        {"rotation": 90, "fontsize": 8}
        if len(names) > MANY
        else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    )
    axes.set_xticks(at, [_short(name) for name in names], **turned)


def _short(name: str, length: int = 16) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _colours(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]
