"""Scoring a model on tasks: within a run, and for one adapter, also one not made here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from unicodedata import normalize

from peft import PeftConfig, PeftModel

from pm_llm.adapters.live import check_fit
from pm_llm.adapters.untrusted import fetched, without_patterns
from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.engine import Engine, check_engine
from pm_llm.evaluation.generate import generate
from pm_llm.evaluation.likelihood import answer_losses, choose_labels
from pm_llm.evaluation.predictions import Predictions
from pm_llm.evaluation.scorers import SCORERS, calls_in
from pm_llm.families.models import load_base
from pm_llm.sections import EvaluationSection
from pm_llm.system.progress import bar
from pm_llm.system.sharing_out import called_through, take_over
from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.encoding import Encoder
from pm_llm.tasks.fitting import encoders_for
from pm_llm.tasks.loading import scored, tasks_or_none

Generate = Callable[..., list[str]]  # as `generate` is called


def answer_task(
    model: Any, encoder: Encoder, task: Task, how: EvaluationSection, generate: Generate = generate
) -> Predictions:
    """The model's predictions on the task's test rows: generated, chosen among the labels, or likelihoods."""
    if task.outside is not None:
        return task.outside.predictions(model, encoder.tokenizer, how)
    sizes = (how.batch_size, how.batch_tokens)
    references: list[list[Any]]
    answers: Sequence[Any]
    with bar(len(task.test), f"evaluate {task.name}", "row") as progress:
        found = encoder.family.predict(model, encoder, task, how, progress.update)
        if found is not None:
            answers, references = found
        elif SCORERS[task.scorer].lower_is_better:  # a perplexity
            answers, tokens = answer_losses(model, encoder, task.test, *sizes, progress.update)
            references = [[n, len(row.completion.encode())] for n, row in zip(tokens, task.test, strict=True)]
        elif how.mode == "labels" and task.labels:
            answers = choose_labels(model, encoder, task.test, task.labels, *sizes, progress.update)
            references = [_references(encoder, row, task.scorer) for row in task.test]
        else:
            answers = generate(model, encoder, task.test, *sizes, progress.update)
            references = [_references(encoder, row, task.scorer) for row in task.test]
    sources = [row.source or row.prompt if SCORERS[task.scorer].needs_source else None for row in task.test]
    keys = [sha256("\0".join([row.prompt, *row.references]).encode()).hexdigest()[:16] for row in task.test]
    asked = [row.prompt for row in task.test], [row.place for row in task.test]
    return Predictions(task.name, task.scorer, answers, references, sources, keys, *asked)


def _references(encoder: Encoder, row: Example, scorer: str = "") -> list[str]:
    """The right answers; and as the model's tokenizer writes them, where it normalises (full-width forms, say)."""
    found = [encoder.reference(row, reference) for reference in row.references]
    if scorer == "tool_call" and row.turn and "tool_calls" in row.turn and not calls_in(found[0]):
        raise PmLlmError(
            f"{row.place}: the model's chat template writes a call as {found[0]!r}, which scorer tool_call cannot "
            "read (it wants JSON objects with name and arguments). Use scorer accuracy."
        )
    for text in list(found):
        ids = encoder.whole_answer(replace(row, completion=text)) if normalize("NFKC", text) != text else []
        if ids and encoder.tokenizer.unk_token_id not in ids:
            found.append(encoder.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return list(dict.fromkeys(found))


def evaluate_adapter(
    adapter: str | None, config: RunConfig, tasks: dict[str, Task] | None = None
) -> list[Predictions]:
    """The predictions of `config.model` with `adapter` (a folder or Hub id; None: the base model alone), by task.

    Args:
        adapter: The adapter.
        config: The model, and how it is scored.
        tasks: By name; by default all that a run of this configuration scores.

    Raises:
        PmLlmError: If the adapter cannot be loaded onto the model.
    """
    take_over()
    tasks = scored(config, tasks_or_none(config)) if tasks is None else tasks
    encoders, fitting = encoders_for(config, tasks.values())
    tasks = {name: fitting(task) for name, task in tasks.items()}
    folder = fetched(adapter) if adapter is not None else None
    if config.evaluation.engine == "openai":
        check_engine(list(tasks.values()), encoders)
        answer = Engine(config.evaluation, config.model, None if folder is None else Path(folder))
        return [answer_task(None, encoders[name], task, config.evaluation, answer) for name, task in tasks.items()]
    base = load_base(config.model, config.dtype, config.load_in_4bit, config.attn_implementation)
    model = base.model
    if folder is not None:
        try:
            config_of = without_patterns(PeftConfig.from_pretrained(folder), Path(folder))
            model = PeftModel.from_pretrained(model, folder, config=config_of)
            called_through(model)
            found = model.load_adapter(folder, "default")  # again, as it says what did not fit
            # prompts and shared vectors have places of their own, which PEFT fills, or raises
            missing = [key for key in found.missing_keys if "prompt_encoder" not in key and "vector_bank" not in key]
            check_fit(missing, [key for key in found.unexpected_keys if key != "prompt_embeddings"])
        except Exception as error:  # whatever PEFT makes of an adapter that does not fit
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
            raise PmLlmError(f"cannot load the adapter {adapter!r}: {reason}") from error
    return [answer_task(model, encoders[name], task, config.evaluation) for name, task in tasks.items()]
