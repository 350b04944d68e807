"""Log-likelihoods of given answers: of each option of a classification task, or of the right answer (perplexity)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pm_llm.evaluation.batches import in_batches, pack
from pm_llm.evaluation.generate import evaluating, padded
from pm_llm.tasks import Example
from pm_llm.tasks.encode import Encoder


@torch.inference_mode()
def log_likelihoods(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    options: Sequence[Sequence[Sequence[int]]],
    batch_size: int,
    batch_tokens: int = 8192,
    progress: Callable[[int], Any] | None = None,
) -> list[list[float]]:
    """`log p(option | prompt)` in nats for each example's options; every process gets all of them.

    The prompt is read once: a decoder's key-value cache (an encoder-decoder's encoder states) serves all its options.

    Args:
        options: For each example, the token ids of its options (with end of sequence); all examples have as many.
    """
    prompts = [encoder.prompt(example) for example in examples]
    longest = max(len(ids) for row in options for ids in row)
    score = _encoder_decoder if encoder.seq2seq else _decoder

    def work(batch: Sequence[int]) -> list[list[float]]:
        inputs = padded(encoder, [prompts[i] for i in batch]).to(model.device)
        columns = [[options[i][k] for i in batch] for k in range(len(options[batch[0]]))]
        return score(model, inputs, columns).tolist()

    with evaluating(model):
        return in_batches(pack([len(ids) for ids in prompts], longest, batch_size, batch_tokens), work, progress)


def choose_labels(
    model: Any, encoder: Encoder, examples: Sequence[Example], labels: Sequence[str], *sizes: Any
) -> list[str]:
    """The most likely label for each example, end of sequence counted as part of it. Sizes as in `generate`."""
    options = [[encoder.whole_answer(replace(row, completion=label)) for label in labels] for row in examples]
    scores = log_likelihoods(model, encoder, examples, options, *sizes)
    return [labels[max(range(len(labels)), key=row.__getitem__)] for row in scores]


def answer_losses(
    model: Any, encoder: Encoder, examples: Sequence[Example], *sizes: Any
) -> tuple[list[float], list[int]]:
    """Each right answer's summed negative log-likelihood, and its number of tokens (end of sequence included)."""
    options = [[encoder.answer(row)] for row in examples]
    scores = log_likelihoods(model, encoder, examples, options, *sizes)
    return [-row[0] for row in scores], [len(row[0]) for row in options]


def _decoder(model: Any, inputs: Any, columns: list[list[Sequence[int]]]) -> Tensor:
    mask = inputs["attention_mask"]
    first = model(
        **inputs,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    start = first.logits[:, -1:].float()
    cache = first.past_key_values
    found = []
    for rows in columns:
        ids, kept = _right_padded(rows, mask.device)
        logits = start
        if ids.shape[1] > 1:
            more = model(
                input_ids=ids[:, :-1],
                attention_mask=torch.cat([mask, kept[:, :-1].to(mask.dtype)], dim=1),
                position_ids=mask.sum(-1, keepdim=True) + torch.arange(ids.shape[1] - 1, device=mask.device),
                past_key_values=cache,
                use_cache=True,
            )
            cache.crop(1 - ids.shape[1])  # back to the prompt
            logits = torch.cat([start, more.logits.float()], dim=1)
        found.append(_summed(logits, ids, kept))
    return torch.stack(found, dim=1)


def _encoder_decoder(model: Any, inputs: Any, columns: list[list[Sequence[int]]]) -> Tensor:
    states = model.get_encoder()(**inputs)
    found = []
    for rows in columns:
        ids, kept = _right_padded(rows, inputs["input_ids"].device)
        begin = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
        logits = model(
            encoder_outputs=states,
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=torch.cat([begin, ids[:, :-1]], dim=1),
        ).logits.float()
        found.append(_summed(logits, ids, kept))
    return torch.stack(found, dim=1)


def _right_padded(rows: list[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Ids (rows, longest), and where they are no padding."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)


def _summed(logits: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
    """The sum of the tokens' log-probabilities, shape (rows,)."""
    each = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    return (each * kept).sum(-1)
