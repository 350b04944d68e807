"""Greedy answers by checking guesses: whole rows, so that the hidden states of `trunk.py` serve evaluation too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel

from pm_llm.evaluation.batches import in_batches, pack
from pm_llm.evaluation.generate import evaluating
from pm_llm.tasks.base import Example
from pm_llm.tasks.encoding import Encoder


@torch.no_grad()
def generate(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    batch_size: int,
    batch_tokens: int = 8192,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """What :func:`pm_llm.evaluation.generate.generate` gives for a decoder, but for rounding.

    A guess is passed with its prompt. Where the model would have said something else, that token is kept and the next
    guess begins so: an answer seen before, if one does. A pass gives at least one token, a right guess all of them.
    """
    limit, last = encoder.max_new_tokens, model.generation_config.eos_token_id
    ends = set(last if isinstance(last, list) else [last])
    prompts = [encoder.prompt(example) for example in examples]
    answers = [tuple(encoder.answer(example)) for example in examples]
    seen = dict.fromkeys(answers)  # guesses are made of these; no answer depends on them

    def answer(batch: Sequence[int]) -> list[str]:
        known: dict[int, tuple[int, ...]] = dict.fromkeys(batch, ())  # never judged again: rounding may differ
        guesses = {i: answers[i] for i in batch}
        while guesses:
            rows = [[*prompts[i], *guess] for i, guess in guesses.items()]
            said = dict(zip(guesses, _said(model, rows, [len(prompts[i]) for i in guesses]), strict=True))
            for i, tokens in said.items():
                guess, sure = guesses.pop(i), len(known[i])
                right = next((j for j in range(sure, len(guess)) if guess[j] != tokens[j]), len(guess))
                known[i] = (*guess[:right], tokens[right])[:limit]
                length = next((j + 1 for j, token in enumerate(known[i]) if token in ends), limit)
                if len(known[i]) >= length:
                    known[i] = known[i][:length]
                    seen.setdefault(known[i])
                else:
                    guesses[i] = next((one for one in seen if one[: right + 1] == known[i]), known[i])
        texts = encoder.tokenizer.batch_decode([list(known[i]) for i in batch], skip_special_tokens=True)
        return [text.strip() for text in texts]

    with evaluating(model):
        lengths = [len(ids) for ids in prompts]
        return in_batches(pack(lengths, limit, batch_size, batch_tokens), answer, progress)


def _said(model: Any, rows: Sequence[Sequence[int]], begins: Sequence[int]) -> list[list[int]]:
    """What the model says at each place of each row from `begins` on, one place after the row's end included."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    states = inner.model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    states = states.last_hidden_state
    asked = [state[begin - 1 : length] for state, begin, length in zip(states, begins, lengths.tolist(), strict=True)]
    said = inner.lm_head(torch.cat(asked)).argmax(-1).cpu()
    return [part.tolist() for part in said.split([len(part) for part in asked])]
