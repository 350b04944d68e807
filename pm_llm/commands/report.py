"""`pm-llm report`: finished runs' tables and page."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pm_llm.errors import PmLlmError


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("report", help="print finished runs' tables and write them as one HTML page")
    parser.add_argument("run_dir", nargs="+", metavar="RUN_DIR", help="one run, or several to compare")
    parser.add_argument("--out", metavar="DIR", help="folder for report.html and figures (default: the first run's)")
    parser.add_argument("--joint", type=float, help="final average of joint training, as the first run was scored")
    parser.add_argument(
        "--lm-eval",
        nargs="+",
        default=[],
        metavar="FILE",
        help="results_*.json of lm_eval's command line, to show too",
    )
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm report`: tables here, and the page with its figures in a folder."""
    from pm_llm.report.changes import kept_table, shifts
    from pm_llm.report.data import open_run
    from pm_llm.report.tables import compare, describe, harness_table
    from pm_llm.run.folder import RunDir

    runs = [open_run(path) for path in given.run_dir]
    out = Path(given.out or runs[0].path)
    own = out.resolve() == runs[0].path.resolve()
    if not own and (out / "state.json").exists():
        raise PmLlmError(
            f"{out} is the folder of a run. Choose another --out; without it the page goes to {runs[0].path}."
        )
    for one in runs:
        said = [describe(one.results), kept_table(one.changes), shifts(one)]
        print("\n\n".join([f"{one.path}\n{said[0]}", *filter(None, said[1:])]) + "\n")
    table = compare([one.results for one in runs], given.joint, [one.name for one in runs])
    if len(runs) > 1:
        print(table + "\n")
    if given.lm_eval:
        print(harness_table(given.lm_eval) + "\n")
    if given.joint is not None and "gap closed" not in table:
        print("no gap closed: it needs a run of seqlora among these, scored as the first, with another average.\n")
    try:
        from pm_llm.report.page import FIGURES, PAGE, write_report
    except ImportError as error:
        raise PmLlmError(f'the page needs matplotlib: pip install "pm_llm[report]" ({error})') from error
    run_dir = RunDir.open(given.run_dir[0])
    with run_dir.locked() if own else nullcontext():
        if own:
            run_dir.forget(lambda name: name == PAGE or name.startswith(f"{FIGURES}/"))
        page = write_report(runs, out, given.joint)
        if own:
            run_dir.record([page, *(page.parent / FIGURES).iterdir()])
    print(f"page: {page}")
    return 0
