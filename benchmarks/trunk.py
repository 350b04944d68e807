"""Hidden states below the first adapted layer, computed once a row: they are the same in every step of every run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CACHE: dict[tuple[str, bytes], Tensor] = {}  # (model, token ids of a row without padding) -> (tokens, width)


def use(model: Any, config: Any) -> bool:
    """:func:`install` it where a run's configuration lets it help; whether it does."""
    first = min(config.lora.layers_to_transform or [0])
    helps = first > 0 and not config.load_in_4bit
    if helps:
        if model.device.type == "cpu":  # in bfloat16 the fused attention's backward pass is a fifth of a step there
            model.set_attn_implementation("eager")
        install(model, first, config.model)
    return helps


def install(model: Any, first: int, name: str) -> None:
    """Let a LLaMA-like model look up what its layers below the first with an adapter give, row by row.

    For passes over whole rows padded on the right, as in training and for the Fisher; with a cache of keys and values,
    as in evaluation, all layers run. Padding gets zeros, which no other position sees.

    Args:
        model: The base model, before adapters are put on it.
        first: The first layer that gets an adapter, at least 1.
        name: What the cache calls the model.
    """
    inner = model.model
    inner.register_forward_pre_hook(_remember, with_kwargs=True)
    lower = [layer.requires_grad_(False) for layer in inner.layers[:first]]  # PEFT freezes only what it sees
    for i in range(first - 1):
        inner.layers[i] = _Skip()
    inner.layers[first - 1] = _Lookup(lower, inner, name)


def _remember(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    whole = ids is not None and kwargs.get("past_key_values") is None and not kwargs.get("use_cache")
    inner.row_ids = None
    if whole and mask is not None and mask.dim() == 2 and bool(mask[:, 0].all()):
        inner.row_ids = [row[: int(m.sum())] for row, m in zip(ids, mask, strict=True)]


class _Skip(nn.Module):
    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


class _Lookup(nn.Module):
    def __init__(self, lower: list[nn.Module], inner: Any, name: str) -> None:
        super().__init__()
        self.__dict__.update(lower=lower, inner=inner, name=name)  # not as submodules: they are not to be adapted

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        rows = self.__dict__["inner"].row_ids
        keys = [(self.__dict__["name"], row.cpu().numpy().tobytes()) for row in rows or ()]
        if rows and all(key in CACHE for key in keys):
            found = torch.zeros_like(hidden)
            for out, key in zip(found, keys, strict=True):
                known = CACHE[key]
                out[: len(known)] = known.to(out)
            return found
        for layer in self.__dict__["lower"]:
            hidden = layer(hidden, **kwargs)
        for i, row in enumerate(rows or ()):
            CACHE[keys[i]] = hidden[i, : len(row)].detach().clone()
        return hidden
