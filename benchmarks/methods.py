"""Methods against each other on real tasks: presets x orders x seeds, one record a run, and a table with intervals.

    python benchmarks/methods.py --out FOLDER [--model DIR --data-dir CL_BENCHMARK] [--methods pm seqlora | all]
                                 [--orders order4] [--seeds 0] [KEYS]

Without a model and a folder: the embedded ones. Runs that are in the folder are not repeated, one that was stopped
goes on. A method is a preset or a name in `variants.yaml`. Any key of the configuration may follow, e.g.
`--train.max_steps 200`; all runs of a folder must agree. On a CPU the real model is adapted in its last six layers, on
a GPU in all. Hidden states below the first adapted layer are computed once a row (`trunk.py`, and `guesses.py` for
answers). Records go to `FOLDER/records.jsonl`, and their table (`records.py`) is printed. Of `joint` only the last
stage is trained to its end: every stage begins anew, with all rows so far.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import guesses
import records
import trunk
from common import keys_of

from pm_llm.system.coerce import read_yaml

# short enough for a core
LAST_LAYERS = [24, 25, 26, 27, 28, 29]  # of SmolLM2
REAL: dict[str, Any] = {
    "benchmark": "long_sequence",
    "dtype": "bfloat16",
    "max_train_samples": 400,
    "max_test_samples": 50,
    "max_length": 128,
    "train.max_steps": 50,
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
    """Run what is missing, write the records and print their table."""
    import torch

    from pm_llm import ContinualSequence
    from pm_llm.config import load_config
    from pm_llm.presets import PRESETS
    from pm_llm.report.data import open_run
    from pm_llm.run.going_on import changes
    from pm_llm.session import Session, Watcher
    from pm_llm.stage import Stage

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
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of records.jsonl")
    given, more = parser.parse_known_args()

    settings = {**BOTH, **(REAL if given.data_dir else EMBEDDED), "model": given.model, **keys_of(more)}
    if given.data_dir and not torch.cuda.is_available():
        settings.setdefault("lora.layers_to_transform", LAST_LAYERS)
    if given.data_dir:
        settings["data_dir"] = given.data_dir

    class Faster(Watcher):
        def loaded(self, session: Session) -> None:
            if trunk.use(session.base.model, session.config):
                session.generate = guesses.generate

        @contextmanager
        def training(self, stage: Stage) -> Iterator[None]:
            whole = stage.session.config
            last = stage.number == len(stage.session.tasks)
            if whole.method == "joint" and not last:  # each stage begins anew: the last one counts
                stage.session.config = replace(whole, train=replace(whole.train, max_steps=1))
            try:
                yield
            finally:
                stage.session.config = whole

    methods = list(PRESETS) if given.methods == ["all"] else given.methods
    variants = read_yaml((Path(__file__).parent / "variants.yaml").read_text())
    found = []
    for order in given.orders or [ORDER if given.data_dir else None]:
        for seed in given.seeds:
            for method in methods:
                name = f"{method}-{order or 'given'}-{seed}"
                keys = {**settings, **variants.get(method, {"method": method})}
                keys |= {"seed": seed, "output_dir": str(given.out / name)}
                config = load_config(None, {**keys, **({"order": order} if order else {})})
                if not (given.out / name / "results.json").exists():
                    ContinualSequence(config, watchers=[Faster()]).run()
                run = open_run(given.out / name)
                old = {**run.results.config, "words": run.results.method}  # a preset may have changed
                new = {**config.plain(), "words": config.parsed_method().plain()}
                differing = changes(old, new, rows=True)
                if differing:
                    parser.error(f"{given.out / name} was run with other settings: {'; '.join(differing)}")
                found.append(records.record(method, str(order or "given"), seed, run))
                records.add(given.out / "records.jsonl", found[-1])
    print(records.table(found))


if __name__ == "__main__":
    main()
