"""Evaluation throughput: packed generation and label scoring against the plain way.

    python benchmarks/evaluation.py --model DIR_OR_ID --data-dir CL_BENCHMARK [--adapter DIR] [--rows 500]

The plain way is what many research scripts do: batches of 32 in the rows' order, always 50 new tokens, cut at the
first end of sequence afterwards. Rows of several lengths are mixed and divided into parts; each part is answered in
every way within this one process, in turns, and the ratio of times is taken part by part. Predictions must be
identical (float32).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from pm_llm.config import RunConfig
from pm_llm.evaluation.generate import generate, padded
from pm_llm.evaluation.likelihood import choose_labels
from pm_llm.models import load_base
from pm_llm.tasks import Example, Task, load_tasks
from pm_llm.tasks.encode import Encoder

NEW_TOKENS = 50


@torch.inference_mode()
def plain(model: Any, encoder: Encoder, rows: list[Example], batch_size: int = 32) -> list[str]:
    """Batches in the rows' order, always NEW_TOKENS more; what follows the first end of sequence is thrown away."""
    ends = set(model.generation_config.eos_token_id)
    answers = []
    for at in range(0, len(rows), batch_size):
        prompts = [encoder.prompt(row) for row in rows[at : at + batch_size]]
        inputs = padded(encoder, prompts).to(model.device)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        start = 0 if encoder.seq2seq else inputs["input_ids"].shape[1]
        for ids in output[:, start:].tolist():
            end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
            answers.append(encoder.tokenizer.decode(ids[:end], skip_special_tokens=True).strip())
    return answers


def by_labels(model: Any, encoder: Encoder, rows: list[tuple[Task, Example]]) -> list[str]:
    """The most likely label of each row, task by task."""
    tasks = {task.name: task for task, _ in rows}
    found: dict[int, str] = {}
    for name, task in tasks.items():
        at = [i for i, (other, _) in enumerate(rows) if other.name == name]
        answers = choose_labels(model, encoder, [rows[i][1] for i in at], task.labels, 64)
        found |= dict(zip(at, answers, strict=True))
    return [found[i] for i in range(len(rows))]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:llama", help="Hub id or folder of the base model")
    parser.add_argument("--adapter", help="an adapter that has learned the tasks, so that answers end")
    parser.add_argument("--data-dir", help="CL_Benchmark folder; none: the embedded tasks")
    parser.add_argument("--order", default="order6", help="tasks of the long sequence: an order or names")
    parser.add_argument("--rows", type=int, default=500, help="rows in all")
    parser.add_argument("--parts", type=int, default=5, help="parts the rows are divided into")
    parser.add_argument("--max-length", type=int, default=562, help="longest input and answer, in tokens")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()

    source = {"benchmark": "long_sequence", "order": given.order} if given.data_dir else {"benchmark": "embedded"}
    tasks = load_tasks(RunConfig(**source, data_dir=given.data_dir))
    rows = random.Random(0).sample([(task, row) for task in tasks for row in task.test], given.rows)

    base = load_base(given.model)
    model = base.model
    if given.adapter:
        model = PeftModel.from_pretrained(model, given.adapter)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    encoder = Encoder(base.tokenizer, base.seq2seq, given.max_length, NEW_TOKENS)
    ways = {
        "plain": lambda part: plain(model, encoder, [row for _, row in part]),
        "packed": lambda part: generate(model, encoder, [row for _, row in part], 64),
        "labels": lambda part: by_labels(model, encoder, part),
    }
    parts = [rows[i :: given.parts] for i in range(given.parts)]
    for way in ways.values():
        way(parts[0][:4])  # warm up

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    different = 0
    for number, part in enumerate(parts):
        answers = {}
        names = list(ways)
        for name in names[number % 3 :] + names[: number % 3]:
            started = time.perf_counter()
            answers[name] = ways[name](part)
            seconds[name].append(time.perf_counter() - started)
        different += sum(a != b for a, b in zip(answers["plain"], answers["packed"], strict=True))
        print(
            f"part {number + 1} of {len(parts)}: " + ", ".join(f"{n} {s[-1]:.1f} s" for n, s in seconds.items()),
            flush=True,
        )

    ratios = {name: [p / s for p, s in zip(seconds["plain"], seconds[name], strict=True)] for name in ways}
    lengths = sorted(len(encoder.prompt(row)) for _, row in rows)
    found: dict[str, Any] = {
        "rows": len(rows),
        "prompt_tokens": {"min": lengths[0], "median": lengths[len(lengths) // 2], "max": lengths[-1]},
        "different_predictions": different,
        "seconds": seconds,
        "speedup_median": {name: statistics.median(values) for name, values in ratios.items()},
        "speedup_range": {name: (min(values), max(values)) for name, values in ratios.items()},
    }
    median = lengths[len(lengths) // 2]
    print(f"\n{len(rows)} rows, prompts of {lengths[0]} to {lengths[-1]} tokens, median {median}")
    print("| way | rows/s (median) | speed-up, median of parts | from | to |\n|---|---:|---:|---:|---:|")
    for name in ways:
        rate = statistics.median(len(part) / s for part, s in zip(parts, seconds[name], strict=True))
        low, high = found["speedup_range"][name]
        print(f"| {name} | {rate:.2f} | {found['speedup_median'][name]:.2f} | {low:.2f} | {high:.2f} |")
    print(f"predictions that differ between plain and packed: {different} of {len(rows)}")
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
