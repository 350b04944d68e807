"""Does the perturbation flatten the loss along the task vector? Measured on finished runs, task by task.

    python benchmarks/flatness.py RUN [RUN ...] [--samples 128] [--epsilon 0.5] [--pairs pm optimal] [--out FILE.json]

For each task of each run: the loss L (nats an example, training rows) at `M_{t-1} + s Delta_t` for s = 1 - epsilon, 1
and 1 + epsilon, and the curvature along the task vector, `(L+ + L- - 2 L0) / epsilon^2`; with s = 0 and 1/t, the loss
before the task and where an average would stand. Runs must start fresh (pm and its variants), from the same tasks.

With `--pairs` runs of two methods that `methods.py` named alike are compared, in their first tasks only: later ones
begin at different models. A line a task (means over its runs), then the mean over tasks with differences and their
95 % intervals, Student's t over tasks. "Rise": the loss at 1 - epsilon less the trained one, what scaling costs.
"Score": of the test rows, as trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import records
import trunk
from common import parser, show

MEASURES = ("curvature", "rise", "score")


def main() -> None:
    """Print and write a row for each run and task."""
    from pm_llm.system.quiet import quiet_libraries

    arguments = parser(__doc__)
    arguments.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    arguments.add_argument("--samples", type=int, default=128, help="training rows a task")
    arguments.add_argument("--epsilon", type=float, default=0.5)
    arguments.add_argument(
        "--pairs", nargs=2, metavar="METHOD", help="compare runs of these two, in their first tasks"
    )
    given = arguments.parse_args()
    if given.pairs and not paired([path.name for path in given.runs], *given.pairs):
        arguments.error(f"no two of these runs are of {' and '.join(given.pairs)} and named alike otherwise.")
    quiet_libraries()
    rows = [row for path in given.runs for row in measured(path, given.samples, given.epsilon, bool(given.pairs))]
    show(compared(rows, *given.pairs) if given.pairs else rows, given.out)


def paired(runs: Sequence[str], one: str, other: str) -> list[tuple[str, str]]:
    """The runs `ONE-x` that have an `OTHER-x`, and these."""
    rests = [run.removeprefix(f"{one}-") for run in runs if run.startswith(f"{one}-")]
    return [(f"{one}-{x}", f"{other}-{x}") for x in rests if f"{other}-{x}" in runs]


def compared(rows: Sequence[dict[str, Any]], one: str, other: str) -> list[dict[str, Any]]:
    """A line a task and one over tasks; see the module's docstring."""
    by_run = {row["run"]: row for row in rows}
    found: dict[str, list[list[float]]] = {}
    for runs in paired(list(by_run), one, other):
        pair = [by_run[run] for run in runs]
        values = [(row["curvature"], row["at 1 - eps"] - row["trained"], row["score"]) for row in pair]
        found.setdefault(pair[0]["task"], []).append([x for both in zip(*values, strict=True) for x in both])
    means = {task: [fmean(column) for column in zip(*each, strict=True)] for task, each in found.items()}
    means["all"] = [fmean(column) for column in zip(*means.values(), strict=True)]
    lines: list[dict[str, Any]] = []
    for task, numbers in means.items():
        lines.append({"task": task, "runs": sum(map(len, found.values())) if task == "all" else len(found[task])})
        for measure, x, y in zip(MEASURES, numbers[::2], numbers[1::2], strict=True):
            lines[-1] |= {f"{measure}, {one}": x, f"{measure}, {other}": y, f"{measure}, difference": x - y}
    for measure in MEASURES if len(found) > 1 else ():
        each = np.array([[line[f"{measure}, difference"] for line in lines[:-1]]])
        lines[-1][f"{measure}, difference"] = "{:.4g} ({:.4g} to {:.4g})".format(*records.interval(each))
    return lines


def measured(path: Path, samples: int, epsilon: float, first: bool) -> list[dict[str, Any]]:
    """A row for each task of a run, or for its first one."""
    from peft import PeftModel

    from pm_llm.adapters.adapter import Adapter
    from pm_llm.algebra import lowrank
    from pm_llm.config import RunConfig, build
    from pm_llm.errors import PmLlmError
    from pm_llm.families.models import load_base
    from pm_llm.fisher.probe import Probe
    from pm_llm.fisher.rows import ChosenRows
    from pm_llm.run.folder import RunDir
    from pm_llm.run.reading import TASK_ADAPTER
    from pm_llm.tasks.base import distinct
    from pm_llm.tasks.fitting import encoders_for
    from pm_llm.tasks.loading import load_tasks

    run = RunDir.open(path)
    results = run.results()
    config = build(RunConfig, {**results.config, "output_dir": str(path)}, "").check()
    if config.parsed_method().start.name != "fresh":
        raise PmLlmError(f"{path}: its tasks do not start fresh, so their adapters are not the task vectors.")
    tasks = load_tasks(config)
    encoders, _ = encoders_for(config, distinct(tasks).values())
    base = load_base(config.model, config.dtype, config.load_in_4bit)
    trunk.use(base.model, config, pack=False)  # small differences of losses are taken
    model = PeftModel.from_pretrained(base.model, str(run.stage_adapter(0, TASK_ADAPTER)), adapter_name="probe").eval()
    rows, running = [], None
    for i, task in enumerate(tasks[:1] if first else tasks):
        new = Adapter.load(run.stage_adapter(i, TASK_ADAPTER))
        features = encoders[task.name].features(task.train)
        settings = replace(config.fisher, samples=samples)
        probe = Probe(
            model, "probe", new, ChosenRows(task.name, features, settings, config.seed, base.tokenizer, base.family)
        )

        def loss(s: float, new: Any = new, past: Any = running, probe: Any = probe) -> float:
            steps = {n: x.scale(s) for n, x in new.factors.items()}
            return probe.loss({n: lowrank.add(past.factors[n], x) if past else x for n, x in steps.items()})

        low, here, high = (loss(s) for s in (1 - epsilon, 1.0, 1 + epsilon))
        rows.append(
            {
                **{"run": path.name, "task": task.name, "loss before": loss(0.0), "at 1/t": loss(1 / (i + 1))},
                **{"at 1 - eps": low, "trained": here, "at 1 + eps": high},
                "curvature": (low + high - 2 * here) / epsilon**2,
            }
        )
        if first:
            rows[-1]["score"] = results.matrix[0][0]
        running = Adapter.load(run.stage_adapter(i))
    return rows


if __name__ == "__main__":
    main()
