"""Hidden states below the first adapted layer, computed once a row: they are the same in every step of every run. What
the rows of a batch begin with in common passes the layers above once, and padding does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

ROWS = 8  # packed together: each token's attention is over all of them
CACHE: dict[tuple[str, bytes], Tensor] = {}  # (model, token ids of a row without padding) -> (tokens, width)


def use(model: Any, config: Any, pack: bool = True) -> bool:
    """:func:`install` it where a run's configuration lets it help; whether it does."""
    first = min(config.lora.layers_to_transform or [0])
    helps = first > 0 and not config.load_in_4bit
    if helps:
        if model.device.type == "cpu":  # in bfloat16 the fused attention's backward pass is a fifth of a step there
            model.set_attn_implementation("eager")
        install(model, first, config.model, pack)
    return helps


def install(model: Any, first: int, name: str, pack: bool = True) -> None:
    """Let a LLaMA-like model look up what its layers below the first with an adapter give, row by row.

    For passes over whole rows padded on the right, as in training and for the Fisher; with a cache of keys and values,
    as in evaluation, all layers run. Padding gets zeros, which no other position sees. Batches of rows that were all
    met before are packed (:func:`_packed`), unless something looks at what modules put out.

    Args:
        model: The base model, before adapters are put on it.
        first: The first layer that gets an adapter, at least 1.
        name: What the cache calls the model.
        pack: Whether batches may be packed, which rounds otherwise.
    """
    inner = model.model
    inner.ready = False  # whether what comes is the lookup's already
    inner.register_forward_pre_hook(partial(_remember, name), with_kwargs=True)
    lower = [layer.requires_grad_(False) for layer in inner.layers[:first]]  # PEFT freezes only what it sees
    for i in range(first - 1):
        inner.layers[i] = _Skip()
    inner.layers[first - 1] = _Lookup(lower, inner)
    if pack:
        inner.forward = partial(_forward, inner, inner.forward)


def _forward(inner: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model's own, or :func:`_packed` where that serves."""
    met = len(inner.row_ids) > 1 and all(key in CACHE for key in inner.row_keys)
    if not met or any(module._forward_hooks or module._forward_pre_hooks for module in inner.layers.modules()):
        return forward(*args, **kwargs)
    rows, known = [row.tolist() for row in inner.row_ids], [CACHE[key] for key in inner.row_keys]
    width, inner.ready = kwargs["input_ids"].shape[1], True
    try:
        groups = [_packed(inner, forward, rows[i : i + ROWS], known[i : i + ROWS]) for i in range(0, len(rows), ROWS)]
    finally:
        inner.ready = False
    states = [nn.functional.pad(one, (0, 0, 0, width - one.shape[1])) for one in groups]
    return BaseModelOutputWithPast(last_hidden_state=torch.cat(states))


def _packed(inner: Any, forward: Callable[..., Any], rows: list[list[int]], known: list[Tensor]) -> Tensor:
    """Last hidden states of rows (rows, longest, width), passed as one: what they share, then the rest of each.

    A position sees those of its own row before it, and the shared ones. Where a row has ended, another's are given.
    """
    same = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    shared = min(sum(1 for _ in same), min(map(len, rows)) - 1)
    states = torch.cat([known[0][:shared], *(one[shared:] for one in known)])[None]
    device = inner.embed_tokens.weight.device
    owner = torch.tensor([-1] * shared + [i for i, row in enumerate(rows) for _ in row[shared:]], device=device)
    place = torch.tensor([*range(shared), *(j for row in rows for j in range(shared, len(row)))], device=device)
    sees = ((owner[:, None] == owner) | (owner == -1)) & (place <= place[:, None])
    mask = torch.zeros(sees.shape, dtype=states.dtype, device=device).masked_fill(~sees, torch.finfo(states.dtype).min)
    out = forward(
        inputs_embeds=states.to(device), attention_mask=mask[None, None], position_ids=place[None], use_cache=False
    ).last_hidden_state[0]
    begins = [shared + sum(len(row) - shared for row in rows[:i]) for i in range(len(rows))]
    longest = max(len(row) for row in rows)
    index = [[*range(shared), *(begin + j for j in range(longest - shared))] for begin in begins]
    return out[torch.tensor(index, device=device).clamp(max=len(out) - 1)]


def _remember(name: str, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    whole = ids is not None and kwargs.get("past_key_values") is None and not kwargs.get("use_cache")
    inner.row_ids = []
    if whole and mask is not None and mask.dim() == 2 and bool(mask[:, 0].all()):
        inner.row_ids = [row[: int(m.sum())] for row, m in zip(ids, mask, strict=True)]
    inner.row_keys = [(name, row.cpu().numpy().tobytes()) for row in inner.row_ids]


class _Skip(nn.Module):
    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


class _Lookup(nn.Module):
    def __init__(self, lower: list[nn.Module], inner: Any) -> None:
        super().__init__()
        self.__dict__.update(lower=lower, inner=inner)  # not as submodules: they are not to be adapted

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        inner = self.__dict__["inner"]
        if inner.ready:
            return hidden
        keys = inner.row_keys
        if keys and all(key in CACHE for key in keys):
            found = torch.zeros_like(hidden)
            for out, key in zip(found, keys, strict=True):
                known = CACHE[key]
                out[: len(known)] = known.to(out)
            return found
        for layer in self.__dict__["lower"]:
            hidden = layer(hidden, **kwargs)
        for out, key, row in zip(hidden, keys, inner.row_ids, strict=False):  # no rows: all of a step of decoding
            CACHE[key] = out[: len(row)].detach().clone()
        return hidden
