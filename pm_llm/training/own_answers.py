"""Kept prompts, answered by the model itself: what scores may be trained on again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import dropwhile, takewhile

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.scorers import scorer_named
from pm_llm.families.base import Row
from pm_llm.session import Session


def own_answers(
    session: Session, seed: int, rows: Sequence[Row], tasks: Sequence[int], at_least: float
) -> list[Row | None]:
    """Encoded rows with answers drawn from the model as it is, in the order of `rows`; None where one scores less.

    Args:
        session: With the model.
        seed: Of the draw.
        rows: Encoded prompts with the right answers.
        tasks: The number of each row's task, from 1.
        at_least: What an answer must score against the right one, from 0 to 100.

    Raises:
        PmLlmError: If a task's scorer gives a row no score of its own.
    """
    found: list[Row | None] = [None] * len(rows)
    for number in sorted(set(tasks)):
        task, places = session.tasks[number - 1], [i for i, one in enumerate(tasks) if one == number]
        encoder, scorer = session.encoders[task.name], scorer_named(task.scorer)
        if not scorer.by_row or scorer.needs_source:
            raise PmLlmError(
                f"replay with answers of its own: scorer {task.scorer} of task {task.name!r} says of no single answer "
                "whether it is right. Use `answers: given`, or another scorer."
            )
        mine = [rows[i] for i in places]
        drawn = encoder.family.draw(session.model, encoder, mine, seed + number, session.config.evaluation)
        for place, right, own in zip(places, mine, drawn, strict=True):
            said, wanted = (encoder.tokenizer.decode(_answer(row), skip_special_tokens=True) for row in (own, right))
            if scorer.best(said.strip(), [wanted.strip()], None)[0] >= at_least:
                found[place] = own
    return found


def _answer(row: Row) -> list[int]:
    """The tokens that answer the row's prompt; of a chat the first turn that is learnt."""
    rest = dropwhile(lambda i: i == -100, row["labels"])
    return list(takewhile(lambda i: i != -100, rest))
