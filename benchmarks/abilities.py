"""What a sequence of tasks leaves of a chat model's general abilities, with and without protection, on a real model.

    python benchmarks/abilities.py --model DIR --data DATA [--seeds 1 2 3] [--ways "pm, anchor" ...] --out FILE.json
    python benchmarks/abilities.py --table FILE.json

Three tasks as chats: agnews (standard CL), FOMC and NumGLUE-cm (TRACE). Scored at the end: the tasks, and the general
suite of the package, which the base has been scored on, too. Protection is `anchor` (KL to the model before the task)
or task 0 (the base's own curvature on prompts of SuperNI). DATA holds `olora_subset`, `superni` and `trace_500`. What
is in the file already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from common import plain, superni_chats, write_rows

KEYS: dict[str, Any] = {
    "max_length": 320,
    "evaluate": "final",
    "fisher.samples": 64,
    "fisher.max_new_tokens": 48,
    "lora.target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "train.max_steps": 25,
    "train.learning_rate": 1e-3,
}
LAYERS = {30: list(range(24, 30)), 24: list(range(18, 24))}  # the last six, by how many a model has
PM = {"name": "perturb"}
ANCHOR = {"name": "anchor", "weight": 0.5}
TASK_0 = {"general": "general.jsonl", "general.samples": 128}
WAYS: dict[str, dict[str, Any]] = {
    "seqlora": {"method": "seqlora"},
    "seqlora, rate 4e-4": {"method": "seqlora", "train.learning_rate": 4e-4},
    "seqlora, weight decay 0.1": {"method": "seqlora", "train.weight_decay": 0.1},
    "seqlora, anchor": {"method": "seqlora", "start": "fresh", "merge": "sum", "constrain": ANCHOR},
    "replay": {"method": "replay", "constrain": {"name": "replay", "share": 0.01}},
    "pm": {"method": "pm"},
    "pm, anchor": {"method": "pm", "constrain": [PM, ANCHOR]},
    "pm, task 0": {"method": "pm", **TASK_0},
    "pm_curvature": {"method": "pm_curvature"},
    "pm_curvature, anchor": {"method": "pm_curvature", "constrain": [{"name": "curvature"}, ANCHOR]},
    "pm_curvature, task 0": {"method": "pm_curvature", **TASK_0},
}
TRAIN, TEST = 200, 50


def write_tasks(data: Path, out: Path, seed: int) -> list[dict[str, Any]]:
    """The three tasks as chats, and prompts of SuperNI beside them."""
    from pm_llm import RunConfig, load_tasks

    standard = RunConfig(benchmark="standard_cl", order=["agnews"], data_dir=str(data / "olora_subset/CL_Benchmark"))
    trace = RunConfig(benchmark="trace", order=["FOMC", "NumGLUE-cm"], data_dir=str(data / "trace_500"))
    found = []
    for task in [*load_tasks(standard), *load_tasks(trace)]:
        task = task.subset(TRAIN, TEST, seed)
        files = {}
        for split, rows in (("data", task.train), ("test_data", task.test)):
            chats = [
                {
                    "messages": [
                        {"role": "user", "content": (row.head + row.body[:600] + row.tail).strip()},
                        {"role": "assistant", "content": row.completion},
                    ]
                }
                for row in rows
            ]
            files[split] = write_rows(out / f"{task.name}-{split}.jsonl", chats)
        found.append({"name": task.name, "scorer": task.scorer, **files})
    folders = sorted((data / "superni" / "SuperNI").iterdir())
    chats = [row for folder in folders for row in superni_chats(folder, "train", 10)]
    write_rows(out / "general.jsonl", [{"messages": row["messages"][:1]} for row in chats])
    return found


def abilities(model: str, adapter: str | None) -> dict[str, list[Any]]:
    """By skill the numbers of each row, as its scorer has them."""
    from pm_llm.config import load_config
    from pm_llm.evaluation.answering import evaluate_adapter
    from pm_llm.tasks.general import general_tasks

    config = load_config(None, {"model": model})
    tasks = {task.name: task for task in general_tasks("all")}
    return {one.task: one.numbers.tolist() for one in evaluate_adapter(adapter, config, tasks)}


def measure(way: str, model: str, data: Path, seed: int) -> dict[str, Any]:
    """One run."""
    from transformers import AutoConfig

    from pm_llm import ContinualSequence
    from pm_llm.config import load_config

    layers = LAYERS[AutoConfig.from_pretrained(model).num_hidden_layers]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        tasks = write_tasks(data, out, seed)
        keys = {**KEYS, **WAYS[way], "model": model, "seed": seed, "tasks": tasks, "output_dir": str(out / "run")}
        keys["lora.layers_to_transform"] = layers
        if "general" in keys:
            keys["general"] = str(out / keys["general"])
        results = ContinualSequence(load_config(None, keys)).run()
        return {
            "tasks": dict(zip(results["tasks"], results["matrix"][-1], strict=True)),
            "coefficients": results["coefficients"],
            "seconds": round(sum(x for stage in results["seconds"] for x in stage.values())),
            "general": abilities(model, str(out / "run" / "adapter")),
        }


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a way: averages over its seeds, and what was lost of the base's abilities, row by row."""
    base, rows = found["base"], []
    for way in WAYS:
        runs = [run for key, run in found.items() if key.rpartition(" ")[0] == way]
        if not runs:
            continue
        lost = [_lost(base, run["general"]) for run in runs]
        rows.append(
            {
                "way": way,
                "seeds": len(runs),
                "tasks": round(fmean(fmean(run["tasks"].values()) for run in runs), 1),
                "general: base": round(_mean(base), 1),
                "end": round(fmean(_mean(run["general"]) for run in runs), 1),
                "lost": round(fmean(x for x, *_ in lost), 1),
                "95 %": ", ".join(f"{low:.1f} to {high:.1f}" for _, low, high in lost),
                "perplexity": round(fmean(_perplexity(run["general"]) for run in runs), 1),
                "seconds": round(fmean(run["seconds"] for run in runs)),
            }
        )
    return rows


