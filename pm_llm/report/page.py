"""The report as one self-contained HTML page, with its figures also as SVG and PNG files."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from pm_llm import __version__
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.intervals import Interval
from pm_llm.report import figures
from pm_llm.report.changes import HEADER, SHIFTS, path_cells, shift_cells, wrong_answers
from pm_llm.report.data import Run, difference
from pm_llm.report.tables import comparison, how_scored, words
from pm_llm.system.coerce import write_yaml
from pm_llm.system.files import replace_bytes, writing

PAGE, FIGURES = "report.html", "figures"


@dataclass(frozen=True)
class Picture:
    """A figure in the page."""

    svg: Markup
    title: str
    caption: str
    wide: bool


def write_report(runs: Sequence[Run], out: str | Path, joint: float | None = None) -> Path:
    """Write `report.html` and the folder `figures` into `out`; return the page's path.

    Raises:
        PmLlmError: If `out` cannot be written.
    """
    folder = Path(out)
    try:
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PmLlmError(f"cannot write to {folder}: {error.strerror}. Choose another --out.") from error
    with matplotlib.rc_context(figures.STYLE):
        html = _render(runs, Drawer(folder / FIGURES), joint)
    path = folder / PAGE
    with writing(folder):
        replace_bytes(path, html.encode())
    return path


def _render(runs: Sequence[Run], draw: Drawer, joint: float | None) -> str:
    shared = [
        draw(
            "accuracy",
            figures.accuracy_over_time(runs),
            "Accuracy over the sequence",
            "Average score on the tasks trained so far; the bands hold 95 % of the bootstrap over test rows.",
        )
        if any(run.averages for run in runs)
        else None,
        draw(
            "coefficients",
            figures.coefficients(runs),
            "Merge coefficients",
            "How much of each task's adapter was let in. A bar is the range over modules.",
        ),
        draw(
            "curvature",
            figures.curvature(runs),
            "Curvature along the task vector",
            "Estimated from the perturbed steps' losses while each task is trained.",
        ),
        draw(
            "truncation",
            figures.truncation(runs),
            "Truncation error",
            "What the running adapter loses when it is cut to its rank, relative to its size.",
        ),
    ]
    first = draw(
        "kept",
        figures.kept(runs),
        "What was kept, what was lost",
        "Of each task its score when it was learnt, and after the last task.",
    )
    sections = []
    for number, run in enumerate(runs, start=1):
        pictures = [
            draw(
                f"matrix-{number}",
                figures.matrix(run.results),
                "Accuracy matrix",
                "Rows: after training the task. Columns: score on the task.",
            ),
            draw(
                f"modules-{number}",
                figures.module_coefficients(run),
                "Coefficients of the modules",
                "Where the merge chose a coefficient for each module.",
            ),
            draw(
                f"losses-{number}",
                figures.losses(run),
                "Training loss",
                "Of each task in turn, penalties included.",
            ),
            draw(
                f"costs-{number}",
                figures.costs(run),
                "Time and memory",
                "Seconds of each stage's parts; memory is the peak on the device (on CPU: of the process so far).",
            ),
        ]
        sections.append(
            (
                run,
                _matrix_cells(run),
                [p for p in pictures if p],
                write_yaml(run.results.config),
            )
        )
    header, rows = comparison([run.results for run in runs], joint, [run.name for run in runs])
    finals = [run.averages.get(len(run.matrix.stages) - 1) for run in runs]
    differences = [None if run is runs[0] else difference(run, runs[0]) for run in runs]
    environment = Environment(loader=PackageLoader("pm_llm.report"), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "band": _band,
        "words": words,
        "how": how_scored,
        "path": path_cells,
        "wrong": wrong_answers,
        "shifts": shift_cells,
    }
    return environment.get_template("report.html").render(
        runs=runs,
        header=header,
        rows=[
            (run.name, row, final, gap) for run, row, final, gap in zip(runs, rows, finals, differences, strict=True)
        ],
        first=first,
        shared=[picture for picture in shared if picture],
        sections=sections,
        changes_header=HEADER,
        shifts_header=["after", *SHIFTS.values()],
        version=__version__,
    )


class Drawer:
    """Writes figures as SVG and PNG and hands their SVG to the page.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, figure: Figure | None, title: str, caption: str) -> Picture | None:
        """The figure as a picture of the page; None stays None."""
        if figure is None:
            return None
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120, format="png")
        svg = text.getvalue()
        with writing(self.folder):
            replace_bytes(self.folder / f"{name}.png", picture.getvalue())
            replace_bytes(self.folder / f"{name}.svg", svg.encode())
        # in one page, ids of one picture must not be another's
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
        labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
        return Picture(Markup(labelled), title, caption, figure.get_figwidth() > figures.WIDTH)


def _matrix_cells(run: Run) -> list[tuple[str, list[Interval | None], Interval | None]]:
    """(stage, a score a task, average) for the table with intervals."""
    stages = [(-1, "(untrained)")] if run.results.untrained else []
    stages += list(enumerate(run.matrix.stages))
    columns = range(len(run.matrix.tasks))
    return [(name, [run.intervals.get((i, j)) for j in columns], run.averages.get(i)) for i, name in stages]


def _band(found: Interval | None, sign: bool = False) -> str:
    if found is None:
        return ""
    if sign:
        return f"{found.value:+.1f} ({found.low:+.1f} to {found.high:+.1f})"
    return f"{found.value:.1f} ({found.low:.1f}–{found.high:.1f})"
