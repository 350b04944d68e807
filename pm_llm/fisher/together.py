"""The past's penalties of many modules at once: those alike are stacked, and worked on as one.

A penalty of a module by itself is a handful of small kernels, forward and backward, and a model has hundreds of
modules: on an accelerator launching them would take longer than they do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pm_llm.algebra.lowrank import LowRank

if TYPE_CHECKING:
    from pm_llm.fisher.terms import TermsPast


class Together:
    """A function of the live (s B, A) of all modules: `1/2 <S o Delta, Delta> + <g, Delta>`, summed over those alike.

    The terms of the past are put where the live adapters are, when it is called first.
    """

    def __init__(self, pasts: Mapping[str, TermsPast]) -> None:
        self.pasts, self.groups = pasts, list[tuple[list[str], Callable[[Tensor, Tensor], Tensor]]]()

    def __call__(self, live: Mapping[str, LowRank]) -> list[Tensor]:
        if not self.groups:
            alike = defaultdict(list)
            for name in self.pasts:
                alike[live[name].B.device, live[name].shape, live[name].rank].append(name)
            self.groups = [(names, self._stacked(names, place)) for (place, *_), names in alike.items()]
        return [
            of(torch.stack([live[name].B for name in names]), torch.stack([live[name].A for name in names]))
            for names, of in self.groups
        ]

    def _stacked(self, names: Sequence[str], place: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        pasts = [self.pasts[name] for name in names]
        tensors = [past.terms.tensors() for past in pasts]
        quadratic = type(pasts[0].terms)(**{key: _padded([x[key] for x in tensors], place) for key in tensors[0]})
        of, B, A = quadratic.quadratic(), *(_padded([getattr(p.g, side) for p in pasts], place) for side in "BA")
        return lambda b, a: of(b, a) / 2 + ((B.mT @ b) * (A @ a.mT)).sum()


def _padded(tensors: Sequence[Tensor], place: torch.device) -> Tensor:
    """Stacked, each filled up with zeros to the largest: they add nothing."""
    shape = [max(sizes) for sizes in zip(*(x.shape for x in tensors), strict=True)]
    found = torch.zeros(len(tensors), *shape, dtype=tensors[0].dtype, device=place)
    for to, x in zip(found, tensors, strict=True):
        to[tuple(map(slice, x.shape))] = x.to(place)
    return found
