"""How much the coefficient depends on which rows, and how many, the Fisher is measured on.

    python benchmarks/fisher_samples.py [--model embedded:llama] [--samples 16 32 64 128] [--draws 5] [--out FILE.json]

One run of two tasks. The coefficient of the second is computed anew from other random rows of both tasks, `--draws`
times for each number of rows, on the same adapters. Any key of the configuration may follow.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import keys_of, parser, show


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="embedded:llama")
    arguments.add_argument("--samples", type=int, nargs="+", default=[16, 32, 64, 128])
    arguments.add_argument("--draws", type=int, default=5, help="at least 2")
    given, more = arguments.parse_known_args()
    if given.draws < 2:
        arguments.error(f"--draws is {given.draws}: the spread of one draw is unknown. Give at least 2.")
    import dataclasses

    from pm_llm import ContinualSequence, Merger
    from pm_llm.config import load_config
    from pm_llm.fisher.rows import ChosenRows
    from pm_llm.session import Watcher
    from pm_llm.stage import Stage

    mergers: dict[tuple[int, int], Merger] = {}
    found: dict[int, list[float]] = {n: [] for n in given.samples}

    class Redrawn(Watcher):
        def measured(self, stage: Stage) -> None:
            session = stage.session
            for n in given.samples:
                for draw in range(given.draws):
                    section = dataclasses.replace(session.config.fisher, samples=n)
                    drawn = ChosenRows(
                        stage.task.name, stage.rows, section, 1000 * draw + n, session.base.tokenizer, stage.family
                    )
                    own = mergers.setdefault((n, draw), Merger(session.method.merge, max_rank=64))
                    own.fold(session.running, stage.new, stage.measured_as(own, drawn), stage.trained())
                    if session.running is not None:
                        found[n].append(own.report.raw_coefficient)

    keys: dict[str, Any] = {"method": "pm", "benchmark": "embedded", "order": "sentiment,topic", "evaluate": "final"}
    keys |= {"max_train_samples": 256, "max_test_samples": 4, "train.max_steps": 25, "train.learning_rate": 2e-3}
    keys |= keys_of(more)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, {**keys, "model": given.model, "output_dir": str(Path(folder) / "run")})
        ContinualSequence(config, watchers=[Redrawn()]).run()
    rows = []
    for n, values in found.items():
        mean, spread = statistics.mean(values), statistics.stdev(values)
        rows.append({"rows": n, "mean coefficient": mean, "standard deviation": spread, "draws": len(values)})
    show(rows, given.out)


if __name__ == "__main__":
    main()
