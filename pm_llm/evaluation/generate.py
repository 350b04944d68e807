"""Greedy answers to prompts, in batches sorted by length, shared among processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from pm_llm.processes import process_state
from pm_llm.tasks import Example
from pm_llm.tasks.encode import Encoder


@torch.no_grad()
def generate(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    batch_size: int,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """The model's greedy answer to each example, in their order; every process gets all of them.

    Decoders are padded on the left, encoder-decoders on the right. The model's mode is restored.
    """
    state, tokenizer = process_state(), encoder.tokenizer
    prompts = [encoder.prompt(example) for example in examples]
    # longest first: running out of memory shows at once; equal lengths share a batch
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    answers: list[tuple[int, str]] = []
    was_training = model.training
    model.eval()
    try:
        for batch in batches[state.process_index :: state.num_processes]:
            inputs = tokenizer.pad(
                {"input_ids": [prompts[i] for i in batch]},
                padding_side="right" if encoder.seq2seq else "left",
                return_tensors="pt",
            ).to(model.device)
            output = model.generate(
                **inputs,
                max_new_tokens=encoder.max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=tokenizer.pad_token_id,
            )
            if not encoder.seq2seq:
                output = output[:, inputs["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(output, skip_special_tokens=True)
            answers += [(i, text.strip()) for i, text in zip(batch, texts, strict=True)]
            if progress is not None:
                progress(len(batch))
    finally:
        model.train(was_training)
    found = dict(gather_object(answers))
    return [found[i] for i in range(len(examples))]
