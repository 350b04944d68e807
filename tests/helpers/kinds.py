"""Tasks of each kind of rows, made from the embedded ones."""

from __future__ import annotations

from dataclasses import replace

from pm_llm.tasks.base import DEFAULT_SCORER, Example, Task, checked
from pm_llm.tasks.benchmarks.embedded import make_task
from pm_llm.tasks.encoding import Encoder, encoder_for
from tests.conftest import DECODER, tokenizer


def of_kind(kind: str, name: str, train: int = 12, test: int = 2) -> Task:
    """An embedded task's rows as `prompt`, `text` or `preference` rows, or as `turns`: chats of two answers."""
    task = make_task(name, train, test)

    def turned(row: Example) -> Example:
        if kind == "turns":
            turns = ({"role": "user", "content": "hello ?"}, {"role": "assistant", "content": "ask me ."})
            return replace(row, head="", body="", tail="", messages=(*turns, {"role": "user", "content": row.prompt}))
        if kind == "text":
            return Example("", f"{row.prompt} {row.completion} .", kind="text")
        if kind == "preference":
            other = next(label for label in task.labels if label != row.completion)
            return replace(row, rejected=other, kind="preference")
        return row

    rows = {split: [turned(row) for row in getattr(task, split)] for split in ("train", "test")}
    labels = task.labels if kind == "prompt" else ()
    return checked([Task(task.name, **rows, scorer=DEFAULT_SCORER.get(kind, "exact_match"), labels=labels)])[0]


CHATS = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def kind_tasks(kind: str) -> list[Task]:
    """Two small tasks of a kind; `mixed`: raw text, then prompts with answers; `both`: raw text, then pairs."""
    kinds = {"mixed": ("text", "prompt"), "both": ("text", "preference")}.get(kind, (kind, kind))
    return [of_kind(one, name) for one, name in zip(kinds, ("sentiment", "topic"), strict=True)]


def encoder(kind: str, task: Task, max_length: int = 64) -> Encoder:
    """How the embedded LLaMA's tokenizer renders a task's rows of a kind."""
    return encoder_for(tokenizer("llama"), DECODER.of(kind), task, max_length, None)
