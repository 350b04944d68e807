"""Greedy answers to prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from pm_llm.evaluation.batches import in_batches, pack
from pm_llm.tasks import Example
from pm_llm.tasks.encode import Encoder


@torch.inference_mode()
def generate(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    batch_size: int,
    batch_tokens: int = 8192,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """The model's greedy answer to each example, in their order; every process gets all of them.

    Rows of like length share a batch (:func:`pm_llm.evaluation.batches.pack`), and a decoder reads what their prompts
    begin with in common once. Answers end with end of sequence or `max_new_tokens`. The model's mode is restored.
    """
    tokenizer = encoder.tokenizer
    prompts = [encoder.prompt(example) for example in examples]

    def answer(batch: Sequence[int]) -> list[str]:
        inputs, cache = read_common(model, encoder, [prompts[i] for i in batch])
        output = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=encoder.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
        )
        if not encoder.seq2seq:
            output = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]

    with evaluating(model):
        batches = pack([len(ids) for ids in prompts], encoder.max_new_tokens, batch_size, batch_tokens)
        return in_batches(batches, answer, progress)


def read_common(model: Any, encoder: Encoder, prompts: Sequence[list[int]]) -> tuple[dict[str, Tensor], Any]:
    """A batch's `input_ids` and `attention_mask`, and a decoder's key-value cache of what all prompts begin with.

    An encoder-decoder's rows are padded on the right, and it has no cache (None). A decoder's padding stands between
    the common tokens, which are read here, and the rest; the cache is None where nothing is common.
    """
    common = 0 if encoder.seq2seq or is_prompt_learning(model) else common_prefix(prompts)
    side = "right" if encoder.seq2seq else "left"
    rest = encoder.tokenizer.pad(
        {"input_ids": [ids[common:] for ids in prompts]}, padding_side=side, return_tensors="pt"
    ).to(model.device)
    if not common:
        return {"input_ids": rest["input_ids"], "attention_mask": rest["attention_mask"]}, None
    ids = torch.tensor([prompts[0][:common]], device=model.device)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(len(prompts))
    ids = ids.expand(len(prompts), -1)
    return {
        "input_ids": torch.cat([ids, rest["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(ids), rest["attention_mask"]], dim=1),
    }, cache


def is_prompt_learning(model: Any) -> bool:
    """Whether the adapter is virtual tokens, which PEFT puts before every input."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with alike; each keeps at least one of its own, and one alone shares none."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in order of the tokens, these two differ soonest
    limit = min(len(ids) for ids in prompts) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, and back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
