"""Curvature of one task: the empirical Fisher, its diagonal or more of it, in one of four forms, each in one file.

    F = E_x[ g(x) o g(x) ],  g(x) = gradient of sum over answer tokens of log p(token | before)

The expectation is of the *square of each example's gradient*; the square of a batch gradient is a different, wrong
quantity. Taken at theta*_t = M_{t-1} + Delta_t: all adapters active, dropout off, no perturbation.

`dense`, `factored` and `kronecker` live in the space of the adapted weights W, `factors` in that of A and B. Every
form brings its own sum of past quadratics (:class:`Past`), whose size does not grow with the number of tasks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pm_llm.accumulators import Zeros
from pm_llm.errors import PmLlmError
from pm_llm.lowrank import LowRank

FORMS = {
    "dense": "pm_llm.fisher.dense:Dense",
    "factored": "pm_llm.fisher.factored:Factored",
    "kronecker": "pm_llm.fisher.kronecker:Kronecker",
    "factors": "pm_llm.fisher.factors:Factors",
}
Penalty = Callable[[LowRank], Tensor]  # the live (s B, A) of a task adapter -> a number to minimise


@dataclass(frozen=True)
class Layer:
    """An adapted layer while its Fisher is summed: its (d_out, d_in) and the trained adapter's (s B, A)."""

    shape: tuple[int, int]
    factors: LowRank


@dataclass(frozen=True)
class Room:
    """For what is kept of past tasks: how large sums are made, and the bounds of sums that are not exact."""

    zeros: Zeros = torch.zeros
    pairs: int = 4
    rank: int = 32
    directions: int = 32


class Diagonal:
    """The Fisher of one module in one task, a diagonal or (`kronecker`) more; `F o x` is its product with x."""

    form: ClassVar[str]
    past: ClassVar[type[Past]]

    def __init__(self, **tensors: Tensor) -> None:
        raise NotImplementedError

    @staticmethod
    def blank(layer: Layer, zeros: Zeros) -> dict[str, Tensor]:
        """Sums of no example yet."""
        raise NotImplementedError

    @staticmethod
    def add(sums: dict[str, Tensor], x: Tensor, g: Tensor, layer: Layer) -> None:
        """Add a batch's examples: inputs `x` (batch, tokens, d_in), output gradients `g` (batch, tokens, d_out).

        Both float32. Padding adds nothing: its output gradients are zero.
        """
        raise NotImplementedError

    def kept(self, room: Room) -> Diagonal:
        """What a sum of past quadratics takes of it: itself, but for a form that is cut on the way there."""
        return self

    def divided(self, size: float) -> Diagonal:
        """The Fisher divided by a number."""
        raise NotImplementedError

    def inner(self, x: LowRank, y: LowRank) -> float:
        """`<F o x, y>` in float64."""
        raise NotImplementedError

    def trace(self) -> float:
        """The sum of the diagonal."""
        raise NotImplementedError

    def count(self) -> int:
        """The number of its entries."""
        raise NotImplementedError


class Past:
    """The past tasks' quadratics of one module, `sum_i 1/2 (w - theta*_i)' F_i (w - theta*_i)`, as `S = sum_i F_i` and
    `m = sum_i F_i o theta*_i`."""

    names: ClassVar[tuple[str, ...]]  # of its tensors

    def __init__(self, **tensors: Tensor) -> None:
        raise NotImplementedError

    @classmethod
    def plus(cls, past: Any, fisher: Any, theta: LowRank, room: Room, at: LowRank | None = None) -> Past:
        """With one task more, whose optimum is `theta`; what is cut from S leaves the slope as it was `at` the model
        (None: at theta)."""
        raise NotImplementedError

    def along(self, delta: LowRank) -> float:
        """`<S o Delta, Delta>`"""
        raise NotImplementedError

    def pull(self, running: LowRank, delta: LowRank) -> float:
        """`<m - S o M, Delta>`: minus the slope of the quadratics at M, along Delta."""
        raise NotImplementedError

    def penalty(self, running: LowRank) -> Penalty:
        """`1/2 <S o Delta, Delta> + <S o M - m, Delta>` of the live task adapter: what leaving M costs the past."""
        raise NotImplementedError

    def sums(self) -> tuple[Tensor, Tensor] | None:
        """The row sums (d_out) and column sums (d_in) of S; None in the space of factors, which has no such."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What must be kept; `type(past)(**past.tensors())` is the same."""
        raise NotImplementedError

    def errors(self) -> tuple[float, float, float, float]:
        """Squared Frobenius norms of the last :meth:`plus`: cut from S, of S, cut from m, of m (0: exact).

        Where the new Fisher was cut and then two terms joined, the squared norms of both changes are added up.
        """
        return 0.0, 0.0, 0.0, 0.0


