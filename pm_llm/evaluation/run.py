"""Scoring one adapter, also one not made here, on a run configuration's tasks."""

from __future__ import annotations

from peft import PeftModel

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.generate import generate
from pm_llm.evaluation.scorers import score
from pm_llm.models import load_base
from pm_llm.progress import bar
from pm_llm.tasks import load_tasks
from pm_llm.tasks.encode import Encoder, longest_answer


def evaluate_adapter(adapter: str | None, config: RunConfig) -> dict[str, float]:
    """Task name -> score of `config.model` with `adapter` (a folder or Hub id; None: the base model alone)."""
    from pm_llm.processes import process_state

    tasks = load_tasks(config)
    base = load_base(config.model, config.dtype)
    model = base.model
    if adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, adapter)
        except (ValueError, OSError, RuntimeError) as error:
            raise PmLlmError(f"cannot load the adapter {adapter!r}: {str(error).splitlines()[0]}") from error
    model = model.to(process_state().device)
    scores = {}
    for task in tasks:
        answer = config.max_new_tokens or longest_answer(base.tokenizer, base.seq2seq, task)
        encoder = Encoder(base.tokenizer, base.seq2seq, config.max_length, answer)
        with bar(len(task.test), f"evaluate {task.name}", "row") as progress:
            answers = generate(model, encoder, task.test, config.evaluation.batch_size, progress.update)
        scores[task.name] = score(task.scorer, answers, [row.completion for row in task.test])
    return scores
