"""A hundred simulated tasks: time a fold, state to go on from, and peak memory, after ten tasks and after a hundred.

    python benchmarks/many_tasks.py [--tasks 100] [--modules 16] [--size 1024] [--form factored] [--out FILE.json]

Synthetic adapters of rank 8 with factored Fishers, each fold from and to disk as a run does it: running adapter and
curvature are written and read back between tasks. (A run's folder keeps every task's adapters besides.) The
rank (32) is reached after four tasks; time and memory are medians of the nine tasks around the one named.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import parser, peak_memory, show


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--tasks", type=int, default=100)
    arguments.add_argument("--modules", type=int, default=16)
    arguments.add_argument("--size", type=int, default=1024, help="of a square weight matrix")
    arguments.add_argument("--form", choices=("dense", "factored"), default="factored")
    given = arguments.parse_args()
    import torch
    from safetensors.torch import load_file, save_file

    from pm_llm import Merger
    from pm_llm.adapters.adapter import Adapter
    from pm_llm.algebra.lowrank import LowRank
    from pm_llm.fisher.base import Fisher
    from pm_llm.fisher.dense import Dense
    from pm_llm.fisher.row_column import Factored

    names, size = [f"layers.{i}.q_proj" for i in range(given.modules)], given.size
    seconds, memory, disk = [], [], []
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        for task in range(given.tasks):
            torch.manual_seed(task)
            factors = {n: LowRank(torch.randn(size, 8), torch.randn(8, size)) for n in names}
            new = Adapter(factors, {"target_modules": ["q_proj"]})
            if given.form == "factored":
                fisher = Fisher({n: _equal(Factored(torch.rand(size), torch.rand(size))) for n in names})
            else:
                fisher = Fisher({n: Dense(torch.rand(size, size)) for n in names})
            with peak_memory() as peak:
                started = time.perf_counter()
                merger, running = Merger("optimal", max_rank=32), None
                if task:
                    merger.load_state_dict(load_file(folder / "curvature.safetensors"), task)
                    running = Adapter.load(folder / "running")
                merged = merger.fold(running, new, fisher)
                merged.save(folder / "next")
                save_file(merger.state_dict(), folder / "next" / "curvature.safetensors")
                seconds.append(time.perf_counter() - started)
            for file in (folder / "next").iterdir():
                (folder / "running").mkdir(exist_ok=True)
                file.rename(folder / ("curvature.safetensors" if file.stem == "curvature" else f"running/{file.name}"))
            memory.append(peak[0])
            disk.append(sum(p.stat().st_size for p in folder.rglob("*.safetensors")))
    rows = []
    for task in sorted({t for t in (10, 20, 50) if t < given.tasks} | {given.tasks}):
        near = slice(min(task - 5, given.tasks - 9), task + 4)
        rows.append(
            {
                "after task": task,
                "seconds a fold": statistics.median(seconds[near]),
                "state, MiB": disk[task - 1] / 2**20,
                "extra memory, MiB": statistics.median(memory[near]) / 2**20,
            }
        )
    first, last = rows[0], rows[-1]
    ratios = {k: last[k] / first[k] if first[k] else "-" for k in list(first)[1:]}
    rows.append({"after task": "ratio last / first", **ratios})
    show(rows, given.out)


def _equal(fisher: Any) -> Any:
    """Row sums and column sums with one total, as those of a matrix have."""
    return type(fisher)(fisher.r, fisher.c * (fisher.r.sum() / fisher.c.sum()))


if __name__ == "__main__":
    main()
