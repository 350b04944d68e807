"""Encoder-decoders (T5 and its like): the encoder reads the prompt, the decoder says the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from pm_llm.evaluation.generate import Prompts
from pm_llm.evaluation.likelihood import Ids, Reader, summed
from pm_llm.families.base import Batch, Family, Row

if TYPE_CHECKING:
    from pm_llm.tasks.base import Example
    from pm_llm.tasks.encoding import Encoder


class EncoderDecoder(Family):
    """A row is the prompt's tokens, with the answer's as labels."""

    task_type = "SEQ_2_SEQ_LM"
    padding_side = "right"

    def takes(self, config: Any) -> bool:
        return config.is_encoder_decoder and config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    def auto_class(self) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def targets(self, model: Any) -> list[str]:
        t5 = any(name.rpartition(".")[2] == "q" for name, _ in model.named_modules())
        return ["q", "v"] if t5 else super().targets(model)

    def prompt_reader(self, model: Any) -> Any:
        return model.get_encoder()

    def prompt_budget(self, max_length: int, max_new_tokens: int) -> int:
        return max_length

    def row(self, prompt: list[int], answer: list[int], labels: list[int] | None = None) -> Row:
        return {"input_ids": prompt, "labels": answer}

    def prompt_of(self, row: Row) -> list[int]:
        found: list[int] = row["input_ids"]
        return found

    def parts(self, encoder: Encoder, example: Example) -> list[tuple[list[int], bool]]:
        return [(encoder.prompt(example), False), (encoder.answer(example), True)]

    def trainer_class(self) -> Any:
        from pm_llm.training.trainers import ContinualSeq2SeqTrainer

        return ContinualSeq2SeqTrainer

    def arguments_class(self) -> Any:
        from transformers import Seq2SeqTrainingArguments

        return Seq2SeqTrainingArguments

    def tokens(self, module: str, batch: Batch) -> Tensor | None:
        """The decoder's are those of the labels, but for cross-attention's keys and values, which are made from the
        encoder's output."""
        parts = module.split(".")
        crossing = any("EncDec" in part or "encoder_attn" in part for part in parts)
        of_encoder = "encoder" in parts or (crossing and parts[-1] in ("k", "v", "k_proj", "v_proj"))
        return super().tokens(module, batch) if of_encoder else batch["labels"] != -100  # the head's, too

    def labels(self, batch: Batch) -> Tensor:
        return batch["labels"]

    def answers(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        return model(**inputs, use_cache=False).logits, batch["labels"]

    @contextmanager
    def listening(self, model: Any) -> Iterator[list[Any]]:
        heard: list[Any] = []
        handle = model.get_base_model().register_forward_hook(lambda module, given, output: heard.append(output))
        try:
            yield heard
        finally:
            handle.remove()

    def said(self, model: Any, heard: list[Any], batch: Batch) -> Tensor:
        found: Tensor = heard[0].logits[batch["labels"] != -100]
        return found

    def reader(self, prompts: Prompts, rows: Sequence[int]) -> Reader:
        return EncoderDecoderReader(prompts, rows)


class EncoderDecoderReader(Reader):
    """Prompts as an encoder's states."""

    def __init__(self, prompts: Prompts, rows: Sequence[int]) -> None:
        self.model = prompts.model
        inputs, _ = prompts.batch(rows)
        self.mask = inputs["attention_mask"]
        self.states = self.model.get_encoder()(**inputs)
        self.begin = torch.full_like(self.mask[:, :1], self.model.config.decoder_start_token_id)
        self.first = self._decode(self.begin)[:, 0].float().log_softmax(-1)

    def score(self, answers: Sequence[Ids]) -> Tensor:
        ids, kept = self._right_padded(answers)
        return summed(self._decode(torch.cat([self.begin, ids[:, :-1]], dim=1)), ids, kept)

    def _decode(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(encoder_outputs=self.states, attention_mask=self.mask, decoder_input_ids=ids).logits
        return found
