"""Factors: one entry per weight of the LoRA factors (s B, A) themselves, for an adapter that continues.

All tasks then share one coordinate system: the merge is of A and of B, and neither rank nor state ever grows.
A point, a task vector and a gradient are pairs (B, A) here, held in a :class:`LowRank` that is not multiplied out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pm_llm.algebra.lowrank import LowRank
from pm_llm.fisher.base import Diagonal, Layer, Past, Penalty, Room
from pm_llm.system.mapped import Zeros


class FactorsPast(Past):
    """S and m, each a pair of the adapter's own shapes."""

    names = ("SB", "SA", "mB", "mA")

    def __init__(self, SB: Tensor, SA: Tensor, mB: Tensor, mA: Tensor) -> None:
        self.S, self.m = Factors(SB, SA), LowRank(mB, mA)

    @classmethod
    def plus(cls, past: Any, fisher: Any, theta: LowRank, room: Room, *_: Any) -> FactorsPast:
        m = LowRank(fisher.B * theta.B, fisher.A * theta.A)
        if past is None:
            return cls(fisher.B, fisher.A, m.B, m.A)
        return cls(past.S.B + fisher.B, past.S.A + fisher.A, past.m.B + m.B, past.m.A + m.A)

    def along(self, delta: LowRank) -> float:
        return self.S.inner(delta, delta)

    def pull(self, running: LowRank, delta: LowRank) -> float:
        one = Factors(torch.ones_like(self.S.B), torch.ones_like(self.S.A))
        return one.inner(self.m, delta) - self.S.inner(running, delta)

    def penalty(self, running: LowRank) -> Penalty:
        parts = [(self.S.B, self.m.B, running.B), (self.S.A, self.m.A, running.A)]

        def of(live: LowRank) -> Tensor:
            nonlocal parts
            parts = [tuple(x.to(live.B.device) for x in part) for part in parts]  # type: ignore[misc]
            total = live.B.new_zeros(())
            for theta, (S, m, before) in zip((live.B, live.A), parts, strict=True):
                delta = theta - before
                total = total + (delta * (S * delta / 2 + S * before - m)).sum()
            return total

        return of

    def tensors(self) -> dict[str, Tensor]:
        return {"SB": self.S.B, "SA": self.S.A, "mB": self.m.B, "mA": self.m.A}


class Factors(Diagonal):
    """`B` (d_out, rank) and `A` (rank, d_in)."""

    form = "factors"
    past = FactorsPast

    def __init__(self, B: Tensor, A: Tensor) -> None:
        self.B, self.A = B, A

    @staticmethod
    def blank(layer: Layer, zeros: Zeros) -> dict[str, Tensor]:
        return {"B": torch.zeros_like(layer.factors.B), "A": torch.zeros_like(layer.factors.A)}  # where the layer is

    @staticmethod
    def add(sums: dict[str, Tensor], x: Tensor, g: Tensor, layer: Layer) -> None:
        """From dW = g' x: the gradient of s B is g' (x A'), that of A is (g s B)' x; each example's by itself."""
        sums["B"] += (torch.einsum("bto,btr->bor", g, x @ layer.factors.A.T) ** 2).sum(dim=0)
        sums["A"] += (torch.einsum("btr,bti->bri", g @ layer.factors.B, x) ** 2).sum(dim=0)

    def divided(self, size: float) -> Factors:
        return self if size == 1 else Factors(self.B / size, self.A / size)

    def inner(self, x: LowRank, y: LowRank) -> float:
        pairs = ((self.B, x.B, y.B), (self.A, x.A, y.A))
        return sum(float((f.double() * a.double() * b.double()).sum()) for f, a, b in pairs)

    def trace(self) -> float:
        return float(self.B.double().sum() + self.A.double().sum())

    def count(self) -> int:
        return self.B.numel() + self.A.numel()
