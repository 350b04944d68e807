"""Log-likelihoods of given answers: of each option of a classification task, or of the right answer (perplexity).

A batch's prompts are read once, and what they have in common at the front (a benchmark's instruction) once for all of
them; every option then goes on from the key-value cache (an encoder-decoder's: from the encoder's states).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.batches import in_batches, pack
from pm_llm.evaluation.generate import Prompts, evaluating, is_prompt_learning
from pm_llm.tasks.base import Example
from pm_llm.tasks.encoding import Encoder

Ids = Sequence[int]


def log_likelihoods(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    options: Sequence[Sequence[Ids]],
    batch_size: int,
    batch_tokens: int = 8192,
    progress: Callable[[int], Any] | None = None,
) -> list[list[float]]:
    """`log p(option | prompt)` in nats for each example's options; every process gets all of them.

    Args:
        options: For each example, the token ids of its options (with end of sequence); all examples have as many.
    """

    def score(reader: Reader, mine: list[Sequence[Ids]]) -> list[list[float]]:
        columns = [reader.score([row[k] for row in mine]) for k in range(len(mine[0]))]
        return torch.stack(columns, dim=1).tolist()

    return _read(model, encoder, examples, options, score, batch_size, batch_tokens, progress)


def choose_labels(
    model: Any, encoder: Encoder, examples: Sequence[Example], labels: Sequence[str], *sizes: Any
) -> list[str]:
    """The label that each example's answer most likely begins with, bare as generated ones. Sizes as in `generate`.

    Where one label begins with another, the end of sequence counts as part of each: it tells them apart.

    No label is more likely than its first token. So labels are tried in the order of their first tokens, until none
    that is left can win: the answer is that of trying all.
    """
    options = [label_ids(encoder, row, labels) for row in examples]

    def best(reader: Reader, mine: list[Sequence[Ids]]) -> list[int]:
        at_most = reader.first.gather(
            1, torch.tensor([[ids[0] for ids in row] for row in mine]).to(reader.first.device)
        )
        bound, order = at_most.sort(dim=1, descending=True, stable=True)
        value = torch.full_like(bound[:, 0], -torch.inf)
        chosen = order[:, 0].clone()
        for k in range(len(labels)):
            if not (bound[:, k] > value).any():
                break
            # a row that is settled is not asked for more than a first token
            tried = [
                row[i] if bound[at, k] > value[at] else row[i][:1]
                for at, (row, i) in enumerate(zip(mine, order[:, k].tolist(), strict=True))
            ]
            found = torch.where(bound[:, k] > value, reader.score(tried), -torch.inf)
            chosen = torch.where(found > value, order[:, k], chosen)
            value = torch.maximum(found, value)
        return chosen.tolist()

    return [labels[i].strip() for i in _read(model, encoder, examples, options, best, *sizes)]


def label_ids(encoder: Encoder, example: Example, labels: Sequence[str]) -> list[list[int]]:
    """The labels' token ids after the example's prompt; without end of sequence, where that changes nothing."""
    ids = [encoder.whole_answer(replace(example, completion=label, turn=None)) for label in labels]
    bare = [row[:-1] for row in ids]
    nested = any(a == b[: len(a)] for i, a in enumerate(bare) for k, b in enumerate(bare) if i != k)
    return ids if nested else bare


def answer_losses(
    model: Any, encoder: Encoder, examples: Sequence[Example], *sizes: Any
) -> tuple[list[float], list[int]]:
    """Each right answer's summed negative log-likelihood, and its number of tokens (end of sequence included)."""
    options = [[encoder.whole_answer(row)] for row in examples]
    scores = log_likelihoods(model, encoder, examples, options, *sizes)
    return [-row[0] for row in scores], [len(row[0]) for row in options]


@torch.inference_mode()
def _read(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    options: Sequence[Sequence[Ids]],
    work: Callable[[Reader, list[Sequence[Ids]]], list[Any]],
    batch_size: int,
    batch_tokens: int = 8192,
    progress: Callable[[int], Any] | None = None,
) -> list[Any]:
    """`work` on each batch's reader and options, gathered in the examples' order."""
    if is_prompt_learning(model):
        raise PmLlmError(
            "adapters of virtual tokens (prompt tuning and the like) can be asked to generate, but not for "
            "likelihoods. Use evaluation.mode generate, and another scorer than perplexity."
        )
    longest = max((len(ids) for row in options for ids in row), default=0)

    def on_batch(batch: Sequence[int]) -> list[Any]:
        return work(encoder.family.reader(prompts, batch), [options[i] for i in batch])

    with evaluating(model):
        prompts = Prompts(model, encoder, [encoder.prompt(example) for example in examples])
        lengths = [len(ids) - prompts.common for ids in prompts.prompts]
        batches = pack(lengths, prompts.common + longest, batch_size, batch_tokens, prompts.one_length)
        return in_batches(batches, on_batch, progress, model)


class Reader:
    """Prompts that have been read.

    `first` are the log-probabilities of the answers' first token, shape (rows, vocabulary).
    """

    first: Tensor

    def score(self, answers: Sequence[Ids]) -> Tensor:
        """`log p(answer | prompt)` of one answer a row, shape (rows,)."""
        raise NotImplementedError

    def _right_padded(self, answers: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Ids (rows, longest), and where they are no padding."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in answers], batch_first=True)
        lengths = torch.tensor([len(row) for row in answers])
        return ids.to(self.first.device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.first.device)


def summed(logits: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
    """The sum of the tokens' log-probabilities, shape (rows,)."""
    each = logits.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    return (each * kept).sum(-1)
