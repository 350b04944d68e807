"""Gaussian: random noise on the adapter in place of a scale on it (the ablation in arXiv 2505.22389)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pm_llm.constraints.base import Constraint, Live, Step
from pm_llm.system.options import option


@dataclass
class Gaussian(Constraint):
    """Each step trains on `A + epsilon rms(A) N` and `B + epsilon rms(B) N`, with N standard normal.

    The noise has the size that :class:`~pm_llm.constraints.perturb.Perturb` gives a factor, in a direction of no
    meaning. The gradient is taken at the noisy point and applied to the adapter as it is. The paper does not say where
    the noise is put (uncertain; here on the factors, relative to their own size). It is a function of seed and step,
    the same on every process and in every pass of a step.

    Args:
        epsilon: Size of the noise, at least 0 (0: none).
    """

    epsilon: float = option(0.5, least=0)

    @contextmanager
    def around(self, step: Step, live: Live, batch: Mapping[str, Any]) -> Iterator[None]:
        generator = torch.Generator().manual_seed(random.Random(f"gaussian {step.seed} {step.step}").getrandbits(63))
        parameters = live.parameters() if self.epsilon else []
        before = [p.data for p in parameters]
        try:
            for p in parameters:
                noise = torch.randn(p.shape, generator=generator).to(p)
                p.data = p.data + self.epsilon * p.data.square().mean().sqrt() * noise
            yield
        finally:
            for p, data in zip(parameters, before, strict=True):
                p.data = data
