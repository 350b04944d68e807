"""What `pm-llm quickstart` tells, over seeds: a table for docs/results.md and the picture of the README.

    python benchmarks/quickstart.py [--seeds 0 1 2 3 4] [--out docs/results/quickstart.json]
    python benchmarks/quickstart.py --table docs/results/quickstart.json
    python benchmarks/quickstart.py --figure docs/results/quickstart.json      # docs/results/quickstart.svg

Runs that are in the file are not made again. About two minutes a seed and model on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from pm_llm.commands.quickstart import METHODS, train_all

MODELS = ("llama", "t5")
SHOWN = {"seqlora": "plain fine-tuning", "pm_curvature": "pm_curvature"}


def table(found: dict[str, Any]) -> str:
    """A row a method and model: the mean over seeds, the lowest and the highest of what is known after the last task,
    and what was known of each task when it was learnt."""
    lines = [
        "| model | method | average at the end | lowest to highest | learnt | seeds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model in MODELS:
        for method in METHODS:
            runs = [run for run in found.values() if (run["model"], run["method"]) == (model, method)]
            ends = [run["average"] for run in runs]
            learnt = f"{fmean(run['plasticity'] for run in runs):.1f}" if method != "joint" else "-"
            span = f"{min(ends):.1f} to {max(ends):.1f}"
            lines.append(f"| {model} | `{method}` | {fmean(ends):.1f} | {span} | {learnt} | {len(runs)} |")
    return "\n".join(lines)


def figure(found: dict[str, Any], path: Path) -> None:
    """Two heat maps of seed 0 on the LLaMA: what is known of each task after each task."""
    import matplotlib
    from matplotlib.figure import Figure

    from pm_llm.report.figures import STYLE, heat_map

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "quickstart"}):
        drawn = Figure(figsize=(8, 2.9), layout="constrained")
        for axes, (method, label) in zip(drawn.subplots(1, 2, sharey=True), SHOWN.items(), strict=True):
            run = found[f"llama {method} 0"]
            heat_map(axes, [[float("nan") if x is None else x for x in row] for row in run["matrix"]])
            axes.set_xticks(range(len(run["tasks"])), run["tasks"])
            axes.set_yticks(range(len(run["tasks"])), [f"after {name}" for name in run["tasks"]])
            axes.set_title(f"{label}: ends at {run['average']:.0f} %")
            axes.tick_params(length=0)
        drawn.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, or show what was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--out", type=Path, default=Path("docs/results/quickstart.json"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    if given.table or given.figure:
        path = given.table or given.figure
        found = json.loads(path.read_text())
        if given.table:
            print(table(found))
        else:
            figure(found, path.with_suffix(".svg"))
        return
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    for seed in given.seeds:
        for model in given.models:
            missing = tuple(method for method in METHODS if f"{model} {method} {seed}" not in found)
            if not missing:
                continue
            with tempfile.TemporaryDirectory() as folder:
                for method, run in train_all(model, Path(folder), seed, missing).items():
                    found[f"{model} {method} {seed}"] = {
                        **{"model": model, "method": method, "seed": seed, "tasks": run.tasks, "matrix": run.matrix},
                        "average": run.numbers["average_accuracy"],
                        "plasticity": run.numbers["plasticity"],
                        "coefficients": run.coefficients,
                    }
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
