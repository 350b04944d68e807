"""Trainers with a `constraint=`: for decoders on TRL's SFTTrainer, for preference pairs on its DPOTrainer, for T5-like
models on Seq2SeqTrainer.

All take an ordinary PeftModel with exactly one trainable LoRA adapter; other adapters may be active and frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import log
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Seq2SeqTrainer
from trl import DPOTrainer, SFTTrainer

from pm_llm.adapters.live import trainable_adapter
from pm_llm.constraints.base import Constraint
from pm_llm.errors import PmLlmError
from pm_llm.families.preference import REFERENCE, Preference, counting
from pm_llm.methods import name_of_choice
from pm_llm.training.constrained import ConstraintMixin
from pm_llm.training.patches import answers_only


def _is_encoder_decoder(model: Any) -> bool:
    """Also of what is no model at all."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


class _AnswersOnlyTrainer(SFTTrainer):
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with answers_only():
            compute: Any = super().compute_loss  # which has no types
            return compute(model, inputs, return_outputs, num_items_in_batch)


class ContinualSFTTrainer(ConstraintMixin, _AnswersOnlyTrainer):
    """TRL's SFTTrainer with constraints, for LLaMA and any other decoder.

    Args:
        constraint: A constraint or several, e.g. `Perturb(epsilon=0.5)`, those that depend on the task prepared for
            it; the rest is SFTTrainer's own.

    Raises:
        PmLlmError: If the model is an encoder-decoder, no PeftModel, or has not exactly one trainable adapter; from
            `train`, if a constraint that depends on the task was not prepared for it.
        NonFiniteLossError: While training, at the next log line after the loss became NaN or infinite.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if _is_encoder_decoder(model):
            raise PmLlmError(
                f"{type(model).__name__} is an encoder-decoder and SFTTrainer is causal only. "
                "Use ContinualSeq2SeqTrainer."
            )
        super().__init__(model, *args, **kwargs)


class _TokenMeanTrainer(Seq2SeqTrainer):
    """The loss of an encoder-decoder as the mean over all answer tokens of the optimizer step."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        tokens = inputs["labels"].ne(-100).sum()
        loss = torch.where(tokens > 0, outputs.loss, 0.0)  # the mean over no tokens is NaN
        if num_items_in_batch is not None:
            loss = loss * (tokens / num_items_in_batch)
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class ContinualSeq2SeqTrainer(ConstraintMixin, _TokenMeanTrainer):
    """Seq2SeqTrainer with constraints, for T5 and other encoder-decoders, with the loss scaled as for decoders.

    T5's forward swallows `num_items_in_batch`, so the plain Trainer neither divides by the accumulation steps nor
    accounts for the other processes. Here the loss is the mean over all answer tokens of the optimizer step.

    Args:
        constraint: A constraint or several, e.g. `Perturb(epsilon=0.5)`, those that depend on the task prepared for
            it; the rest is Seq2SeqTrainer's own.

    Raises:
        PmLlmError: If the model is no encoder-decoder, no PeftModel, has not exactly one trainable adapter, or label
            smoothing is asked for; from `train`, if a constraint that depends on the task was not prepared for it.
        NonFiniteLossError: While training, at the next log line after the loss became NaN or infinite.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if not _is_encoder_decoder(model):
            raise PmLlmError(f"{type(model).__name__} is no encoder-decoder. Use ContinualSFTTrainer.")
        super().__init__(model, *args, **kwargs)
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise PmLlmError(
                "ContinualSeq2SeqTrainer supports neither label_smoothing_factor nor compute_loss_func. Unset them."
            )
        self.model_accepts_loss_kwargs = True  # the Trainer counts the step's tokens and leaves scaling to the loss


class _PairTrainer(DPOTrainer):
    """DPO whose reference is the model as it is given, measured before the first step, and whose loss is the mean over
    all pairs of an optimizer step."""

    loss_is_scaled_for_ga = True  # TRL's word to the Trainer, which would divide by the accumulation steps else

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        with _as_default(model):
            super().__init__(model, *args, **kwargs)
        if self.loss_types != ["sigmoid"]:
            raise PmLlmError(f"loss_type is {', '.join(self.loss_types)}; ContinualDPOTrainer has sigmoid alone.")
        self.model_accepts_loss_kwargs = True  # the Trainer counts the step's pairs and leaves scaling to the loss
        self.data_collator = counting(self.data_collator)
        self.precompute_ref_logps = True
        self.train_dataset = self._precompute_ref_logps(self.train_dataset, "train", self.args.train_batch_size)
        if isinstance(self.eval_dataset, Dataset):
            self.eval_dataset = self._precompute_ref_logps(self.eval_dataset, "eval", self.args.eval_batch_size)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if "prompt_ids" in (dataset.column_names or ()):  # rows are tokens already
            return dataset
        prepare: Any = super()._prepare_dataset
        return prepare(dataset, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if set(REFERENCE) <= set(dataset.column_names):
            return dataset
        family, rows = Preference(self.beta), dataset.to_list()
        return Dataset.from_list(family.referenced(self.model, None, rows, batch_size, collate=self.data_collator))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = dict(inputs)
        out = batch.pop("labels")[:, 1] == -100  # what accelerate has filled up an epoch's last batch with
        # their two answers have no tokens then: a loss of log 2, and no gradient
        batch["completion_mask"] = batch["completion_mask"] * ~torch.cat([out, out])[:, None]
        batch |= {key: batch[key] * ~out for key in REFERENCE}
        with answers_only():
            compute: Any = super().compute_loss
            found = compute(model, batch, return_outputs, None)
        loss, *more = found if return_outputs else (found,)
        if num_items_in_batch is not None:
            loss = (loss * len(out) - out.sum() * log(2)) / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, *more) if return_outputs else loss


@contextmanager
def _as_default(model: Any) -> Iterator[None]:
    """TRL takes a PeftModel's adapter to be called `default`, and copies it for a reference, which is not needed."""
    names = set(getattr(model, "peft_config", {}))
    if names and "default" not in names:
        model.peft_config["default"] = model.peft_config[trainable_adapter(model)]
    try:
        yield
    finally:
        if names and "default" not in names:
            del model.peft_config["default"]
        if names and "ref" not in names and "ref" in model.peft_config:
            model.delete_adapter("ref")


