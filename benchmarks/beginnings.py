"""What later tasks leave of an adapter made elsewhere, and of the base's own abilities, on a real model.

    python benchmarks/beginnings.py adapter --model DIR --data DATA [--seeds 1 2 3] --out FILE.json
    python benchmarks/beginnings.py general --model DIR --data DATA [--seeds 1 2 3] --out FILE.json

`adapter`: plain TRL trains a LoRA adapter on agnews and dbpedia; two more tasks follow with `pm_curvature`, which
knows the adapter's curvature by rows of its tasks, by their prompts alone, by text that the model writes itself, or
not at all. Scored are all four tasks. `general`: two tasks with and without the base's own Fisher on prompts of
SuperNI; measured is the perplexity of general text (MeetingBank, ScienceQA) and of answers in the chat format
(SuperNI tasks that gave no prompts), before and after. DATA holds `olora_subset`, `superni` and `trace_500`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import show, write_rows

FIRST, LATER = ("agnews", "dbpedia"), ("amazon", "yahoo")
LAYERS = [24, 25, 26, 27, 28, 29]
KEYS: dict[str, Any] = {
    "method": "pm_curvature",
    "max_length": 128,
    "max_new_tokens": 12,
    "evaluate": "final",
    "evaluation.mode": "labels",
    "fisher.samples": 64,
    "fisher.max_new_tokens": 48,
    "lora.layers_to_transform": LAYERS,
    "train.max_steps": 25,
    "train.learning_rate": 2e-3,
}
BODY, TRAIN, TEST = 200, 200, 50  # characters of a row's text; rows a task


def write_tasks(data: Path, out: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Each task as JSONL files, and as an entry of `tasks`."""
    from pm_llm import RunConfig, load_tasks

    names = [*FIRST, *LATER]
    config = RunConfig(benchmark="long_sequence", order=names, data_dir=str(data / "olora_subset" / "CL_Benchmark"))
    found = {}
    for task in load_tasks(config):
        task = task.subset(TRAIN, TEST, seed)
        for split, rows in (("train", task.train), ("test", task.test)):
            lines = [{"prompt": row.head + row.body[:BODY] + row.tail, "completion": row.completion} for row in rows]
            write_rows(out / task.name / f"{split}.jsonl", lines)
        write_rows(
            out / f"{task.name}.prompts.jsonl",
            [{"prompt": x["prompt"]} for x in read(out / task.name / "train.jsonl")],
        )
        found[task.name] = {"data": str(out / task.name), "labels": list(task.labels)}
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """JSONL."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_elsewhere(model: str, rows: list[dict[str, Any]], seed: int, out: Path) -> None:
    """An adapter by TRL alone."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    given = Dataset.from_list([{"prompt": x["prompt"], "completion": f" {x['completion']}"} for x in rows])
    settings = SFTConfig(
        output_dir=str(out / "trl"),
        max_steps=40,
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        seed=seed,
        save_strategy="no",
        report_to=[],
        max_length=192,
        bf16=False,
    )
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=LAYERS, task_type="CAUSAL_LM"
    )
    base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    trainer = SFTTrainer(model=base, args=settings, train_dataset=given, peft_config=lora)
    trainer.train()
    trainer.save_model(str(out / "adapter"))


def of_adapter(model: str, data: Path, seed: int, found: dict[str, Any], keep: Any) -> None:
    """One seed of the first part."""
    from pm_llm import ContinualSequence
    from pm_llm.config import load_config
    from pm_llm.evaluation.answering import evaluate_adapter

    ways = ("rows", "prompts", "written", "none")
    if all(f"{way} {seed}" in found for way in ways):
        return
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        tasks = write_tasks(data, out, seed)
        train_elsewhere(model, [x for name in FIRST for x in read(out / name / "train.jsonl")], seed, out)
        common = {**KEYS, "model": model, "seed": seed}
        config = load_config(None, {**common, "tasks": list(tasks.values())})
        begun = {one.task: one.score() for one in evaluate_adapter(str(out / "adapter"), config)}
        probes = [{**tasks[name], "data": f"{tasks[name]['data']}/test.jsonl", "name": name} for name in FIRST]
        sources: dict[str, dict[str, Any]] = {
            "rows": {"adapter.data": [f"{out}/{name}/train.jsonl" for name in FIRST]},
            "prompts": {"adapter.data": [f"{out}/{name}.prompts.jsonl" for name in FIRST]},
            "written": {},
            "none": {"adapter.protect": False},
        }
        for way in ways:
            if f"{way} {seed}" in found:
                continue
            keys = {
                **common,
                **sources[way],
                "adapter.path": str(out / "adapter"),
                "tasks": [tasks[name] for name in LATER],
                "probes": probes,
                "output_dir": f"{out}/run-{way}",
            }
            results = ContinualSequence(load_config(None, keys)).run()
            scores = dict(zip(results["tasks"], results["matrix"][-1], strict=True))
            found[f"{way} {seed}"] = {"begun": begun, "scores": scores, "coefficients": results["coefficients"]}
            keep()


