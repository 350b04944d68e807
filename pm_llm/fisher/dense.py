"""Dense: one entry per weight of each adapted matrix (the paper's formula, and the reference for the other forms)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pm_llm.algebra.lowrank import LowRank
from pm_llm.fisher.base import Diagonal, Layer, Past, Penalty, Room
from pm_llm.system.mapped import Zeros

BLOCK = 512  # rows at a time, where a sum is in float64


class DensePast(Past):
    """S and m as (d_out, d_in) matrices: 8 bytes for each weight of each adapted matrix."""

    names = ("S", "m")

    def __init__(self, S: Tensor, m: Tensor) -> None:
        self.S, self.m = S, m

    @classmethod
    def plus(cls, past: Any, fisher: Any, theta: LowRank, room: Room, *_: Any) -> DensePast:
        S, m = room.zeros(*fisher.F.shape).copy_(fisher.F), room.zeros(*fisher.F.shape).copy_(fisher.F * theta.dense())
        if past is not None:
            S += past.S
            m += past.m
        return cls(S, m)

    def along(self, delta: LowRank) -> float:
        return Dense(self.S).inner(delta, delta)

    def pull(self, running: LowRank, delta: LowRank) -> float:
        total = 0.0
        for rows in torch.arange(len(self.S)).split(BLOCK):
            slope = self.m[rows].double() - self.S[rows].double() * (running.B[rows] @ running.A)
            total += float((slope * (delta.B[rows] @ delta.A)).sum())
        return total

    def penalty(self, running: LowRank) -> Penalty:
        S, slope = self.S, self.S * running.dense() - self.m

        def of(live: LowRank) -> Tensor:
            nonlocal S, slope
            S, slope = S.to(live.B.device), slope.to(live.B.device)
            delta = live.dense()
            return (delta * (S * delta / 2 + slope)).sum()

        return of

    def sums(self) -> tuple[Tensor, Tensor]:
        return self.S.sum(1), self.S.sum(0)

    def tensors(self) -> dict[str, Tensor]:
        return {"S": self.S, "m": self.m}


class Dense(Diagonal):
    """`F` has the matrix's shape, (d_out, d_in)."""

    form = "dense"
    past = DensePast

    def __init__(self, F: Tensor) -> None:
        self.F = F

    @staticmethod
    def blank(layer: Layer, zeros: Zeros) -> dict[str, Tensor]:
        return {"F": zeros(*layer.shape)}

    @staticmethod
    def add(sums: dict[str, Tensor], x: Tensor, g: Tensor, layer: Layer) -> None:
        """For one example dW = g' x; each one's product is squared by itself."""
        sums["F"] += (torch.einsum("bto,bti->boi", g, x) ** 2).sum(dim=0).cpu()

    def divided(self, size: float) -> Dense:
        return self if size == 1 else Dense(self.F / size)

    def inner(self, x: LowRank, y: LowRank) -> float:
        total = 0.0
        for rows in torch.arange(len(self.F)).split(BLOCK):
            total += float((self.F[rows].double() * (x.B[rows] @ x.A) * (y.B[rows] @ y.A)).sum())
        return total

    def trace(self) -> float:
        return float(self.F.double().sum())

    def count(self) -> int:
        return self.F.numel()
