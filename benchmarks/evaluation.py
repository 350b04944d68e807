"""Evaluation throughput: packed generation and label scoring against the plain way.

    python benchmarks/evaluation.py --model DIR_OR_ID --data-dir CL_BENCHMARK [--adapter DIR] [--rows 500]

The plain way is what many research scripts do: batches of 32 in the rows' order, always 50 new tokens, cut at the
first end of sequence afterwards. Packed generation and label scoring take the rows task by task, as a run does. All
ways answer the same rows in turns within this one process, and the ratio of times is taken turn by turn. Predictions
must be identical (float32).
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from peft import PeftModel

from pm_llm.config import RunConfig
from pm_llm.evaluation.generate import generate
from pm_llm.evaluation.likelihood import choose_labels
from pm_llm.families.models import load_base
from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.encoding import Encoder
from pm_llm.tasks.loading import load_tasks

NEW_TOKENS = 50


@torch.inference_mode()
def plain(model: Any, encoder: Encoder, rows: list[Example], batch_size: int = 32) -> list[str]:
    """Batches in the rows' order, always NEW_TOKENS more; what follows the first end of sequence is thrown away."""
    ends = set(model.generation_config.eos_token_id)
    answers = []
    for at in range(0, len(rows), batch_size):
        prompts = [encoder.prompt(row) for row in rows[at : at + batch_size]]
        side = encoder.family.padding_side
        inputs = encoder.tokenizer.pad({"input_ids": prompts}, padding_side=side, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        for ids in encoder.family.new_tokens(output, inputs).tolist():
            end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
            answers.append(encoder.tokenizer.decode(ids[:end], skip_special_tokens=True).strip())
    return answers


def by_task(rows: list[tuple[Task, Example]], answer: Callable[[Task, list[Example]], list[str]]) -> list[str]:
    """The answers to each task's rows, put back in the rows' order."""
    found: dict[int, str] = {}
    for task in {task.name: task for task, _ in rows}.values():
        at = [i for i, (other, _) in enumerate(rows) if other.name == task.name]
        found |= dict(zip(at, answer(task, [rows[i][1] for i in at]), strict=True))
    return [found[i] for i in range(len(rows))]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="embedded:llama", help="Hub id or folder of the base model")
    parser.add_argument("--adapter", help="an adapter that has learned the tasks, so that answers end")
    parser.add_argument("--data-dir", help="CL_Benchmark folder; none: the embedded tasks")
    parser.add_argument("--order", default="order6", help="tasks of the long sequence: an order or names")
    parser.add_argument("--rows", type=int, default=500, help="rows in all")
    parser.add_argument("--repeats", type=int, default=1, help="turns, of which the median is shown")
    parser.add_argument("--batch-size", type=int, default=64, help="at most this many rows at a time, when packed")
    parser.add_argument("--max-length", type=int, default=562, help="longest input and answer, in tokens")
    given = parser.parse_args()

    source = {"benchmark": "long_sequence", "order": given.order} if given.data_dir else {"benchmark": "embedded"}
    tasks = load_tasks(RunConfig(**source, data_dir=given.data_dir))
    rows = random.Random(0).sample([(task, row) for task in tasks for row in task.test], given.rows)

    base = load_base(given.model)
    model = base.model
    if given.adapter:
        model = PeftModel.from_pretrained(model, given.adapter)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    encoder = Encoder(base.tokenizer, base.family, given.max_length, NEW_TOKENS)

    def label(task: Task, examples: list[Example]) -> list[str]:
        return choose_labels(model, encoder, examples, task.labels, given.batch_size)

    def packed(task: Task, examples: list[Example]) -> list[str]:
        return generate(model, encoder, examples, given.batch_size)

    ways: dict[str, Callable[..., list[str]]] = {
        "plain": lambda some=rows: plain(model, encoder, [row for _, row in some]),
        "packed": lambda some=rows: by_task(some, packed),
        "labels": lambda some=rows: by_task(some, label),
    }
    for way in ways.values():
        way(rows[:4])  # warm up

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[str]] = {}
    for turn in range(given.repeats):
        names = list(ways)[turn % 3 :] + list(ways)[: turn % 3]
        for name in names:
            started = time.perf_counter()
            answers[name] = ways[name]()
            seconds[name].append(time.perf_counter() - started)
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)

    different = sum(a != b for a, b in zip(answers["plain"], answers["packed"], strict=True))
    lengths = sorted(len(encoder.prompt(row)) for _, row in rows)
    speedup = {n: [p / s for p, s in zip(seconds["plain"], seconds[n], strict=True)] for n in ways}
    print(f"\n{len(rows)} rows, prompts of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}")
    unlike = {"plain": 0, "packed": different, "labels": "-"}
    found: list[dict[str, Any]] = [
        {
            "way": name,
            "rows": len(rows),
            "seconds": statistics.median(seconds[name]),
            "speed-up": statistics.median(speedup[name]),
            "turns": len(seconds[name]),
            "predictions unlike the plain way's": unlike[name],
        }
        for name in ways
    ]
    common.show(found, given.out)
    if different:
        sys.exit("the predictions must be the same")


if __name__ == "__main__":
    main()
