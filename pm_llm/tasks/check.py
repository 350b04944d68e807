"""`pm-llm tasks check`: what a run would train on, before it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from pm_llm.config import RunConfig
from pm_llm.tasks.base import SPLITS, Example, Task, distinct
from pm_llm.tasks.encoding import Encoder
from pm_llm.tasks.fitting import encoders_for
from pm_llm.tasks.loading import load_tasks, scored

QUANTILES = (0, 50, 90, 99, 100)
SHOWN = 12


def describe_tasks(config: RunConfig) -> str:
    """Sizes, label balance, token lengths, share shortened, shared rows, and three rendered examples a task.

    Raises:
        PmLlmError: With everything that is wrong with the rows, each with file and line.
    """
    stages = load_tasks(config)
    trained, columns = distinct(stages), scored(config, stages)
    encoders, fitting = encoders_for(config, columns.values())
    columns = {name: fitting(task) for name, task in columns.items()}
    # of a probe, what is scored
    tasks = [task if name in trained else replace(task, train=(), validation=()) for name, task in columns.items()]
    parts = ["sequence: " + ", ".join(task.name for task in stages)]
    for task in tasks:
        parts.append(_describe(task, encoders[task.name]))
    return "\n\n".join([*parts, _shared(tasks)])


def _describe(task: Task, encoder: Encoder) -> str:
    name = task.name if task.train else f"{task.name}, never trained"
    lines = [f"{name}: scorer {task.scorer}" + (f", {len(task.labels)} labels" if task.labels else "")]
    for split in SPLITS:
        rows = getattr(task, split)
        if not rows:
            continue
        lines.append(f"  {split}: {len(rows)} rows; answers {_balance(rows)}")
        prompts = [len(encoder.whole_prompt(row)) for row in rows]
        answers = [len(encoder.whole_answer(row)) for row in rows]
        lines.append(f"    prompt tokens {_quantiles(prompts)}, answer tokens {_quantiles(answers)}")
        cut = sum(n > encoder.prompt_budget for n in prompts) / len(rows)
        long = sum(n > encoder.max_new_tokens for n in answers) / len(rows)
        lines.append(
            f"    {cut:.1%} of prompts are shortened to {encoder.prompt_budget} tokens, "
            f"{long:.1%} of answers cut at {encoder.max_new_tokens}"
        )
        if split == "train":
            lines += [f"    and {len(rows)} rows of {neighbour}" for neighbour, rows in task.foreign]
    for number, row in enumerate((task.train or task.test)[:3], start=1):
        prompt = encoder.tokenizer.decode(encoder.prompt(row), skip_special_tokens=False)
        answer = encoder.tokenizer.decode(encoder.answer(row), skip_special_tokens=False)
        lines.append(f"  example {number}:\n" + _indented(f"{prompt}[[{answer}]]"))
    return "\n".join(lines)


def _balance(rows: Sequence[Example]) -> str:
    counts = Counter(row.completion for row in rows)
    if len(counts) > SHOWN:
        return f"{len(counts)} different"
    return ", ".join(f"{label!r} {n / len(rows):.0%}" for label, n in counts.most_common())


def _quantiles(lengths: Sequence[int]) -> str:
    values = np.percentile(lengths, QUANTILES).astype(int)
    return " ".join(
        f"{'min' if q == 0 else 'max' if q == 100 else f'{q}%'} {v}" for q, v in zip(QUANTILES, values, strict=True)
    )


def _indented(text: str) -> str:
    return "\n".join(f"    | {line}" for line in text.split("\n"))


def _shared(tasks: Sequence[Task]) -> str:
    """Prompts (without a benchmark's frame, which names the task) that occur in two splits or tasks, or twice."""
    places: dict[str, set[str]] = {}
    lines = []
    for task in tasks:
        for split in SPLITS:
            rows = [row.body or row.prompt for row in getattr(task, split)]
            if rows:
                places[f"{task.name}/{split}"] = set(rows)
            if len(set(rows)) < len(rows):
                lines.append(f"  {task.name}/{split}: {len(rows) - len(set(rows))} repeated")
    for a, b in combinations(places, 2):
        both = len(places[a] & places[b])
        if both:
            lines.append(f"  {a} and {b}: {both}")
    return "prompts that occur more than once:" + ("\n" + "\n".join(lines) if lines else " none")