class ContinualDPOTrainer(ConstraintMixin, _PairTrainer):
    """TRL's DPOTrainer with constraints, for preference pairs on decoders.

    The reference is the model as it is given to the Trainer: the log-likelihoods it gives both answers of each pair
    are measured before the first step (or are there, as `ref_chosen_logps` and `ref_rejected_logps`). So the model
    before a task costs no memory, whichever adapters make it up.

    Args:
        constraint: A constraint or several, e.g. `Perturb(epsilon=0.5)`, those that depend on the task prepared for
            it; those that look at each answer token (`anchor`) are refused. The rest is DPOTrainer's own.

    Raises:
        PmLlmError: If the model is an encoder-decoder, no PeftModel, or has not exactly one trainable adapter; from
            `train`, if a constraint that depends on the task was not prepared for it.
        NonFiniteLossError: While training, at the next log line after the loss became NaN or infinite.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if _is_encoder_decoder(model):
            raise PmLlmError(f"{type(model).__name__} is an encoder-decoder; preference pairs are for decoders.")
        given = kwargs.get("constraint", ())
        spoken = [c for c in ([given] if isinstance(given, Constraint) else given) if c.fills("loss")]
        if spoken:
            raise PmLlmError(
                f"{name_of_choice(spoken[0])} adds to the loss of answer tokens, which preference pairs do not have. "
                "Leave it out, or train such pairs in a run of their own."
            )
        super().__init__(model, *args, **kwargs)
        self.live = replace(self.live, family=Preference(self.beta))
