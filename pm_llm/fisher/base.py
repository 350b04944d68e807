"""What a Fisher is in every form: a sum over rows, its modules, and the sum of past quadratics."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError
from pm_llm.system.mapped import Zeros

FORMS = {
    "dense": "pm_llm.fisher.dense:Dense",
    "factored": "pm_llm.fisher.row_column:Factored",
    "kronecker": "pm_llm.fisher.kronecker:Kronecker",
    "factors": "pm_llm.fisher.of_factors:Factors",
}
Penalty = Callable[[LowRank], Tensor]  # the live (s B, A) of a task adapter -> a number to minimise
Penalties = Callable[[Mapping[str, LowRank]], list[Tensor]]  # those of all modules -> numbers, whose sum it is


@dataclass(frozen=True)
class Needs:
    """What a merge or a constraint must be given of a trained task.

    `fisher` is the form of its Fisher: one of `FORMS`, `configured` for the configuration's, or None: it needs none.
    `direction` says whether that Fisher must hold the exact curvature along the task vector, `losses` whether the loss
    before and after training, `probe` whether the loss must be at hand as a function of the adapter, `quadratic`
    whether the merge must keep the past tasks' quadratics. Of a constraint `fisher` and `quadratic` are looked at; of
    a merge all but `quadratic`.
    """

    fisher: str | None = None
    direction: bool = False
    losses: bool = False
    probe: bool = False
    quadratic: bool = False

    def form(self, configured: str) -> str | None:
        """The form of the Fisher, where the configuration's is `configured`."""
        return configured if self.fisher == "configured" else self.fisher


@dataclass(frozen=True)
class Layer:
    """An adapted layer while its Fisher is summed: its (d_out, d_in) and the trained adapter's (s B, A)."""

    shape: tuple[int, int]
    factors: LowRank


@dataclass(frozen=True)
class Room:
    """For what is kept of past tasks: how large sums are made, and the bounds of sums that are not exact."""

    zeros: Zeros = torch.zeros
    pairs: int = 32
    rank: int = 32
    directions: int = 32
    basis: int = 128


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

    def kept(self, room: Room) -> Any:
        """What a sum of past quadratics takes of it: itself, but for a form that is cut on the way there."""
        return self

    def uncut(self) -> Diagonal:
        """What :meth:`kept` was made of."""
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
    def plus(
        cls,
        past: Any,
        fisher: Any,
        theta: LowRank,
        room: Room,
        at: LowRank | None = None,
        before: LowRank | None = None,
    ) -> Past:
        """With one task more, whose optimum is `theta`.

        Args:
            past: What is known of the tasks before; None: none.
            fisher: The task's, of this form.
            theta: The model right after training, as a change of the base model.
            room: Bounds.
            at: The merged model with this task (None: theta), where the slope is that of the sum.
            before: The merged model without it, where `past` has its slope; None: the base model.
        """
        raise NotImplementedError

    def moved(self, change: LowRank, room: Room) -> None:
        """The merged model has moved by `change` since (it was truncated); a slope that is kept follows."""

    def along(self, delta: LowRank) -> float:
        """`<S o Delta, Delta>`"""
        raise NotImplementedError

    def pull(self, running: LowRank, delta: LowRank) -> float:
        """`<m - S o M, Delta>`: minus the slope of the quadratics at the merged model M, along Delta."""
        raise NotImplementedError

    def penalty(self, running: LowRank) -> Penalty:
        """`1/2 <S o Delta, Delta> + <S o M - m, Delta>` of the live task adapter: what leaving M costs the past."""
        raise NotImplementedError

    @classmethod
    def penalties(cls, pasts: Mapping[str, Any], running: Mapping[str, LowRank]) -> Penalties:
        """Those of all modules, whose sum is the cost; `running` is M by module."""
        each = {name: past.penalty(running[name]) for name, past in pasts.items()}
        return lambda live: [of(live[name]) for name, of in each.items()]

    def sums(self) -> tuple[Tensor, Tensor] | None:
        """The row sums (d_out) and column sums (d_in) of S; None in the space of factors, which has no such."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What must be kept; `type(past)(**past.tensors())` is the same."""
        raise NotImplementedError

    def kept_along(self) -> tuple[list[float], list[float]]:
        """Along the vector of each task that is watched, the quadratic as it is kept, and what it was before anything
        was cut or joined; the latter may be of the sum at the time the task came. Empty: nothing is ever cut."""
        return [], []

    def slope_cut(self) -> tuple[float, float]:
        """Squared (weighted) norms of the last fold: cut from the slope at the merged model, and of it."""
        return 0.0, 0.0


@dataclass(frozen=True)
class Fisher:
    """The Fisher of one task over all modules, and what else the same pass tells of its loss.

    `modules` by name. `exact` is `E[(g . Delta)^2]`, the empirical Fisher along the task vector with nothing left out
    between weights or modules; `exact_modules` the same module by module. `losses` are the mean loss (nats an example,
    summed over the answer's tokens) before and after training, at `M_{t-1}` and `theta*_t`, and `slopes` the
    derivatives `<grad L(theta*_t), Delta>` of that loss, module by module: below 0 where training had further to go.
    None, or empty: not measured.
    """

    modules: dict[str, Any]
    exact: float | None = None
    exact_modules: dict[str, float] = field(default_factory=dict)
    losses: tuple[float, float] | None = None
    slopes: dict[str, float] = field(default_factory=dict)

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
            found: Past = past(**tensors)
            return found
    raise PmLlmError(
        f"the curvature holds {sorted(tensors)}, which is of no form that is known here, but of another pm_llm. "
        "Go on with that version, or begin anew in another folder."
    )
