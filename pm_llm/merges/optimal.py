"""Optimal: the coefficient in closed form (P&M, arXiv 2505.22389)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, sqrt

import torch
from torch import Tensor

from pm_llm.adapters.adapter import block_of
from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError
from pm_llm.fisher.base import Diagonal, Fisher, Needs, Past, Penalties, Room, past_of
from pm_llm.fisher.scale import scale_of
from pm_llm.fisher.terms import Watched
from pm_llm.merges.base import Coefficients, Factors, Fold, Merge, check_coordinates, entrywise
from pm_llm.system.options import option
from pm_llm.system.parallel import each

POINTS = [i / 8 for i in range(9)]  # of `current: line`


@dataclass
class Optimal(Merge):
    """The alpha that minimises the past and present quadratics along the task vector:

        M_t     = M_{t-1} + alpha_t Delta_t
        alpha_t = argmin  sum_{i<=t} 1/2 (M_t - theta*_i)' F_i (M_t - theta*_i)
                = <m_t - S_t o M_{t-1}, Delta_t> / <S_t o Delta_t, Delta_t>
        S_t     = S_{t-1} + F_t,   m_t = m_{t-1} + F_t o theta*_t

    The two accumulators S and m replace all past Fishers and optima. `alpha_1 = 1`; equal Fishers give `1/t`. It is
    computed as `(<m_{t-1} - S_{t-1} o M_{t-1}, Delta> + q) / (<S_{t-1} o Delta, Delta> + q)`, with the task's own
    `q = <F_t o Delta, Delta>`, which is the same.

    With `fisher_scale: measured` it is known whether theta*_t is a minimum of the task's loss. Its slope g along Delta
    there is taken in, `(<m_{t-1} - S_{t-1} o M_{t-1}, Delta> + q - g) / (<S_{t-1} o Delta, Delta> + q)`: where the
    `curvature` penalty has held training back, the loss falls on and the past rises, and what the penalty has paid for
    already is not taken back a second time.

    Args:
        granularity: `model` (one alpha), `layer` or `module` (one each: a diagonal Fisher separates; of `exact` and of
            `fisher_scale` what lies between the groups is left out of their q, not of the scale).
        clip: Clip alpha to [0, 1] (a choice; the raw value is always recorded).
        fisher_scale: `raw` (the paper), `trace`, `own` or `measured`, see :func:`pm_llm.fisher.scale.scale_of`.
        current: How the task's own quadratic q is taken: with the `diagonal` of its Fisher (the paper), or `exact`, as
            `E[(g . Delta)^2]`, with nothing left out between weights. `line`: not at all; alpha in [0, 1] minimises
            `L_t(M_{t-1} + alpha Delta) + 1/2 alpha^2 <S_{t-1} o Delta, Delta> - alpha <m_{t-1} - S_{t-1} o M_{t-1},
            Delta>`, with the loss itself on the rows that the Fisher is measured on, at nine points, and a parabola
            through the best of them and its neighbours. Then there is one alpha for the model, in [0, 1].
        space: `weights` (the paper), or `factors`: of the LoRA factors, for an adapter that continues. Delta is then
            the change of (B, A), and `M_t = M_{t-1} + alpha_t Delta_t` holds for B and for A.
        form: The Fisher's form in the space of the weights; None: `fisher.form` of the configuration.
        pairs: Of a factored or Kronecker Fisher, how many terms the sum S keeps, one a task until they are used up
            (:mod:`pm_llm.fisher.terms`).
        rank: The rank that the sum's slope is cut to there.
        directions: Of a Kronecker Fisher, how many directions each side of a term keeps.
        basis: How many directions the terms' sides have together.

    Raises:
        PmLlmError: On an option out of range, or a denominator that is zero or not finite, naming the module.
    """

    granularity: str = option("model", choices=("model", "layer", "module"))
    clip: bool = True
    fisher_scale: str = option("raw", choices=("raw", "trace", "own", "measured"))
    current: str = option("diagonal", choices=("diagonal", "exact", "line"))
    space: str = option("weights", choices=("weights", "factors"))
    form: str | None = option(None, choices=(None, "dense", "factored", "kronecker"))
    pairs: int = option(32, least=1)
    rank: int = option(32, least=1)
    directions: int = option(32, least=1)
    basis: int = option(128, least=1)
    past: dict[str, Past] = field(default_factory=dict, init=False, repr=False)
    needs_history, quadratic = True, True
    stores = "the Fishers' sum and m, of bounded size"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form is not None and self.space == "factors":
            raise PmLlmError(
                f"optimal: form {self.form!r} (as pm_curvature has it) is of the weights. Unset form, or space."
            )
        if self.current == "line" and (self.granularity != "model" or not self.clip):
            raise PmLlmError(
                "optimal: current line gives one alpha for the model, in [0, 1]. Unset granularity and clip."
            )
        self.in_factors, losses = self.space == "factors", self.fisher_scale == "measured"
        form = "factors" if self.in_factors else self.form or "configured"
        self.needs = Needs(form, self.current == "exact" or losses, losses, probe=self.current == "line")

    def coefficients(self, fold: Fold) -> Coefficients:
        fisher = self._cut(fold)
        own, whole = self._own(fold, fisher)
        size = scale_of(fisher, self.fisher_scale, whole)

        def module(name: str) -> tuple[float, float]:
            past = self.past.get(name)
            if past is None or not fold.running:
                return 0.0, 0.0
            delta = self._delta(fold, name)
            return past.pull(fold.running[name], delta), past.along(delta)

        found = each(module, fold.new)
        raw: dict[str, float] = {}
        for group, names in self._groups(found).items():
            # a diagonal, and the product forms, have no entries between modules: a group's sums are its modules'
            pull, along = (sum(numbers) for numbers in zip(*(found[name] for name in names), strict=True))
            q = (whole if self.granularity == "model" else sum(own[name] for name in names)) / size
            if not fold.running:  # theta*_1 = Delta_1: numerator and denominator are one sum
                raw |= dict.fromkeys(names, 1.0 if self.needs.losses else _divide(q, q, group))
                continue
            # where training ended the task's loss has the slope g along Delta; at a minimum it would be 0
            onward = sum(fisher.slopes.get(name, 0.0) for name in names) if self.needs.losses else 0.0
            raw |= dict.fromkeys(names, _divide(pull + q - onward, along + q, group))
        raw = {name: raw[name] for name in found}
        if self.current == "line" and fold.running:
            pull, along = (size * sum(numbers) for numbers in zip(*found.values(), strict=True))
            raw = dict.fromkeys(raw, self._on_line(fold, pull, along))
        used = {name: min(1.0, max(0.0, value)) if self.clip else value for name, value in raw.items()}

        self.past = each(lambda name: self._sum(fold, fisher.modules[name].divided(size), name, used[name]), fold.new)
        return Coefficients(used, raw)

    def inherit(self, fold: Fold, scaled: bool = True, weight: float = 1.0) -> None:
        """With one past task more, which the merged model holds whole; the Fisher of one without a task vector is on
        the scale `raw`, or `trace`: with labels sampled from the model it is in nats as `measured` is."""
        fisher, size = self._cut(fold), 1.0
        if scaled or self.fisher_scale == "trace":
            size = scale_of(fisher, self.fisher_scale, self._own(fold, fisher)[1])
        self.past = each(
            lambda name: self._sum(fold, fisher.modules[name].divided(size / weight), name, 1.0), fold.new
        )

    def _sum(self, fold: Fold, one: Diagonal, name: str, alpha: float) -> Past:
        """S_t = S_{t-1} + F_t; in place of m_t the sums keep the slope S_t M_t - m_t at the merged model."""
        theta = fold.new[name] if self.space == "factors" else fold.theta(name)
        at, before = self.merge(fold, name, alpha), fold.running.get(name)
        found: Past = one.past.plus(self.past.get(name), one, theta, self._room(), at, before)
        return found

    def _room(self) -> Room:
        return Room(self.zeros, self.pairs, self.rank, self.directions, self.basis)

    def truncated(self, name: str, change: LowRank) -> None:
        self.past[name].moved(change, self._room())

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        return entrywise(fold, name, alpha) if self.in_factors and fold.running else super().merge(fold, name, alpha)

    @property
    def is_sum(self) -> bool:
        return not self.in_factors

    def direction(self, fold: Fold) -> dict[str, LowRank]:
        """In factors the way (dB, dA) changes the weights by `dB A + B dA`."""
        if self.space == "weights":
            return super().direction(fold)
        steps = {name: self._delta(fold, name) for name in fold.new}
        return {
            name: LowRank(torch.cat([step.B, fold.new[name].B], 1), torch.cat([fold.new[name].A, step.A], 0))
            for name, step in steps.items()
        }

    def weights(self, name: str) -> tuple[Tensor, Tensor] | None:
        return self.past[name].sums() if self.space == "weights" else None

    def penalties(self, running: Factors) -> Penalties:
        kinds = {type(one) for one in self.past.values()}
        return kinds.pop().penalties(self.past, running) if kinds else super().penalties(running)

    def remembers(self, n: int, m: int, r: int, tasks: int, whole: int, form: str | None) -> int:
        if form == "factors":
            return 2 * (n + m) * r
        if form == "dense":
            return 2 * n * m
        terms = min(self.pairs, tasks)
        own = (n + m) * (terms * Watched.WIDTH + self.rank) + terms
        if form == "factored":
            return (n + m) * terms + own
        directions = [min(self.basis, terms * self.directions, d) for d in (n, m)]
        cores = terms * self.directions * sum(directions)
        return sum(d * (k + terms) for d, k in zip((n, m), directions, strict=True)) + cores + own

    def curvature_errors(self) -> dict[str, float]:
        """`own`: how far the quadratics, cut and joined, are off along the watched tasks' own vectors, relative to
        what they were, at the worst of them (of the model; tasks that join may be other ones in each module). `slope`:
        the relative norm of what the last fold cut from the slope."""
        along = [p.kept_along() for p in self.past.values()]
        kept, exact = ([sum(x) for x in zip(*(one[i] for one in along), strict=True)] for i in (0, 1))
        lost, whole = (sum(p.slope_cut()[i] for p in self.past.values()) for i in (0, 1))
        off = [abs(k / e - 1) for k, e in zip(kept, exact, strict=True) if e > 0]
        return {"own": max(off, default=0.0), "slope": sqrt(lost / whole) if lost > 0 else 0.0}

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{key}.{name}": x.contiguous() for name, past in self.past.items() for key, x in past.tensors().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            modules[name][kind] = tensor.float()
        self.past = {name: past_of(tensors) for name, tensors in modules.items()}

    def _on_line(self, fold: Fold, pull: float, along: float) -> float:
        """The alpha of `current: line`; both numbers are of the past, on the scale of the task's loss."""
        assert fold.trained.probe is not None
        values = []
        for alpha in POINTS:
            loss = fold.trained.probe.loss({name: self.merge(fold, name, alpha) for name in fold.new})
            values.append(loss + alpha * alpha * along / 2 - alpha * pull)
        if not all(isfinite(value) for value in values):
            raise PmLlmError(f"optimal: the loss between the merged and the trained model is {values}.")
        return lowest(POINTS, values)

    def _delta(self, fold: Fold, name: str) -> LowRank:
        """The task vector; in factors the pair (B, A) less the one it began as."""
        if self.space == "weights":
            return fold.delta(name)
        new, began = fold.new[name], fold.running or fold.trained.began
        return LowRank(new.B - began[name].B, new.A - began[name].A) if began else new

    def _groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """What has one alpha, and its modules; a layer is a block (:func:`pm_llm.adapters.adapter.block_of`)."""
        if self.granularity == "model":
            return {"the model": list(names)}
        groups: dict[str, list[str]] = defaultdict(list)
        for name in names:
            layer = block_of(name) if self.granularity == "layer" else ""
            groups[f"layer {layer}" if layer else f"module {name}"].append(name)
        return groups

    def _own(self, fold: Fold, fisher: Fisher) -> tuple[dict[str, float], float]:
        """The task's `Delta' F Delta` of each module, and of the model."""
        if self.current == "exact":
            if fisher.exact is None:
                raise PmLlmError("current 'exact' needs the curvature along the task vector; give Fisher(exact=).")
            return fisher.exact_modules, fisher.exact

        def module(name: str) -> float:
            delta = self._delta(fold, name)
            found: float = fisher.modules[name].inner(delta, delta)
            return found

        found = each(module, fold.new)
        return found, sum(found.values())

    def _cut(self, fold: Fold) -> Fisher:
        """The Fisher as the sum takes it."""
        given, room = self._checked(fold), self._room()
        return replace(given, modules=each(lambda name: given.modules[name].kept(room), fold.new))

    def _checked(self, fold: Fold) -> Fisher:
        """The Fisher, if it is of this adapter and of the form that is kept."""
        assert fold.fisher is not None
        fisher, space = fold.fisher, self.space
        if set(fisher.modules) != set(fold.new):
            raise PmLlmError("the Fisher and the adapter are of different modules. Compute it on the same model.")
        form = next(iter(fisher.modules.values())).form
        if (form == "factors") != (space == "factors"):
            raise PmLlmError(f"optimal: a Fisher of the form {form!r} cannot be merged with in space {space!r}.")
        known = next((type(past) for past in self.past.values()), None)
        if known not in (None, next(iter(fisher.modules.values())).past):
            raise PmLlmError(f"the Fisher is {form}, but those of the tasks before were not. Keep to one form.")
        first = not fold.running and not fold.trained.began
        if space == "factors" and first and self.fisher_scale in ("own", "measured"):
            raise PmLlmError(
                f"optimal: fisher_scale {self.fisher_scale} in factors needs the first task's adapter as it "
                "began; give trained=Trained(began=...)."
            )
        if space == "factors":
            check_coordinates("optimal", fold)
        return fisher


def lowest(points: Sequence[float], values: Sequence[float]) -> float:
    """Where the parabola through the least of the values and its neighbours (at an end, through the last three) is
    lowest, no further than a step from that least one; the points are evenly spaced."""
    least = min(range(len(values)), key=lambda i: values[i])
    middle, step = min(max(least, 1), len(values) - 2), points[1] - points[0]
    before, here, after = values[middle - 1 : middle + 2]
    bend = before - 2 * here + after
    if bend <= 0:
        return points[least]
    found = points[middle] + step / 2 * (before - after) / bend
    return min(max(found, points[0], points[least] - step), points[-1], points[least] + step)


def _divide(above: float, below: float, where: str) -> float:
    if not isfinite(above) or not isfinite(below) or below <= 0:
        raise PmLlmError(
            f"the coefficient of {where} is {above} / {below}: the task vector is zero or not finite, or the Fisher "
            "does not see it. Did training move the adapter (learning rate, number of steps, all of its modules used)?"
        )
    return above / below
