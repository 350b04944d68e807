"""`pm-llm tasks check`: what a run would train on, before it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, islice

import numpy as np

from pm_llm.config import RunConfig
from pm_llm.families.preference import worse_of
from pm_llm.tasks.base import SPLITS, Example, Task, distinct
from pm_llm.tasks.encoding import Encoder
from pm_llm.tasks.fitting import encoders_for
from pm_llm.tasks.loading import load_tasks, scored

QUANTILES = (0, 50, 90, 99, 100)
SHOWN = 12
MANY = 100_000  # rows of which answers are counted


def describe_tasks(config: RunConfig) -> str:
    """Sizes, label balance, turns, token lengths, share shortened, tokens that carry loss, shared rows, and three
    rendered examples a task, in which what is learnt stands in [[ ]].

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
    kind = {"prompt": "", "text": "raw text, ", "preference": "preference pairs, "}[task.kind]
    lines = [f"{name}: {kind}scorer {task.scorer}" + (f", {len(task.labels)} labels" if task.labels else "")]
    for split in SPLITS:
        rows = getattr(task, split)
        if not rows:
            continue
        lines += _TOLD[task.kind](split, rows, encoder)
        if split == "train":
            lines.append(f"    {_loss(rows, encoder)}")
            lines += [f"    and {len(rows)} rows of {neighbour}" for neighbour, rows in task.foreign]
    for number, row in enumerate((task.train or task.test)[:3], start=1):
        lines.append(f"  example {number}:\n" + _indented(_rendered(row, encoder)))
    return "\n".join(lines)


def _prompts(split: str, rows: Sequence[Example], encoder: Encoder) -> list[str]:
    prompts = [len(encoder.whole_prompt(row)) for row in rows]
    answers = [len(encoder.whole_answer(row)) for row in rows]
    cut = sum(n > encoder.prompt_budget for n in prompts) / len(rows)
    long = sum(n > encoder.max_new_tokens for n in answers) / len(rows)
    return [
        f"  {split}: {len(rows)} rows; answers {_balance(rows)}",
        *_turns(rows),
        f"    prompt tokens {_quantiles(prompts)}, answer tokens {_quantiles(answers)}",
        f"    {cut:.1%} of prompts are shortened to {encoder.prompt_budget} tokens, "
        f"{long:.1%} of answers cut at {encoder.max_new_tokens}",
    ]


def _turns(rows: Sequence[Example]) -> list[str]:
    """Of chats: their turns, with the answer, and how many have tools, and calls."""
    turns = [len(row.messages) + 1 for row in rows if row.messages is not None]
    if not turns:
        return []
    tools = sum(bool(row.tools) for row in rows)
    calls = sum(any("tool_calls" in turn for turn in (*(row.messages or ()), row.turn or {})) for row in rows)
    return [f"    chats of turns {_quantiles(turns)}; {tools} with tools, {calls} with tool calls"]


def _texts(split: str, rows: Sequence[Example], encoder: Encoder) -> list[str]:
    lengths = [encoder.family.carries(encoder, row)[1] for row in rows]
    size = sum(len(row.completion.encode()) for row in rows)
    return [
        f"  {split}: {len(rows)} documents, {sum(lengths):,} tokens, {size:,} bytes",
        f"    tokens of a document {_quantiles(lengths)}; "
        f"{sum(n > encoder.max_length for n in lengths) / len(rows):.1%} are cut into pieces of {encoder.max_length}",
    ]


def _pairs(split: str, rows: Sequence[Example], encoder: Encoder) -> list[str]:
    better, worse = ([len(encoder.whole_answer(row)) for row in some] for some in (rows, [worse_of(r) for r in rows]))
    prompts = [len(encoder.whole_prompt(row)) for row in rows]
    return [
        f"  {split}: {len(rows)} pairs",
        *_turns(rows),
        f"    prompt tokens {_quantiles(prompts)}, chosen {_quantiles(better)}, rejected {_quantiles(worse)}",
        f"    {sum(n > encoder.prompt_budget for n in prompts) / len(rows):.1%} of prompts are shortened to "
        f"{encoder.prompt_budget} tokens, the longer answer is the chosen one in "
        f"{sum(a > b for a, b in zip(better, worse, strict=True)) / len(rows):.1%}",
    ]


_TOLD = {"prompt": _prompts, "text": _texts, "preference": _pairs}


def _loss(rows: Sequence[Example], encoder: Encoder) -> str:
    """How many tokens carry loss."""
    carry = whole = 0
    for row in rows:
        learnt, of = encoder.family.carries(encoder, row)
        carry, whole = carry + learnt, whole + of
    return f"{carry:,} of {whole:,} tokens carry loss ({carry / whole:.1%})"


def _rendered(row: Example, encoder: Encoder) -> str:
    """A row as it is trained; what is learnt stands in [[ ]]."""
    decode = encoder.tokenizer.decode
    parts = encoder.family.parts(encoder, row)
    texts = [(decode(ids, skip_special_tokens=False), learnt) for ids, learnt in parts]
    return "".join(f"[[{text}]]" if learnt else text for text, learnt in texts)


def _balance(rows: Sequence[Example]) -> str:
    counts = Counter(row.completion for row in islice(rows, MANY))
    if len(counts) > SHOWN:
        return f"{len(counts)} different" + (f" among the first {MANY:,}" if len(rows) > MANY else "")
    return ", ".join(f"{label!r} {n / min(len(rows), MANY):.0%}" for label, n in counts.most_common())


def _quantiles(lengths: Sequence[int]) -> str:
    values = np.percentile(lengths, QUANTILES).astype(int)
    return " ".join(
        f"{'min' if q == 0 else 'max' if q == 100 else f'{q}%'} {v}" for q, v in zip(QUANTILES, values, strict=True)
    )


def _indented(text: str) -> str:
    return "\n".join(f"    | {line}" for line in text.split("\n"))


def _shared(tasks: Sequence[Task]) -> str:
    """Prompts (without a benchmark's frame, which names the task) that occur in two splits or tasks, or twice."""
    places: dict[str, set[int]] = {}
    lines = []
    for task in tasks:
        for split in SPLITS:
            rows = getattr(task, split)
            found = {hash(row.body or row.prompt or row.completion) for row in rows}
            if rows:
                places[f"{task.name}/{split}"] = found
            if len(found) < len(rows):
                lines.append(f"  {task.name}/{split}: {len(rows) - len(found)} repeated")
    for a, b in combinations(places, 2):
        both = len(places[a] & places[b])
        if both:
            lines.append(f"  {a} and {b}: {both}")
    return "prompts that occur more than once:" + ("\n" + "\n".join(lines) if lines else " none")
