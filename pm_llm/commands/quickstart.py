"""`pm-llm quickstart`: forgetting, seen and cured in a minute, on what comes with the package."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pm_llm.run.record import Results

CONFIG = Path(__file__).parent.parent / "embedded" / "quickstart.yaml"
METHODS = {  # in the order of the story
    "seqlora": "plain fine-tuning (seqlora)",
    "pm_curvature": "recommended (pm_curvature)",
    "pm": "the paper's (pm)",
    "joint": "all tasks at once (joint)",
}
LONGEST_FIRST = ("joint", "pm_curvature", "pm", "seqlora")


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "quickstart",
        help="see forgetting, and its cure, on a tiny model that comes with the package",
        description="Fine-tunes a tiny model on four small tasks, one after the other: plainly, with the recommended "
        "method, with the paper's, and, as the bound, on all tasks at once. A minute or two on two CPU cores.",
    )
    parser.add_argument("--model", choices=["llama", "t5"], default="llama", help="which embedded model")
    parser.add_argument(
        "--out", default="runs/quickstart", metavar="DIR", help="folder for the runs (their own are written anew)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of adapters, batches and perturbations")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm quickstart`: four runs, a table, a sentence, and what to open and to do next."""
    started, folder = time.monotonic(), Path(given.out) / given.model
    print(f"A tiny {given.model} learns four tasks in a row; old rows are never seen again.", flush=True)
    found = train_all(given.model, folder, given.seed)
    print("\n" + table(found) + "\n\n" + sentence(found) + "\n")
    _pictures(found, folder)
    print(f"adapter    {folder / 'pm_curvature' / 'adapter'}")
    print(f"{time.monotonic() - started:.0f} s. Next, with tasks of your own: pm-llm init")
    return 0


def train_all(model: str, folder: Path, seed: int, methods: tuple[str, ...] = LONGEST_FIRST) -> dict[str, Results]:
    """The results by method, of runs in `folder`, side by side on as many cores as there are.

    Raises:
        PmLlmError: If a run cannot be made.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(methods), cores)
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawning) as pool:
        jobs: dict[Future[Results], str] = {
            pool.submit(train, method, model, str(folder / method), seed): method for method in methods
        }
        found = {}
        for number, job in enumerate(as_completed(jobs), start=1):
            try:
                found[jobs[job]] = job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            print(f"  {number}/{len(jobs)}  {METHODS[jobs[job]]}", flush=True)
    return found


def train(method: str, model: str, folder: str, seed: int) -> Results:
    """One run, in silence, on one thread (as many as the recorded numbers were made with)."""
    from pm_llm.system.quiet import quiet_libraries, silence

    quiet_libraries()
    import torch

    from pm_llm.config import load_config
    from pm_llm.run.record import Results
    from pm_llm.sequence import ContinualSequence

    torch.set_num_threads(1)
    if Path(folder, "state.json").exists():  # of a quickstart before
        shutil.rmtree(folder)
    keys = {"method": method, "model": f"embedded:{model}", "output_dir": folder, "seed": seed}
    with silence():
        return Results.of(ContinualSequence(load_config(CONFIG, keys)).run())


def table(found: dict[str, Results]) -> str:
    """Final scores by method and task, and their average; as text of at most 80 columns."""
    tasks = next(iter(found.values())).tasks
    width = max(map(len, METHODS.values()))
    heads = "".join(f"{name:>10}" for name in (*tasks, "average"))
    lines = ["right after the last task, %".ljust(width + 2) + heads]
    for method, label in METHODS.items():
        cells = [*found[method].matrix[-1], found[method].numbers["average_accuracy"]]
        lines.append(label.ljust(width + 2) + "".join(f"{cell:10.0f}" for cell in cells))
    return "\n".join(lines)


def sentence(found: dict[str, Results]) -> str:
    """What the table says."""
    plain, cured, joint = (
        found[method].numbers["average_accuracy"] for method in ("seqlora", "pm_curvature", "joint")
    )
    return (
        f"Plain fine-tuning had learnt its tasks to {found['seqlora'].numbers['plasticity']:.0f} % and ends at "
        f"{plain:.0f} %.\npm_curvature ends at {cured:.0f} %; training on everything at once gives {joint:.0f} %."
    )


def _pictures(found: dict[str, Results], folder: Path) -> None:
    try:
        from pm_llm.commands.run import draw
        from pm_llm.report.data import open_run
        from pm_llm.report.page import write_report
        from pm_llm.run.folder import RunDir
    except ImportError:  # matplotlib and jinja2 are an extra
        print('for the picture and the page: pip install "pm_llm[report]"')
        return
    for method in found:
        draw(RunDir(folder / method), found[method])
    page = write_report([open_run(folder / method) for method in METHODS], folder)
    print(f"picture    {folder / 'pm_curvature' / 'matrix.png'}  (beside it seqlora's)\npage       {page}")
