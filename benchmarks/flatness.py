"""Does the perturbation flatten the loss along the task vector? Measured on finished runs, task by task.

    python benchmarks/flatness.py RUN [RUN ...] [--samples 128] [--epsilon 0.5] [--out FILE.json]

For each task of each run: the loss L (nats an example, training rows) at `M_{t-1} + s Delta_t` for s = 1 - epsilon, 1
and 1 + epsilon, and the curvature along the task vector, `(L+ + L- - 2 L0) / epsilon^2`; with s = 0 and 1/t, the loss
before the task and where an average would stand. Runs must start fresh (pm and its variants), from the same tasks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from common import parser, show


def main() -> None:
    """Print and write a row for each run and task."""
    from pm_llm.quiet import quiet_libraries

    arguments = parser(__doc__)
    arguments.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    arguments.add_argument("--samples", type=int, default=128, help="training rows a task")
    arguments.add_argument("--epsilon", type=float, default=0.5)
    given = arguments.parse_args()
    quiet_libraries()
    show([row for path in given.runs for row in measured(path, given.samples, given.epsilon)], given.out)


def measured(path: Path, samples: int, epsilon: float) -> list[dict[str, Any]]:
    """A row for each task of a run."""
    from peft import PeftModel

    from pm_llm import lowrank
    from pm_llm.adapters import Adapter
    from pm_llm.config import RunConfig, build
    from pm_llm.errors import PmLlmError
    from pm_llm.fisher.probe import Probe
    from pm_llm.fisher.task import ChosenRows
    from pm_llm.models import load_base
    from pm_llm.run_dir import TASK_ADAPTER, RunDir
    from pm_llm.tasks import distinct, load_tasks
    from pm_llm.tasks.encode import encoders_for

    run = RunDir.open(path)
    config = build(RunConfig, {**run.results()["config"], "output_dir": str(path)}, "").check()
    if config.parsed_method().start.name != "fresh":
        raise PmLlmError(f"{path}: its tasks do not start fresh, so their adapters are not the task vectors.")
    tasks = load_tasks(config)
    encoders = encoders_for(config, distinct(tasks).values())
    base = load_base(config.model, config.dtype, config.load_in_4bit)
    model = PeftModel.from_pretrained(base.model, str(run.stage_adapter(0, TASK_ADAPTER)), adapter_name="probe").eval()
    rows, running = [], None
    for i, task in enumerate(tasks):
        new = Adapter.load(run.stage_adapter(i, TASK_ADAPTER))
        features = encoders[task.name].features(task.train)
        settings = replace(config.fisher, samples=samples)
        probe = Probe(model, "probe", new, ChosenRows(task.name, features, settings, config.seed, base.tokenizer))

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
        running = Adapter.load(run.stage_adapter(i))
    return rows


if __name__ == "__main__":
    main()
