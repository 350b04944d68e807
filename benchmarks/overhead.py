"""All that P&M adds to training (Fisher, coefficient, fold), as a share of training, in real runs.

    python benchmarks/overhead.py [--model embedded:llama] [--rows 128] [--samples 32] [--out FILE.json] [KEYS]

Two runs of two tasks, the second of twice the rows and twice the Fisher samples. From the second tasks' seconds, the
difference is what a row of training and a row of the Fisher cost; the rest is fixed. `added` puts these into the rows
and samples of the recipes, for the model and rows measured here. Any key of the configuration may follow, e.g.
`--benchmark long_sequence --data_dir CL_Benchmark --order '[agnews, SST-2]'`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from common import keys_of, parser, show

# (recipe, rows of its smallest and of its middle task, Fisher samples)
SIZES = (
    ("standard_cl, full (smallest task: 4,000 rows)", 4000, 128),
    ("standard_cl, full (all four: 33,000 rows, 4 Fishers)", 33000 // 4, 128),
    ("long_sequence, full (1,000 rows a task)", 1000, 128),
    ("smollm2_135m_cpu (480 rows a task)", 480, 64),
)


def main() -> None:
    """Measure, print a table, write JSON."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="embedded:llama")
    arguments.add_argument("--rows", type=int, default=128)
    arguments.add_argument("--samples", type=int, default=32)
    arguments.add_argument("--turns", type=int, default=2, choices=(1, 2))
    given, more = arguments.parse_known_args()
    from pm_llm import ContinualSequence
    from pm_llm.config import load_config

    keys: dict[str, Any] = {"method": "pm", "benchmark": "embedded", "order": "sentiment,topic", "evaluate": "final"}
    keys |= {"max_test_samples": 4, "train.per_device_train_batch_size": 8, "model": given.model}
    keys |= keys_of(more)
    seconds = []
    for times in (1, 2, 1, 2)[: 2 * given.turns]:
        with tempfile.TemporaryDirectory() as folder:
            sizes = {"max_train_samples": times * given.rows, "fisher.samples": times * given.samples}
            sizes |= {"train.max_steps": times * given.rows // 8, "output_dir": str(Path(folder) / "run")}
            seconds.append(ContinualSequence(load_config(None, {**keys, **sizes})).run()["seconds"][-1])
    short, long = ({k: median(one[k] for one in part) for k in part[0]} for part in (seconds[::2], seconds[1::2]))
    row = {key: (long[key] - short[key]) / n for key, n in (("train", given.rows), ("fisher", given.samples))}
    fixed = {key: max(0.0, short[key] - row[key] * n) for key, n in (("train", given.rows), ("fisher", given.samples))}
    for key in row:
        print(f"{key}: {1000 * row[key]:.1f} ms a row, {1000 * fixed[key]:.0f} ms fixed")
    print(f"coefficient and fold: {1000 * short['merge']:.0f} ms\n")
    rows = []
    for name, count, samples in (("this run", given.rows, given.samples), *SIZES):
        added = fixed["fisher"] + row["fisher"] * samples + short["merge"]
        share = 100 * added / (fixed["train"] + row["train"] * count)
        rows.append({"size": name, "rows": count, "Fisher samples": samples, "added, % of training": round(share, 2)})
    show(rows, given.out)


if __name__ == "__main__":
    main()
