"""Pairs of a better and a worse answer on decoders, trained by DPO (Rafailov et al., arXiv 2305.18290).

The reference is the model before the task: the log-likelihoods that it gives both answers are measured once, before
the first step, so that no second model is kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import BatchEncoding

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.batches import in_batches, pack
from pm_llm.evaluation.generate import evaluating
from pm_llm.families.base import Batch, Row
from pm_llm.families.decoder import Decoder
from pm_llm.families.rows import with_columns
from pm_llm.sections import EvaluationSection
from pm_llm.system.processes import process_state

if TYPE_CHECKING:
    from pm_llm.tasks.base import Example, Task
    from pm_llm.tasks.encoding import Encoder

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's names


class Preference(Decoder):
    """A row is a prompt and two answers to it, of which the first is the better one.

    Args:
        beta: How strongly the reference holds: the loss of a pair is `-log sigmoid(beta (m - m_reference))`, m the
            log-likelihood of the better answer minus that of the worse one.
    """

    kind = "preference"
    refused = frozenset(
        {
            *("loss_type", "loss_weights", "ld_alpha", "use_weighting", "f_divergence_type", "label_smoothing"),
            *("f_alpha_divergence_coef", "sync_ref_model", "precompute_ref_log_probs", "precompute_ref_batch_size"),
            "beta",
        }
    )

    def __init__(self, beta: float = 0.1) -> None:
        self.beta = beta

    # ---- rows ----
    def answer_length(self, encoder: Encoder, rows: Iterable[Example], most: int | None) -> int:
        return super().answer_length(encoder, (one for row in rows for one in (row, worse_of(row))), most)

    def features(self, encoder: Encoder, examples: Sequence[Example]) -> list[Row]:
        return [
            {
                "prompt_ids": encoder.prompt(row),
                "chosen_ids": encoder.answer(row),
                "rejected_ids": encoder.answer(worse_of(row)),
            }
            for row in examples
        ]

    def parts(self, encoder: Encoder, example: Example) -> list[tuple[list[int], bool]]:
        (row,) = self.features(encoder, [example])
        return [(row["prompt_ids"], False), (row["chosen_ids"], True), ([], False), (row["rejected_ids"], True)]

    def carries(self, encoder: Encoder, example: Example) -> tuple[int, int]:
        """The prompt stands before each of the answers."""
        carry, whole = super().carries(encoder, example)
        return carry, 2 * whole - carry

    def length(self, row: Row) -> int:
        return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    def referenced(
        self, model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int, collate: Any = None
    ) -> Sequence[Row]:
        """The rows with what the model, as it is, gives both answers."""
        found = self.likelihoods(model, tokenizer, rows, batch_size, collate=collate)
        return with_columns(rows, {key: [pair[i] for pair in found] for i, key in enumerate(REFERENCE)})

    def draw(self, model: Any, encoder: Encoder, rows: Sequence[Row], seed: int, how: EvaluationSection) -> list[Row]:
        """The same pairs; which answer is the better one is drawn with the model's own chances, `sigmoid(beta (m -
        m_reference))`."""
        pairs, rng = self.likelihoods(model, encoder.tokenizer, rows, how.batch_size), random.Random(seed)
        found = []
        for row, (better, worse) in zip(rows, pairs, strict=True):
            margin = better - worse - (row[REFERENCE[0]] - row[REFERENCE[1]])
            chance = float(torch.sigmoid(torch.tensor(self.beta * margin)))
            other = _OTHER if rng.random() >= chance else {}
            found.append({other.get(key, key): x for key, x in row.items()})
        return found

    # ---- training ----
    def collator(self, tokenizer: Any, model: Any) -> Any:
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        return counting(DataCollatorForPreference(tokenizer.pad_token_id))

    def trainer_class(self) -> Any:
        from pm_llm.training.trainers import ContinualDPOTrainer

        return ContinualDPOTrainer

    def arguments_class(self) -> Any:
        from trl import DPOConfig

        return DPOConfig

    def arguments(self) -> dict[str, Any]:
        return {"max_length": None, "beta": self.beta, "precompute_ref_log_probs": True}

    # ---- the loss ----
    def loss(self, model: Any, batch: Batch) -> Tensor:
        if not bool(batch["completion_mask"].any(dim=1).all()):
            raise PmLlmError("a pair has an answer without a token, so it has no Fisher. Check its answers.")
        return self.each(model, batch).sum()

    def each(self, model: Any, batch: Batch) -> Tensor:
        better, worse = self.log_likelihoods(model, batch).chunk(2)
        margin = better - worse - (batch[REFERENCE[0]] - batch[REFERENCE[1]])
        return -logsigmoid(self.beta * margin)

    def examples(self, x: Tensor) -> Tensor:
        """Both answers are one example's tokens."""
        return torch.cat(x.chunk(2), dim=1)

    def log_likelihoods(self, model: Any, batch: Batch) -> Tensor:
        """Of all better answers, then of all worse ones, shape (2 pairs,), in nats."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        return -super().each(model, inputs)

    def likelihoods(
        self,
        model: Any,
        tokenizer: Any,
        rows: Sequence[Row],
        batch_size: int,
        progress: Callable[[int], Any] | None = None,
        collate: Any = None,
    ) -> list[tuple[float, float]]:
        """Of each row's better and worse answer, in nats; every process gets all."""
        collate = self.collator(tokenizer, model) if collate is None else collate

        def pairs(batch: Sequence[int]) -> list[tuple[float, float]]:
            inputs = collate([rows[i] for i in batch]).to(process_state().device)
            better, worse = (half.tolist() for half in self.log_likelihoods(model, inputs).chunk(2))
            return list(zip(better, worse, strict=True))

        lengths = [2 * self.length(row) for row in rows]
        with torch.no_grad(), evaluating(model):
            return in_batches(pack(lengths, 0, batch_size, 8192), pairs, progress, model)

    # ---- scoring ----
    def predict(
        self,
        model: Any,
        encoder: Encoder,
        task: Task,
        how: EvaluationSection,
        progress: Callable[[int], Any] | None = None,
    ) -> tuple[list[Any], list[list[Any]]]:
        """By how much the model prefers the better answer more than the base model does, in nats; and 0."""
        rows = self.features(encoder, task.test)
        ours = self.likelihoods(model, encoder.tokenizer, rows, how.batch_size, progress)
        base = ours
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                base = self.likelihoods(model, encoder.tokenizer, rows, how.batch_size)
        margins = [a[0] - a[1] - (b[0] - b[1]) for a, b in zip(ours, base, strict=True)]
        return margins, [[0.0] for _ in rows]


_PAIRS = (("chosen_ids", "rejected_ids"), REFERENCE)
_OTHER = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}


def counting(plain: Any) -> Any:
    """A collator of pairs whose batches have a label a pair: by these the Trainer, which does not
    count a row's first, counts what a loss is the mean of."""

    def collate(rows: Sequence[Row]) -> BatchEncoding:
        return BatchEncoding({**plain(list(rows)), "labels": torch.tensor([[-100, 1]] * len(rows))})

    return collate


def worse_of(row: Example) -> Example:
    """A pair's prompt with the worse answer."""
    assert row.rejected is not None
    return replace(row, completion=row.rejected, turn=None)
