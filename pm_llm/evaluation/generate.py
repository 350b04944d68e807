"""Greedy answers to prompts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from pm_llm.evaluation.batches import in_batches, pack
from pm_llm.families.base import Row
from pm_llm.sections import EvaluationSection
from pm_llm.system.progress import bar
from pm_llm.tasks.base import Example
from pm_llm.tasks.encoding import Encoder


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
    prompts = [encoder.prompt(example) for example in examples]
    found = _outputs(model, encoder, prompts, batch_size, batch_tokens, progress)
    return [
        encoder.said(example, *pair) for example, pair in zip(examples, zip(prompts, found, strict=True), strict=True)
    ]


@torch.inference_mode()
def sample(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    seed: int,
    batch_size: int,
    batch_tokens: int = 8192,
    progress: Callable[[int], Any] | None = None,
) -> list[list[int]]:
    """An answer to each prompt (both in tokens), drawn from the model itself at temperature 1.

    An answer ends with the end of sequence, or is cut at `encoder.max_new_tokens`. Draws depend on `seed` and on the
    batches, and not on how many processes share them.
    """
    ends = {*_listed(model.generation_config.eos_token_id), encoder.tokenizer.eos_token_id}
    found = _outputs(model, encoder, prompts, batch_size, batch_tokens, progress, seed)
    lengths = [next((i for i, token in enumerate(ids, start=1) if token in ends), len(ids)) for ids in found]
    return [ids[:n] for ids, n in zip(found, lengths, strict=True)]


def answered(
    model: Any, encoder: Encoder, prompts: Sequence[list[int]], seed: int, how: EvaluationSection
) -> list[Row]:
    """Encoded rows of prompts with answers drawn from the model, see :func:`sample`."""
    with bar(len(prompts), "answers of the model", "row") as progress:
        answers = sample(model, encoder, prompts, seed, how.batch_size, how.batch_tokens, progress.update)
    return [encoder.family.row(*pair) for pair in zip(prompts, answers, strict=True)]


def _outputs(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    batch_size: int,
    batch_tokens: int,
    progress: Callable[[int], Any] | None,
    seed: int | None = None,
) -> list[list[int]]:
    """The tokens after each prompt, with padding at their end: the likeliest ones, or with a seed drawn ones."""
    how = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def answer(batch: Sequence[int]) -> list[list[int]]:
        inputs, cache = read.batch(batch)
        with nullcontext() if seed is None else _random(seed * 1_000_003 + min(batch)):
            output = model.generate(
                **inputs,
                **({} if cache is None else {"past_key_values": cache}),
                max_new_tokens=encoder.max_new_tokens,
                num_beams=1,
                synced_gpus=False,  # processes keep step by themselves, see `in_batches`
                pad_token_id=encoder.tokenizer.pad_token_id,
                **how,
            )
        found: list[list[int]] = encoder.family.new_tokens(output, inputs).tolist()
        return found

    with evaluating(model):
        read = Prompts(model, encoder, prompts)
        lengths = [len(ids) - read.common for ids in prompts]
        extra = read.common + encoder.max_new_tokens
        batches = pack(lengths, extra, batch_size, batch_tokens, one_length=read.one_length)
        return in_batches(batches, answer, progress, model)


@contextmanager
def _random(seed: int) -> Iterator[None]:
    """Random numbers of that seed; afterwards they go on where they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


class Prompts:
    """Prompts of a call, made ready batch by batch; a decoder reads what all of them begin with (an instruction) once.

    Args:
        model: The model, in evaluation mode.
        encoder: How rows are rendered.
        prompts: All prompts of the call, in tokens.
    """

    def __init__(self, model: Any, encoder: Encoder, prompts: Sequence[list[int]]) -> None:
        self.model, self.encoder, self.prompts = model, encoder, prompts
        self.common, self.cache, self.one_length = 0, None, False
        if not encoder.family.shares_prompts or is_prompt_learning(model):
            return
        self.one_length = not takes_padding(model, 0)
        common = common_prefix(prompts)
        common = common if common and not self.one_length and takes_padding(model, 3) else 0
        if common:
            ids = torch.tensor([prompts[0][:common]], device=model.device)
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            if is_plain(cache):
                self.common, self.cache = common, cache

    def batch(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], Any]:
        """`input_ids` and `attention_mask` of some rows, and the cache of their common tokens (None: nothing read).

        An encoder-decoder's rows are padded on the right. A decoder's padding is on the left: before the prompt, or
        between the common tokens and the rest.
        """
        rest = self.encoder.tokenizer.pad(
            {"input_ids": [self.prompts[i][self.common :] for i in rows]},
            padding_side=self.encoder.family.padding_side,
            return_tensors="pt",
        ).to(self.model.device)
        ids, mask = rest["input_ids"], rest["attention_mask"]
        if self.cache is None:
            return {"input_ids": ids, "attention_mask": mask}, None
        front = torch.tensor([self.prompts[0][: self.common]], device=ids.device).expand(len(rows), -1)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(rows))
        return {
            "input_ids": torch.cat([front, ids], dim=1),
            "attention_mask": torch.cat([torch.ones_like(front), mask], dim=1),
        }, cache


_KNOWN: WeakKeyDictionary[Any, dict[int, bool]] = WeakKeyDictionary()  # a base model's answers to takes_padding


def takes_padding(model: Any, after: int) -> bool:
    """Whether a decoder answers a prompt alike with padding after its first `after` tokens (0: before all of it).

    It is tried: some models look at a token's place among all that are in the batch (ALiBi over padding, learned
    positions that are not told). A model with a local window counts padding between tokens.
    """
    if after and getattr(model.config, "window_size", None):
        return False
    known = _KNOWN.setdefault(model.get_base_model() if isinstance(model, PeftModel) else model, {})
    if after not in known:
        known[after] = _same_with_padding(model, after)
    return known[after]


def _same_with_padding(model: Any, after: int) -> bool:
    size = min(8, model.get_input_embeddings().num_embeddings)
    ids = torch.arange(size, device=model.device)[None]
    alone, beside = (_two_steps(model, ids, after, padding) for padding in (0, 5))
    scale = alone.abs().max().clamp(min=1e-6)
    return bool((alone - beside).abs().max() < (1e-3 if model.dtype == torch.float32 else 0.05) * scale)


def _two_steps(model: Any, ids: Tensor, after: int, padding: int) -> Tensor:
    """Logits after a prompt with some padding in it, and after one token more, from the cache as in generation."""
    given = torch.cat([ids[:, :after], ids[:, :1].expand(1, padding), ids[:, after:]], dim=1)
    mask = torch.ones_like(given)
    mask[:, after : after + padding] = 0
    found, cache = [], None
    for _ in range(2):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -given.shape[1] :]
        more = {"position_ids": positions} if _takes_positions(model) else {}
        out = model(input_ids=given, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        found.append(out.logits[:, -1].float())
        cache, given, mask = out.past_key_values, ids[:, :1], torch.cat([mask, mask[:, -1:]], dim=1)
    return torch.cat(found)


def _takes_positions(model: Any) -> bool:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return "position_ids" in inspect.signature(inner.forward).parameters


def is_plain(cache: Any) -> bool:
    """Whether a key-value cache keeps every token of every layer.

    A sliding window counts places in the cache, padding too, so that padding in the middle pushes tokens out of it;
    and what has left the window cannot be brought back.
    """
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


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
