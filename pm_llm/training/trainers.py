"""Two Trainers with a `constraint=`: one for decoders on TRL's SFTTrainer, one for T5-like models on Seq2SeqTrainer.

Both take an ordinary PeftModel with exactly one trainable LoRA adapter; other adapters may be active and frozen.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Seq2SeqTrainer
from trl import SFTTrainer

from pm_llm.errors import PmLlmError
from pm_llm.training.constrained import ConstraintMixin
from pm_llm.training.patches import answers_only


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
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
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
        loss = outputs.loss if tokens else outputs.logits.sum() * 0  # the mean over no tokens is NaN
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
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise PmLlmError(f"{type(model).__name__} is no encoder-decoder. Use ContinualSFTTrainer.")
        super().__init__(model, *args, **kwargs)
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise PmLlmError(
                "ContinualSeq2SeqTrainer supports neither label_smoothing_factor nor compute_loss_func. Unset them."
            )
        self.model_accepts_loss_kwargs = True  # the Trainer counts the step's tokens and leaves scaling to the loss
