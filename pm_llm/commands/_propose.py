"""Settings for rows and a model that were looked at, with the reason for each, as a commented configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from pm_llm.commands._examine import bfloat16_works, memory
from pm_llm.config import RunConfig
from pm_llm.families.models import context_of, empty_base, load_tokenizer
from pm_llm.tasks.base import Task
from pm_llm.tasks.encoding import Encoder, encoder_for
from pm_llm.tasks.loading import load_tasks

LOOKED_AT = 2000  # training rows of a task whose lengths are counted
STEPS, ROWS, LONGEST = 200, 8, 4096  # wanted: steps a task, rows a step; tokens of a row at most
RATES = ((5e8, 1.0e-3), (2e9, 5.0e-4), (math.inf, 2.0e-4))  # up to so many parameters, a usual rate for LoRA
WORDS = 6  # answers of more words than this are not compared as a whole


@dataclass(frozen=True)
class Seen:
    """What was found out: of the model its parameters and context, of each task its rows and lengths in tokens."""

    parameters: int
    context: int | None
    decoder: bool
    tasks: Sequence[Task]
    prompts: Sequence[int]  # the 99th percentile of each task's prompts
    answers: Sequence[int]  # each task's longest answer


def look(model: str, data: Sequence[Any]) -> Seen:
    """Read the rows and the model's configuration; its weights are not needed.

    Raises:
        PmLlmError: If there is no such model, or with everything that is wrong with the rows.
    """
    tokenizer, family = load_tokenizer(model)
    tasks = load_tasks(RunConfig(model=model, tasks=list(data)).check())
    prompts, answers = [], []
    for task in tasks:
        encoder = encoder_for(tokenizer, family.of(task.kind, 0.1), task, 2 * 10**9, 10**9)
        lengths = _lengths(encoder, task)
        prompts.append(int(np.quantile([prompt for prompt, _ in lengths], 0.99)))
        answers.append(max(answer for _, answer in lengths))
    empty, _ = empty_base(model)
    size = sum(weight.numel() for weight in empty.parameters())
    return Seen(size, context_of(model), family.task_type == "CAUSAL_LM", tasks, prompts, answers)


def _lengths(encoder: Encoder, task: Task) -> list[tuple[int, int]]:
    rows = task.train[:LOOKED_AT]
    if task.kind == "text":
        return [(0, encoder.family.carries(encoder, row)[1]) for row in rows]
    return [(len(encoder.whole_prompt(row)), len(encoder.whole_answer(row))) for row in rows]


@dataclass(frozen=True)
class Choice:
    """A key's value and why."""

    key: str
    value: Any
    why: str


def choose(seen: Seen) -> list[Choice]:
    """Values for the keys that depend on model, rows and machine; the others keep their defaults."""
    longest = max(seen.prompts)  # T5: max_length is of the prompt alone
    if seen.decoder:
        longest = max(p + a for p, a in zip(seen.prompts, seen.answers, strict=True))
    length = min(64 * math.ceil(longest / 64), seen.context or LONGEST, LONGEST)
    each = max(1, min(ROWS, 2 ** int(math.log2(max(1, LONGEST // length)))))
    rows = int(median(len(task.train) for task in seen.tasks))
    epochs = max(1, min(5, round(STEPS * ROWS / rows)))
    rate = next(rate for most, rate in RATES if seen.parameters < most)
    brain = _device_bytes()
    halves = bfloat16_works()
    weights = seen.parameters * (2 if halves else 4)
    found = [
        Choice(
            "dtype",
            "bfloat16" if halves else "float32",
            f"weights of {weights / 2**30:.1f} GiB; this machine has "
            f"{brain / 2**30:.0f} GiB of memory" + ("" if halves else ", and no instructions for bfloat16"),
        ),
        Choice(
            "max_length",
            length,
            f"99 % of prompts with the longest answer have at most {longest} tokens"
            + (f"; the model takes {seen.context}" if seen.context else ""),
        ),
        Choice(
            "train.learning_rate",
            rate,
            f"usual for LoRA on {_count(seen.parameters)} parameters; half and twice it are worth a try",
        ),
        Choice("train.num_train_epochs", epochs, f"{epochs * math.ceil(rows / ROWS)} steps for a task of {rows} rows"),
        Choice("train.per_device_train_batch_size", each, f"rows of up to {length} tokens in one pass"),
        Choice("train.gradient_accumulation_steps", math.ceil(ROWS / each), f"{ROWS} rows a step"),
    ]
    if seen.decoder and weights > 0.6 * brain:
        found.insert(1, Choice("load_in_4bit", True, "the weights would fill the device"))
    if seen.parameters > 1e9:
        found.append(Choice("train.gradient_checkpointing", True, "less memory for some more time"))
    return found


def entry(given: str | dict[str, Any], task: Task) -> tuple[Any, str]:
    """A task's entry in the configuration, and what there is to say of it."""
    whole = {"data": given} if isinstance(given, str) else given
    words = [len(row.completion.split()) for row in task.train[:LOOKED_AT]]
    kinds = len({row.completion for row in task.train[:LOOKED_AT]})
    told = f"{len(task.train)} rows to train on, {len(task.test)} to test on"
    if task.kind != "prompt":
        return given, f"{told}; {'raw text' if task.kind == 'text' else 'pairs'}"
    if any("tool_calls" in (row.turn or {}) for row in task.train[:LOOKED_AT]):
        return whole | {"scorer": whole.get("scorer", "tool_call")}, f"{told}; answers that call tools"
    if median(words) > WORDS:
        return whole | {"scorer": whole.get("scorer", "rougeL")}, f"{told}; answers of {median(words):.0f} words"
    return given, f"{told}; {kinds} different answers"


def _device_bytes() -> int:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else memory()


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
