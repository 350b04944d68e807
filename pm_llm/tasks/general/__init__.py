"""The general suite: what a chat model should still be able to do after it was fine-tuned on something else.

Every row is made by the project itself from a seed, so that the suite needs neither data nor network, and an answer
is judged by a program (:mod:`pm_llm.evaluation.verify`), not by a model. A skill is a module with `ROWS`, how many
rows it has, `NEW_TOKENS`, the longest answer, `SCORER`, and `make(rng, number)`, which gives one row.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Sequence

from pm_llm.errors import PmLlmError, unknown_name
from pm_llm.evaluation.plan import GENERAL
from pm_llm.tasks.base import Example, Room, Task

SEED = "general 1"  # another one makes other rows
MAX_LENGTH = 2048  # tokens of prompt and answer
SKILLS = ("instructions", "arithmetic", "json", "tools", "refusals", "facts", "copying", "retrieval", "memory", "text")


def general_tasks(skills: str | Sequence[str]) -> list[Task]:
    """The tasks of some skills, or of `all`, each with test rows alone.

    Raises:
        PmLlmError: If a name is none of a skill.
    """
    if isinstance(skills, str):
        skills = SKILLS if skills == "all" else [skills]
    for name in skills:
        if name not in SKILLS:
            raise unknown_name("skill", str(name), ("all", *SKILLS))
    if len(set(skills)) < len(skills):
        raise PmLlmError(f"general.skills names a skill twice: {', '.join(skills)}. Give each once.")
    return [_task(name) for name in skills]


def _task(name: str) -> Task:
    module = importlib.import_module(f"pm_llm.tasks.general.{'structured' if name == 'json' else name}")
    rng, rows = random.Random(f"{SEED} {name}"), dict[tuple[str, str], Example]()
    while len(rows) < module.ROWS:
        row = module.make(rng, len(rows))
        rows.setdefault((row.body, row.completion), row)
    room = Room(MAX_LENGTH, module.NEW_TOKENS)
    return Task(GENERAL + name, list(rows.values()), list(rows.values()), module.SCORER, room=room)


def asked(*turns: str, checks: Sequence[Sequence[object]] = (), answer: str = "") -> Example:
    """A row of a chat: turns of the user and the model in turn, the last one the user's.

    Args:
        turns: Their texts.
        checks: What the answer must pass, by name and arguments; or
        answer: The answer itself.
    """
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns))
    plain = "\n".join(f"{('Question', 'Answer')[i % 2]}: {text}" for i, text in enumerate(turns)) + "\nAnswer:"
    return Example(plain, answer or json.dumps(list(checks), ensure_ascii=False), messages=messages)
