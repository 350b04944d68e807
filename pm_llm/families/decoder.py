"""Decoders (LLaMA and its like): prompt and answer are one text, trained by TRL's SFTTrainer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.generate import Prompts, is_plain
from pm_llm.evaluation.likelihood import Ids, Reader, summed
from pm_llm.families.base import Batch, Family, Row

if TYPE_CHECKING:
    from pm_llm.tasks.base import Example
    from pm_llm.tasks.encoding import Encoder


class Decoder(Family):
    """A row is the prompt's tokens and the answer's, with labels on the answer's only."""

    task_type = "CAUSAL_LM"
    padding_side = "left"
    shares_prompts = True
    learns_turns = True

    def takes(self, config: Any) -> bool:
        """BERT-like encoders are in transformers' causal list too (as decoders, after a change of configuration); they
        are none here, and neither is a model without key-value cache, which scoring goes on from."""
        kind = config.model_type
        encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
        if config.is_encoder_decoder or encoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return False
        found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
        model = getattr(transformers, found if isinstance(found, str) else found[0])
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise PmLlmError(
                f"a {kind!r} model keeps no key-value cache, which scoring goes on from. "
                "Use a LLaMA-like or a T5-like model."
            )
        return True

    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def prompt_reader(self, model: Any) -> Any:
        return model.base_model

    def of(self, kind: str, beta: float = 0.1) -> Family:
        from pm_llm.families.preference import Preference
        from pm_llm.families.text import Text

        return self if kind == self.kind else Text() if kind == "text" else Preference(beta)

    def prompt_budget(self, max_length: int, max_new_tokens: int) -> int:
        return max_length - max_new_tokens

    def row(self, prompt: list[int], answer: list[int], labels: list[int] | None = None) -> Row:
        return {"input_ids": prompt + answer, "labels": ([-100] * len(prompt) if labels is None else labels) + answer}

    def prompt_of(self, row: Row) -> list[int]:
        learnt = next((i for i, label in enumerate(row["labels"]) if label != -100), len(row["labels"]))
        found: list[int] = row["input_ids"][:learnt]
        return found

    def lead(self, example: Example) -> str:
        """A decoder goes on from "...Answer:" with a space before the word."""
        blank = example.prompt[-1:].isspace() or (example.completion[:1].isspace() and not example.framed)
        return "" if not example.prompt or blank else " "

    def open_prompt(self, ids: list[int], end: int) -> list[int]:
        """Without the end of sequence that some tokenizers put after every text."""
        return ids[:-1] if ids and ids[-1] == end else ids

    def answer_ids(self, encoder: Encoder, text: str, **how: Any) -> list[int]:
        """Some tokenizers (Llama 2's, Mistral's) put a blank before every text: there it is encoded after something,
        which is then taken off."""
        ids = encoder.ids(text, **how)
        if not _prepends(encoder.tokenizer):
            return ids
        for front in ("\n", ":", "a"):
            before, both = encoder.ids(front, **how), encoder.ids(front + text, **how)
            if both[: len(before)] == before:
                return both[len(before) :]
        return ids

    def seen_before(self, prompt: Sequence[int]) -> list[int]:
        """By itself a first token may lose its blank."""
        return [*prompt[-1:]]

    def trainer_class(self) -> Any:
        from pm_llm.training.trainers import ContinualSFTTrainer

        return ContinualSFTTrainer

    def arguments_class(self) -> Any:
        from trl import SFTConfig

        return SFTConfig

    def arguments(self) -> dict[str, Any]:
        return {"max_length": None}  # rows are cut inside their frame already

    def collator(self, tokenizer: Any, model: Any) -> Any:
        from pm_llm.families.packing import Packing

        return Packing(tokenizer, model)

    def tokens(self, module: str, batch: Batch) -> Tensor | None:
        from pm_llm.families.packing import no_padding

        return super().tokens(module, batch) if "attention_mask" in batch else no_padding(batch)

    def labels(self, batch: Batch) -> Tensor:
        return batch["labels"][:, 1:]

    def answers(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = self.labels(batch)
        inputs = {key: value for key, value in batch.items() if key != "labels"}  # no loss of the model's own
        at = (labels != -100).any(dim=0).nonzero().squeeze(1)
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        if "logits_to_keep" in inspect.signature(inner.forward).parameters:
            logits = model(**inputs, use_cache=False, logits_to_keep=at).logits
        else:
            logits = model(**inputs, use_cache=False).logits[:, at]
        return logits, labels[:, at]

    @contextmanager
    def listening(self, model: Any) -> Iterator[list[Any]]:
        """To what comes out below the head: TRL's fused head makes no logits."""
        heard: list[Any] = []
        backbone = _backbone(model)
        handle = backbone.register_forward_hook(lambda module, given, output: heard.append(output))
        try:
            yield heard
        finally:
            handle.remove()

    def said(self, model: Any, heard: list[Any], batch: Batch) -> Tensor:
        """The network with the answers' states in place of all below its head: so it is each model's own head."""
        labels, output, backbone = self.labels(batch), heard[0], _backbone(model)  # the pass that is trained
        states = output.last_hidden_state[:, :-1][labels != -100]
        with _instead(backbone, type(output)(last_hidden_state=states[None])):
            found = model.get_base_model()(inputs_embeds=states[None], use_cache=False)
        result: Tensor = found.logits[0]
        return result

    def new_tokens(self, output: Tensor, inputs: Batch) -> Tensor:
        return output[:, inputs["input_ids"].shape[1] :]

    def reader(self, prompts: Prompts, rows: Sequence[int]) -> Reader:
        return DecoderReader(prompts, rows)


class DecoderReader(Reader):
    """Prompts in a decoder's key-value cache; where that forgets tokens, each answer is read with its prompt."""

    def __init__(self, prompts: Prompts, rows: Sequence[int]) -> None:
        self.model = prompts.model
        inputs, cache = prompts.batch(rows)
        self.ids, self.mask = inputs["input_ids"], inputs["attention_mask"]
        read = cache.get_seq_length() if cache is not None else 0
        out = self.model(
            input_ids=self.ids[:, read:],
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(-1) - 1).clamp(min=0)[:, read:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values if is_plain(out.past_key_values) else None
        self.first = out.logits[:, -1].float().log_softmax(-1)

    def score(self, answers: Sequence[Ids]) -> Tensor:
        ids, kept = self._right_padded(answers)
        found = self.first.gather(1, ids[:, :1]).squeeze(1)
        length = ids.shape[1] - 1
        if not length:
            return found
        mask = torch.cat([self.mask, kept[:, :-1].to(self.mask.dtype)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        if self.cache is None:
            whole = torch.cat([self.ids, ids[:, :-1]], dim=1)
            out = self.model(input_ids=whole, attention_mask=mask, position_ids=positions, logits_to_keep=length)
        else:
            out = self.model(
                input_ids=ids[:, :-1],
                attention_mask=mask,
                position_ids=positions[:, -length:],
                past_key_values=self.cache,
                use_cache=True,
            )
            self.cache.crop(-length)  # back to the prompts
        return found + summed(out.logits, ids[:, 1:], kept[:, 1:])


def _backbone(model: Any) -> Any:
    base = model.get_base_model()
    return getattr(base, base.base_model_prefix)


@contextmanager
def _instead(module: Any, output: Any) -> Iterator[None]:
    """Within the block, a module gives that output, whatever it is given."""
    before = module.__dict__.get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@lru_cache
def _prepends(tokenizer: Any) -> bool:
    """Whether it puts a blank before a text: always (Llama 2), or where there is none (T5)."""
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", " a"))
    return one == two or len(two) > len(one)
