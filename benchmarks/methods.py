"""Methods against each other on real tasks: presets x orders x seeds, one record a run, and a table with intervals.

    python benchmarks/methods.py --out FOLDER [--model DIR --data-dir CL_BENCHMARK] [--methods pm seqlora | all]
                                 [--orders order4] [--seeds 0] [KEYS]

Without a model and a folder: the embedded ones. Runs that are in the folder are not repeated, one that was stopped
goes on. A method is a preset or a name in `variants.yaml`. Any key of the configuration may follow, e.g.
`--train.max_steps 200`; all runs of a folder must agree. Hidden states below the first adapted layer are computed once
a row (`trunk.py`). The table is written beside the records (`records.json`, `table.md`); differences are to the first
method of the list, paired by rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import trunk
import yaml
from common import keys_of

# short enough for a core: LoRA on the last six of SmolLM2's layers
REAL: dict[str, Any] = {
    "benchmark": "long_sequence",
    "dtype": "bfloat16",
    "max_train_samples": 400,
    "max_test_samples": 50,
    "max_length": 128,
    "train.max_steps": 50,
    "lora.layers_to_transform": [24, 25, 26, 27, 28, 29],
}
EMBEDDED: dict[str, Any] = {"benchmark": "embedded", "max_test_samples": 50, "max_length": 96, "train.max_steps": 15}
ORDER = "agnews,SST-2,QQP,dbpedia"
BOTH: dict[str, Any] = {
    "evaluate": "diagonal+final",
    "fisher.samples": 32,
    "train.per_device_train_batch_size": 8,
    "train.learning_rate": 4e-3,
}


def main() -> None:
    """Run what is missing, write records and table."""
    from pm_llm import ContinualSequence
    from pm_llm.config import load_config
    from pm_llm.methods import PRESETS
    from pm_llm.report.data import open_run

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="embedded:llama")
    parser.add_argument("--data-dir", help="with it the real tasks, without it the embedded ones")
    parser.add_argument("--methods", nargs="+", default=["seqlora", "pm"], help="presets or variants, or all presets")
    parser.add_argument(
        "--orders",
        nargs="+",
        default=None,
        help=f"orders of the benchmark, or tasks with commas between (default: {ORDER})",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, records.json and table.md")
    given, more = parser.parse_known_args()

    settings = {**BOTH, **(REAL if given.data_dir else EMBEDDED), "model": given.model, **keys_of(more)}
    if given.data_dir:
        settings["data_dir"] = given.data_dir

    class Sequence(ContinualSequence):
        def _load(self) -> None:
            super()._load()
            layers = self.config.lora.layers_to_transform or [0]
            if min(layers) > 0 and not self.config.load_in_4bit:
                trunk.install(self.base.model, min(layers), self.config.model)

    methods = list(PRESETS) if given.methods == ["all"] else given.methods
    variants = yaml.safe_load((Path(__file__).parent / "variants.yaml").read_text())
    runs: dict[tuple[str, str, int], Any] = {}
    for order in given.orders or [ORDER if given.data_dir else None]:
        for seed in given.seeds:
            for method in methods:
                name = f"{method}-{order or 'given'}-{seed}"
                keys = {**settings, **variants.get(method, {"method": method})}
                keys |= {"seed": seed, "output_dir": str(given.out / name)}
                config = load_config(None, {**keys, **({"order": order} if order else {})})
                if not (given.out / name / "results.json").exists():
                    Sequence(config).run()
                runs[method, str(order), seed] = open_run(given.out / name)
                write(given.out, runs, [m for m in methods if any(key[0] == m for key in runs)])
    print((given.out / "table.md").read_text())


def write(folder: Path, runs: dict[tuple[str, str, int], Any], methods: list[str]) -> None:
    """`records.json`, a record a run, and `table.md`, a line a method."""
    records = [{"preset": m, "order": o, "seed": s, **run.results} for (m, o, s), run in runs.items()]
    (folder / "records.json").write_text(json.dumps(records, indent=1) + "\n")
    header = ["method", "final average", f"less {methods[0]}", "backward transfer", "plasticity", "coefficients"]
    lines = ["| " + " | ".join([*header, "minutes"]) + " |", "|---|" + "---|" * len(header)]
    for method in methods:
        found = {key[1:]: run for key, run in runs.items() if key[0] == method}
        lines.append("| " + " | ".join([method, *cells(found, runs, methods[0])]) + " |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")


def cells(found: dict[tuple[str, int], Any], runs: dict[tuple[str, str, int], Any], first: str) -> list[str]:
    """A method's numbers over its orders and seeds; the intervals are of the test rows drawn."""
    from pm_llm.evaluation.bootstrap import mean_interval, paired_difference
    from pm_llm.methods import PRESETS

    run, difference = next(iter(found.values())), "-"
    if PRESETS[run.results["config"]["method"]].task_id:  # each task is answered by its own adapter
        own = [one.predictions[i][name] for one in found.values() for i, name in enumerate(one.results["stages"])]
        average = mean_interval(own)
        return [f"{average.value:.1f} ({average.low:.1f} to {average.high:.1f})", *"-----"]
    average = mean_interval([task for one in found.values() for task in one.final])
    against = {key: runs[(first, *key)] for key in found if (first, *key) in runs}
    if run is not next(iter(against.values()), run) and len(against) == len(found):
        both = ([task for key in found for task in which[key].final] for which in (found, against))
        x = paired_difference(*both)
        difference = f"{x.value:+.1f} ({x.low:+.1f} to {x.high:+.1f})"
    seconds = [sum(sum(stage.values()) for stage in one.results["seconds"]) for one in found.values()]
    return [
        f"{average.value:.1f} ({average.low:.1f} to {average.high:.1f})",
        difference,
        f"{fmean(one.results['backward_transfer'] for one in found.values()):+.1f}",
        f"{fmean(one.results['plasticity'] for one in found.values()):.1f}",
        ", ".join(f"{c:.2f}" for c in run.results["coefficients"]),
        f"{fmean(seconds) / 60:.1f}",
    ]


if __name__ == "__main__":
    main()
