"""Coefficients and accuracies with the factored Fisher against the dense one, on real tasks.

    python benchmarks/coefficient.py [--model DIR --data-dir CL_BENCHMARK] [--seeds 0 1 2] [--out FILE.json] [KEYS]

Without a model and a folder: the embedded ones, in seconds. For each seed one run with each form. Within the dense run
every fold is also done with the row and column sums of the same Fisher, on the same adapters: that gives the
difference of coefficients with nothing else different. Any key of the configuration may follow, e.g.
`--merge '{name: optimal, fisher_scale: own}'`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import keys_of, show

# short enough for a core: LoRA on the last six layers, 25 steps of eight rows a task
REAL: dict[str, Any] = {
    "benchmark": "long_sequence",
    "order": ["agnews", "SST-2", "QQP", "dbpedia", "BoolQA", "amazon", "MNLI", "yahoo"],
    "dtype": "bfloat16",
    "max_train_samples": 200,
    "max_test_samples": 50,
    "max_length": 96,
    "train.max_steps": 25,
    "lora.layers_to_transform": [24, 25, 26, 27, 28, 29],
}
EMBEDDED: dict[str, Any] = {"benchmark": "embedded", "max_test_samples": 50, "max_length": 96, "train.max_steps": 15}
BOTH: dict[str, Any] = {
    "method": "pm",
    "evaluate": "final",
    "evaluation.mode": "labels",
    "fisher.samples": 64,
    "train.per_device_train_batch_size": 8,
    "train.learning_rate": 2e-3,
}


def run(settings: dict[str, Any], shadowed: bool) -> dict[str, Any]:
    """One run's results; with `shadowed` also the coefficients of a factored Fisher on the same adapters."""
    from pm_llm import ContinualSequence, Merger
    from pm_llm.config import load_config
    from pm_llm.fisher.base import Fisher
    from pm_llm.fisher.row_column import Factored
    from pm_llm.session import Watcher
    from pm_llm.stage import Stage

    class Shadow(Watcher):
        def measured(self, stage: Stage) -> None:
            fisher: Any = stage.fisher
            sums = {name: Factored(f.F.sum(1), f.F.sum(0)) for name, f in fisher.modules.items()}
            factored = Fisher(sums, fisher.exact, fisher.exact_modules, fisher.losses)
            shadow.fold(stage.session.running, stage.new, factored, stage.trained())
            raw.append(shadow.report.raw_coefficient)

    config, raw = load_config(None, settings), []  # type: ignore[var-annotated]
    shadow = Merger(config.parsed_method().merge, max_rank=config.max_rank)
    found = ContinualSequence(config, watchers=[Shadow()] if shadowed else []).run()
    return {
        "raw": found["raw_coefficients"],
        "used": found["coefficients"],
        "shadow_raw": raw,
        "accuracies": found["matrix"][-1],
        "average": found["average_accuracy"],
        "seconds": found["seconds"],
    }


def main() -> None:
    """Run both forms for each seed, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:llama")
    parser.add_argument("--data-dir", help="with it the eight real tasks, without it the embedded ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--out", type=Path, help="JSON file, written after every run; runs it holds are not done again"
    )
    given, more = parser.parse_known_args()
    keys = keys_of(more)
    found: dict[str, dict[str, Any]] = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    common = {
        **BOTH,
        **(REAL if given.data_dir else EMBEDDED),
        "data_dir": given.data_dir,
        "model": given.model,
        **keys,
    }
    for seed in given.seeds:
        for form in ("dense", "factored"):
            if held := found.get(f"{form} {seed}"):
                if held.get("settings") != common:
                    parser.error(
                        f"{given.out} holds runs with other settings: {held.get('settings')}. Choose another file."
                    )
                continue
            with tempfile.TemporaryDirectory() as folder:
                settings = {**common, "seed": seed, "fisher.form": form, "output_dir": f"{folder}/run"}
                found[f"{form} {seed}"] = {"settings": common, **run(settings, shadowed=form == "dense")}
            if given.out:
                given.out.write_text(json.dumps(found, indent=1) + "\n")
    rows = []
    for seed in given.seeds:
        dense, factored = found[f"dense {seed}"], found[f"factored {seed}"]
        later = dense["raw"][1:]  # the first is 1 by definition
        differences = [abs(a - b) for a, b in zip(later, dense["shadow_raw"][1:], strict=True)]
        rows.append(
            {
                "seed": seed,
                "tasks": len(dense["raw"]),
                "mean coefficient": statistics.mean(later),
                "mean absolute difference": statistics.mean(differences),
                "largest": max(differences),
                "average accuracy, dense": dense["average"],
                "factored": factored["average"],
            }
        )
    show(rows, given.out and given.out.with_suffix(".table.json"))


if __name__ == "__main__":
    main()