def write_general(data: Path, out: Path) -> tuple[str, list[dict[str, Any]]]:
    """Prompts of SuperNI tasks; and text and chats to take the perplexity of, as tasks."""
    folders = sorted((data / "superni" / "SuperNI").iterdir())
    chats: list[list[dict[str, Any]]] = [[], []]
    for number, folder in enumerate(folders):
        task = json.loads((folder / "train.json").read_text())
        for one in task["Instances"][:24]:
            asked = {"role": "user", "content": f"{task['Definition'][0]}\n\n{one['input'][:300]}"}
            said = {"role": "assistant", "content": one["output"][0][:200]}
            chats[number % 2].append({"messages": [asked] if number % 2 == 0 else [asked, said]})
    write_rows(out / "prompts.jsonl", chats[0])
    write_rows(out / "chat.jsonl", chats[1][::2][:100])
    texts = []
    for name, column in (("MeetingBank", "prompt"), ("ScienceQA", "answer")):
        rows = json.loads((data / "trace_500" / name / "test.json").read_text())
        texts += [row[column][70:] for row in rows if len(row[column]) > 500][:50]
    write_rows(out / "text.jsonl", [{"prompt": text[:150], "completion": text[150:500]} for text in texts])
    scored = [{"data": str(out / f"{name}.jsonl"), "name": name, "scorer": "perplexity"} for name in ("text", "chat")]
    return str(out / "prompts.jsonl"), scored


def of_general(model: str, data: Path, seed: int, found: dict[str, Any], keep: Any) -> None:
    """One seed of the second part."""
    from pm_llm import ContinualSequence
    from pm_llm.config import load_config
    from pm_llm.evaluation.answering import evaluate_adapter
    from pm_llm.tasks.loading import load_probes

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        prompts, scored = write_general(data, out)
        tasks = write_tasks(data, out, seed)
        common = {**KEYS, "model": model, "seed": seed}
        texts = load_config(None, {**common, "max_length": 512, "max_new_tokens": 160, "probes": scored})
        columns = {task.name: task for task in load_probes(texts)}

        def perplexities(adapter: str | None) -> dict[str, float]:
            return {one.task: one.score() for one in evaluate_adapter(adapter, texts, columns)}

        if "base" not in found:
            found["base"] = {"perplexity": perplexities(None)}
            keep()
        for way, more in (("with", {"general": prompts}), ("without", {})):
            if f"{way} {seed}" not in found:
                keys = {**common, **more, "tasks": [tasks[n] for n in FIRST], "output_dir": f"{out}/{way}"}
                results = ContinualSequence(load_config(None, keys)).run()
                after = perplexities(f"{out}/{way}/adapter")
                scores = dict(zip(results["tasks"], results["matrix"][-1], strict=True))
                found[f"{way} {seed}"] = {
                    "perplexity": after,
                    "scores": scores,
                    "coefficients": results["coefficients"],
                }
                keep()


def rows_of(part: str, found: dict[str, Any], seeds: list[int]) -> list[dict[str, Any]]:
    """Means over the seeds, with standard deviations."""

    def told(numbers: list[float]) -> str:
        return f"{fmean(numbers):.2f} ± {stdev(numbers):.2f}" if len(numbers) > 1 else f"{numbers[0]:.2f}"

    rows = []
    if part == "adapter":
        begun = [found[f"rows {seed}"]["begun"] for seed in seeds]
        rows.append({"curvature from": "(as it came)", **{n: told([x[n] for x in begun]) for n in (*FIRST, *LATER)}})
        for way in ("rows", "prompts", "written", "none"):
            scores = [found[f"{way} {seed}"]["scores"] for seed in seeds]
            rows.append({"curvature from": way, **{n: told([x[n] for x in scores]) for n in (*FIRST, *LATER)}})
        return rows
    base = found["base"]["perplexity"]
    rows.append({"general": "(base)", **{n: told([x]) for n, x in base.items()}, **dict.fromkeys(FIRST, "")})
    for way in ("with", "without"):
        runs = [found[f"{way} {seed}"] for seed in seeds]
        texts = {n: told([run["perplexity"][n] for run in runs]) for n in base}
        rows.append({"general": way, **texts, **{n: told([run["scores"][n] for run in runs]) for n in FIRST}})
    return rows


def main() -> None:
    """Run what the file lacks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["adapter", "general"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    for seed in given.seeds:
        work = of_adapter if given.part == "adapter" else of_general
        work(given.model, given.data, seed, found, lambda: given.out.write_text(json.dumps(found, indent=1) + "\n"))
    show(rows_of(given.part, found, given.seeds), None)


if __name__ == "__main__":
    main()