def _skills(rows: dict[str, list[Any]]) -> dict[str, np.ndarray]:
    return {name: np.array(x)[:, 0] for name, x in rows.items() if name != "general.text"}


def _mean(rows: dict[str, list[Any]]) -> float:
    return float(np.mean([x.mean() for x in _skills(rows).values()]))


def _perplexity(rows: dict[str, list[Any]]) -> float:
    nats, tokens = np.array(rows["general.text"]).sum(axis=0)[:2]
    return float(np.exp(nats / tokens))


def _lost(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> tuple[float, float, float]:
    """Mean over skills of what was lost, with the interval of the paired bootstrap over rows."""
    rng = np.random.default_rng(0)
    gaps = [x - y for x, y in zip(_skills(before).values(), _skills(after).values(), strict=True)]
    draws = np.mean([rng.choice(gap, (4000, len(gap))).mean(axis=1) for gap in gaps], axis=0)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.mean([gap.mean() for gap in gaps])), float(low), float(high)


def main() -> None:
    """Measure what the file lacks, and print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model")
    made.add_argument("--data", type=Path)
    made.add_argument("--seeds", type=int, nargs="+", default=[1])
    made.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    made.add_argument("--out", type=Path)
    made.add_argument("--table", type=Path, metavar="FILE", help="print the table of a file, and measure nothing")
    given = made.parse_args()
    if given.table:
        print(plain(table(json.loads(given.table.read_text()))))
        return
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    if "base" not in found:
        found["base"] = abilities(given.model, None)
    for seed in given.seeds:
        for way in given.ways:
            if f"{way} {seed}" not in found:
                found[f"{way} {seed}"] = measure(way, given.model, given.data, seed)
                given.out.write_text(json.dumps(found) + "\n")
                print(plain(table(found)), flush=True)


if __name__ == "__main__":
    main()
