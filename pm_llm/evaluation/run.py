"""Scoring a model on tasks: within a run, and for one adapter, also one not made here."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.generate import generate
from pm_llm.evaluation.scorers import score
from pm_llm.models import Base, load_base
from pm_llm.processes import process_state
from pm_llm.progress import bar
from pm_llm.tasks import Task, load_tasks
from pm_llm.tasks.encode import Encoder, longest_answer


def encoder_for(base: Base, task: Task, config: RunConfig) -> Encoder:
    """How the task's rows are rendered for the model, with room for its longest training answer."""
    answer = config.max_new_tokens or longest_answer(base.tokenizer, base.seq2seq, task)
    return Encoder(base.tokenizer, base.seq2seq, config.max_length, answer)


def score_task(model: Any, encoder: Encoder, task: Task, batch_size: int) -> tuple[float, list[dict[str, str]]]:
    """The score on the task's test rows, and each row's prediction beside its reference."""
    with bar(len(task.test), f"evaluate {task.name}", "row") as progress:
        answers = generate(model, encoder, task.test, batch_size, progress.update)
    references = [row.completion for row in task.test]
    rows = [{"task": task.name, "prediction": a, "reference": r} for a, r in zip(answers, references, strict=True)]
    return score(task.scorer, answers, references), rows


def evaluate_adapter(adapter: str | None, config: RunConfig) -> dict[str, float]:
    """Task name -> score of `config.model` with `adapter` (a folder or Hub id; None: the base model alone).

    Raises:
        PmLlmError: If the adapter cannot be loaded onto the model.
    """
    tasks = load_tasks(config)
    base = load_base(config.model, config.dtype)
    model = base.model
    if adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, adapter)
        except (ValueError, OSError, RuntimeError, SafetensorError) as error:
            raise PmLlmError(f"cannot load the adapter {adapter!r}: {str(error).splitlines()[0]}") from error
    model = model.to(process_state().device)
    size = config.evaluation.batch_size
    return {task.name: score_task(model, encoder_for(base, task, config), task, size)[0] for task in tasks}
