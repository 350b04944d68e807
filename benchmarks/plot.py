"""The figure of a file of records: what each method had learnt, and what is left of it.

`python benchmarks/records.py --write docs/results.md` draws `X.svg` from `X.jsonl` for every `X.svg` that the page
shows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import records
from matplotlib import rc_context
from matplotlib.figure import Figure

from pm_llm.methods import Method

SHOWN = re.compile(r"!\[[^\]]*\]\((\S+)\.svg\)")
# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = {"merged in closed form": "#0072B2", "others": "#D55E00", "keeps rows or adapters": "#000000"}


def draw(found: Sequence[dict[str, Any]]) -> Figure:
    """A line a method, the best on top: the final average with its interval, filled; each task's score just after its
    training (plasticity), empty. The way from one to the other is what was forgotten."""
    averages = records.averages(found)
    names = sorted(averages, key=lambda name: float(averages[name][0].mean()))
    figure = Figure(figsize=(6.4, 1.3 + 0.2 * len(names)), layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    for y, name in enumerate(names):
        runs = [one for one in found if one["name"] == name]
        value, low, high = records.interval(averages[name])
        kind = _kind(runs[0])
        axes.hlines(y, low, high, color=COLOURS[kind], linewidth=1)
        axes.plot(value, y, "o", color=COLOURS[kind], label=None if kind in labelled else kind, markersize=4)
        labelled.add(kind)
        if not records.is_bound(runs[0]) and all("plasticity" in one for one in runs):
            learnt = fmean(one["plasticity"] for one in runs)
            axes.plot([value, learnt], [y, y], color="#999999", linewidth=0.8, linestyle=":", zorder=0)
            axes.plot(learnt, y, "o", color=COLOURS[kind], markerfacecolor="white", markersize=7, zorder=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.7, len(names) - 0.3)
    figure.supxlabel("average score. Dot: at the end, with 95 %; ring: each task just after its training", size=8)
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    return figure


def _kind(one: dict[str, Any]) -> str:
    method = Method().replaced(**one["method"])
    if one["task_id"] or method.says("old_data") or method.merge.build("merge").old_adapters:
        return "keeps rows or adapters"
    return "merged in closed form" if method.merge.name == "optimal" else "others"


def shown(page: Path) -> Iterator[tuple[Path, Path]]:
    """The figures of a page that are made from records: the records' file and the figure's."""
    for match in SHOWN.finditer(page.read_text()):
        path = page.parent / match[1]
        yield path.with_suffix(".jsonl"), path.with_suffix(".svg")


def source(path: Path) -> str:
    """What a figure says of the file that it is made from."""
    return f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def redraw(page: Path) -> None:
    """Draw every figure of a page anew."""
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "pm_llm", "font.size": 8}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    for data, figure in shown(page):
        with rc_context(style):
            draw(records.read(data)).savefig(figure, metadata={"Date": None, "Source": source(data)})
