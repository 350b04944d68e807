"""All that P&M adds to training (Fisher, coefficient, fold), as a share of training, in a real run.

    python benchmarks/overhead.py [--model embedded:llama] [--rows 256] [--samples 32] [--out FILE.json] [KEYS]

One run of two tasks; the second has a running adapter. From its seconds a row of training and a row of the Fisher, the
table gives the share at the sizes of the recipes: rows of a task, and Fisher samples. Any key of the configuration may
follow, e.g. `--benchmark standard_cl --data_dir CL_Benchmark --order '[agnews, SST-2]'`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from common import parser, show

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
    arguments.add_argument("--rows", type=int, default=256)
    arguments.add_argument("--samples", type=int, default=32)
    given, more = arguments.parse_known_args()
    from pm_llm import ContinualSequence
    from pm_llm.config import load_config

    keys: dict[str, Any] = {"benchmark": "embedded", "order": "sentiment,topic", "evaluate": "final"}
    keys |= {"max_train_samples": given.rows, "max_test_samples": 4, "fisher.samples": given.samples}
    keys |= {"train.max_steps": given.rows // 8, "train.per_device_train_batch_size": 8, "fisher.form": "factored"}
    keys |= {key.removeprefix("--"): yaml.safe_load(value) for key, value in zip(more[::2], more[1::2], strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        keys |= {"model": given.model, "output_dir": str(Path(folder) / "run")}
        last = ContinualSequence(load_config(None, keys)).run()["seconds"][-1]
    train, fisher = last["train"] / given.rows, last["fisher"] / given.samples
    print(f"a row of training {1000 * train:.1f} ms, a row of the Fisher {1000 * fisher:.1f} ms, ", end="")
    print(f"coefficient and fold {1000 * last['merge']:.1f} ms")
    sizes = [("this run", given.rows, given.samples), *SIZES]
    show(
        [
            {
                "size": name,
                "rows": rows,
                "Fisher samples": samples,
                "added, % of training": round(100 * (fisher * samples + last["merge"]) / (train * rows), 2),
            }
            for name, rows, samples in sizes
        ],
        given.out,
    )


if __name__ == "__main__":
    main()
