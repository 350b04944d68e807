"""Plain sequential LoRA, Perturb-and-Merge, and P&M with its quadratic as a penalty, on five generated tasks.

    python recipes/quickstart/quickstart.py [--model t5] [--out runs/quickstart]

Runs the three recipes beside this file on two CPU cores, prints their accuracy matrices, then loads the last run's
final adapter in a fresh process that has nothing but transformers and peft, and checks that it gives the very same
answers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path

HERE = Path(__file__).parent
METHODS = ("seqlora", "pm", "pm_curvature")


def main() -> None:
    """Run, compare, reload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["llama", "t5"], default="llama", help="which embedded model")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for the runs; emptied first")
    given = parser.parse_args()

    from pm_llm.system.quiet import quiet_libraries

    quiet_libraries()
    from pm_llm.config import load_config
    from pm_llm.families.models import resolve
    from pm_llm.report.data import open_run
    from pm_llm.report.figures import matrix_png
    from pm_llm.report.page import write_report
    from pm_llm.report.tables import compare, describe
    from pm_llm.run.record import Results
    from pm_llm.sequence import ContinualSequence

    started = time.monotonic()
    results = {}
    for method in METHODS:
        out = given.out / given.model / method
        shutil.rmtree(out, ignore_errors=True)
        overrides = {"model": f"embedded:{given.model}", "output_dir": str(out)}
        config = load_config(HERE / f"{method}.yaml", overrides)
        print(f"\n{method} on the embedded {given.model}", flush=True)
        sequence = ContinualSequence(config)
        results[method] = Results.of(sequence.run())
        sequence.run_dir.write("matrix.png", matrix_png(results[method]))
    print()
    texts = [describe(results[method]) for method in METHODS]
    print_side_by_side(texts[:2])
    print("\n" + texts[2])
    print("\n" + compare(list(results.values())))
    runs = [open_run(given.out / given.model / method) for method in METHODS]
    print(f"\nreport with intervals and figures: {write_report(runs, given.out / given.model)}")

    rows = [
        {"prompt": row.prompt, "max_new_tokens": sequence.encoders[task.name].max_new_tokens}
        for task in sequence.tasks
        for row in task.test
    ]
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictions = sequence.run_dir.predictions(len(sequence.tasks) - 1)
    files = (resolve(config.model), out / "adapter", out / "prompts.jsonl", *predictions)
    python = [sys.executable, "-W", "ignore::FutureWarning"]
    subprocess.run([*python, str(HERE / "reload.py"), *map(str, files)], check=True)
    print(f"adapter: {out / 'adapter'}\nmatrices: {', '.join(str(out.parent / m / 'matrix.png') for m in METHODS)}")
    print(f"done in {time.monotonic() - started:.0f} s")


def print_side_by_side(texts: list[str]) -> None:
    """Two blocks of lines next to each other."""
    left, right = (text.splitlines() for text in texts)
    width = max(map(len, left))
    for a, b in zip_longest(left, right, fillvalue=""):
        print(f"{a:<{width}}   {b}".rstrip())


if __name__ == "__main__":
    main()
