"""Greedy answers to prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

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

    Rows of like length share a batch (:func:`pm_llm.evaluation.batches.pack`); decoders are padded on the left. An
    answer ends with end of sequence or `encoder.max_new_tokens`. The model's mode is restored.
    """
    tokenizer = encoder.tokenizer
    prompts = [encoder.prompt(example) for example in examples]

    def answer(batch: Sequence[int]) -> list[str]:
        inputs = padded(encoder, [prompts[i] for i in batch]).to(model.device)
        output = model.generate(
            **inputs,
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


def padded(encoder: Encoder, rows: Sequence[Sequence[int]]) -> Any:
    """`input_ids` and `attention_mask`; padding stands on the left for decoders."""
    side = "right" if encoder.seq2seq else "left"
    return encoder.tokenizer.pad({"input_ids": list(rows)}, padding_side=side, return_tensors="pt")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, and back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
