"""Kept prompts, answered by the model itself: what scores may be trained on again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import dropwhile, takewhile

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.scorers import scorer_named
from pm_llm.families.base import Row
from pm_llm.session import Session
from pm_llm.tasks.base import Task


def check_own_answers(config: RunConfig, tasks: Iterable[Task]) -> None:
    """Raise PmLlmError where a run answers kept prompts itself, and a task's scorer does not judge a single answer by
    the one that was given."""
    if not config.parsed_method().says("answers", "own"):
        return
    for task in tasks:
        scorer = scorer_named(task.scorer)
        if not scorer.by_row or scorer.needs_source or task.scorer == "verified":
            raise PmLlmError(
                f"replay with answers of its own: scorer {task.scorer} of task {task.name!r} does not say of a single "
                "answer whether it is as good as the one that was given. Use `answers: given`, or another scorer."
            )


def own_answers(
    session: Session, seed: int, rows: Sequence[Row], tasks: Sequence[int], at_least: float
) -> list[Row | None]:
    """Encoded rows with answers drawn from the model as it is, in the order of `rows`; None where one scores less.

    Rows of what the run began with are no task's here: they stay with the answers that they have.

    Args:
        session: With the model.
        seed: Of the draw.
        rows: Encoded prompts with the right answers.
        tasks: The number of each row's task, as :class:`pm_llm.constraints.base.Context` counts.
        at_least: What an answer must score against the right one, from 0 to 100.
    """
    numbers = [one - session.folds for one in tasks]
    found: list[Row | None] = [row if one < 1 else None for row, one in zip(rows, numbers, strict=True)]
    for number in sorted({one for one in numbers if one > 0}):
        task, places = session.tasks[number - 1], [i for i, one in enumerate(numbers) if one == number]
        encoder, scorer = session.encoders[task.name], scorer_named(task.scorer)
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