@dataclass(frozen=True)
class Fisher:
    """The Fisher of one task over all modules, and what else the same pass tells of its loss.

    `modules` by name. `exact` is `E[(g . Delta)^2]`, the empirical Fisher along the task vector with nothing left out
    between weights or modules; `exact_modules` the same module by module. `losses` are the mean loss (nats an example,
    summed over the answer's tokens) before and after training, at `M_{t-1}` and `theta*_t`. None: not measured.
    """

    modules: dict[str, Any]
    exact: float | None = None
    exact_modules: dict[str, float] = field(default_factory=dict)
    losses: tuple[float, float] | None = None

    @classmethod
    def of(cls, given: Fisher | Mapping[str, Tensor]) -> Fisher:
        """A Fisher as it is, or one from dense (d_out, d_in) tensors."""
        return given if isinstance(given, Fisher) else cls({name: form_of("dense")(F=f) for name, f in given.items()})


def form_of(name: str) -> Any:
    """The class of a form by name. Raises PmLlmError if there is none."""
    if name not in FORMS:
        raise PmLlmError(f"the Fisher's form is {name!r}; it must be {', '.join(FORMS)}.")
    module, _, attribute = FORMS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def past_of(tensors: dict[str, Tensor]) -> Past:
    """The sum of past quadratics that these tensors were kept of, whatever its form."""
    for name in FORMS:
        past = form_of(name).past
        if set(tensors) == set(past.names):
            return past(**tensors)
    raise PmLlmError(f"the curvature holds {sorted(tensors)}, which is of no form that is known here.")


def scale_of(fisher: Fisher, scale: str, own: float) -> float:
    """What to divide a task's Fisher by, to put it on a common scale.

    `raw`: 1 (the paper). `trace`: the mean of the diagonal becomes 1. `own`: the task's own quadratic
    `Delta' F Delta` becomes 1. `measured`: `1/2 Delta' F Delta` becomes the loss that training took away, measured at
    both ends of the task vector on the task's own rows; at least a hundredth of the loss before (a choice), or a task
    that was not learnt would have no place in the sum.

    Args:
        fisher: The task's Fisher.
        scale: One of the four.
        own: `Delta' F Delta` of the task vector, over all modules.

    Raises:
        PmLlmError: If the scale is unknown, what it needs was not measured, or what it divides by is not positive.
    """
    if scale == "raw":
        return 1.0
    if scale == "trace":
        size = sum(f.trace() for f in fisher.modules.values()) / sum(f.count() for f in fisher.modules.values())
    elif scale in ("own", "measured"):
        size = own
    else:
        raise PmLlmError(f"fisher_scale is {scale!r}; it must be raw, trace, own or measured.")
    if scale == "measured":
        if fisher.losses is None:
            raise PmLlmError("fisher_scale 'measured' needs the loss before and after training; give Fisher(losses=).")
        before, after = fisher.losses
        taken = max(before - after, before / 100)
        size = size / (2 * taken) if taken > 0 else float("inf")
    if not 0 < size < float("inf"):
        raise PmLlmError(
            f"fisher_scale {scale!r}: the value to divide by is {size}. The adapter did not move or diverged, or "
            "the task was known without it."
        )
    return size
