"""What comes after training, on a row each before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from pm_llm.constraints.base import Constraint
from pm_llm.errors import PmLlmError, first_line
from pm_llm.evaluation.answering import answer_task
from pm_llm.evaluation.scorers import SCORERS
from pm_llm.families.base import Family, Row
from pm_llm.families.packing import check_packing
from pm_llm.families.rows import longest
from pm_llm.fisher.rows import ChosenRows
from pm_llm.sections import FisherSection
from pm_llm.system.processes import process_state
from pm_llm.tasks.base import Task
from pm_llm.tasks.encoding import Encoder

if TYPE_CHECKING:
    from pm_llm.session import Session


MOST = 1000  # test rows among which the longest is looked for


def rehearse(session: Session, rows: Sequence[Row], family: Family, constraints: Sequence[Constraint]) -> None:
    """What comes after training, on a row each before it: models that cannot be measured or scored are known then.

    Raises:
        PmLlmError: If something fails.
    """
    for encoder in (session.encoders[task.name] for task in session.tasks):
        if session.config.train.packing and not encoder.family.packs:
            check_packing(session.model, encoder.family)
        if session.config.train.train_sampling_strategy != "random" and encoder.family.kind == "preference":
            raise PmLlmError("train.train_sampling_strategy: preference pairs cannot be grouped. Leave it out.")
    one_row = longest(rows, family.length)
    fishers = FisherSection(samples=1, batch_size=1)
    what = "trained on its longest row"
    try:
        with torch.random.fork_rng(devices=[]):
            one = ChosenRows(
                "rehearsal", [one_row] * process_state().num_processes, fishers, 0, session.base.tokenizer, family
            )
            one.loss(session.model)
            if session.merger.rule.needs.fisher or any(c.needs.fisher for c in constraints):
                what = "measured (its Fisher)"
                one.fisher(session.model, "factored")
            what = "scored"
            for task, encoder in _one_of_each_kind(session):
                row = max(islice(task.test, MOST), key=lambda row: len(encoder.prompt(row)))
                # one token is answered after the whole prompt
                length = max(encoder.max_length - encoder.max_new_tokens + 1, encoder.prompt_budget)
                short, alone = replace(encoder, max_length=length, max_new_tokens=1), replace(task, test=[row])
                answer_task(session.model, short, alone, session.config.evaluation)
    except PmLlmError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise PmLlmError(
            f"{session.config.model!r} cannot be {what}: {type(error).__name__}: {first_line(error)}. Nothing was "
            "trained. Is max_length beyond what the model takes, or target_modules more than its linear layers "
            "with (batch, tokens, width) inputs?"
        ) from error


def _one_of_each_kind(session: Session) -> list[tuple[Task, Encoder]]:
    """Tasks that are scored in unlike ways, one of each."""
    found: dict[tuple[Any, ...], str] = {}
    for name, task in session.columns.items():
        labels = bool(task.labels) and session.config.evaluation.mode == "labels"
        found.setdefault((task.kind, SCORERS[task.scorer].lower_is_better, labels, bool(task.test[0].messages)), name)
    return [(session.columns[name], session.encoders[name]) for name in found.values()]
