"""Transfer: the tasks are added up, and with them the difference of an instruction-tuned model and its base."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from pm_llm.adapters.adapter import Adapter
from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank, from_dense
from pm_llm.errors import PmLlmError
from pm_llm.merges.base import Coefficients, Fold, Merge
from pm_llm.system.options import option


@dataclass
class Transfer(Merge):
    """`M_t = M_{t-1} + Delta_t`, and `M_1 = Delta_1 + scale * V`: a domain learned on a base model, with the
    instruction vector V added (chat vector, arXiv 2310.04799; task arithmetic, arXiv 2212.04089).

    V is an adapter on disk, of the same modules: :func:`task_vector` and `pm-llm vector` make one of two models.

    Args:
        adapter: Its folder.
        scale: Of V.
    """

    adapter: str = ""
    scale: float = option(1.0, finite=True)
    _vector: Adapter | None = field(default=None, init=False, repr=False)
    needs_history, adds, brings = True, True, True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.adapter:
            raise PmLlmError("transfer: name the adapter to add; `pm-llm vector` makes one of two models.")

    def ready(self) -> None:
        self._load()

    def _load(self) -> Adapter:
        vector = Adapter.load(self.adapter)
        vector.check_finite("instruction")
        return vector

    def coefficients(self, fold: Fold) -> Coefficients:
        if not fold.running:
            self._vector = self._load()
            ours, theirs = ({name: x.shape for name, x in one.items()} for one in (fold.new, self._vector.factors))
            if ours != theirs:
                raise PmLlmError(
                    f"transfer: {self.adapter} is of {len(theirs)} modules, the task's adapter of {len(ours)}, and "
                    "names or shapes differ. Make it of the same base model with the same target_modules."
                )
        return Coefficients.same(1.0, fold.new)

    def merge(self, fold: Fold, name: str, alpha: float) -> LowRank:
        merged = super().merge(fold, name, alpha)
        if fold.running:
            return merged
        assert self._vector is not None
        return lowrank.add(merged, self._vector.factors[name].scale(self.scale))


def task_vector(base: Any, tuned: nn.Module, modules: Iterable[str], rank: int) -> tuple[dict[str, LowRank], float]:
    """The difference of two models' weights in some linear modules, cut to a rank.

    Args:
        base: The model that the vector is relative to.
        tuned: The other, of the same shapes.
        modules: Names of the linear modules.
        rank: What each difference is cut to (Eckart-Young).

    Returns:
        The low-rank differences, and the relative Frobenius error over all of them.

    Raises:
        PmLlmError: If a module is missing or has another shape, or the models are the same there.
    """
    found, lost, total = {}, 0.0, 0.0
    ours, theirs = dict(base.named_modules()), dict(tuned.named_modules())
    for name in modules:
        one, other = ours[name].weight, getattr(theirs.get(name), "weight", None)
        if other is None or one.shape != other.shape:
            raise PmLlmError(f"module {name} is not of one shape in both models.")
        change = (other - one).detach().float().cpu()
        if isinstance(theirs[name], Conv1D):  # GPT-2's, which holds (d_in, d_out)
            change = change.T
        found[name], cut, whole = lowrank.truncate(from_dense(change), rank)
        lost, total = lost + cut, total + whole
    if not total > 0:
        raise PmLlmError("the two models have the same weights in these modules; there is no difference to take.")
    return found, (lost / total) ** 0.5


def left_out(base: nn.Module, tuned: nn.Module, modules: Iterable[str]) -> tuple[list[str], float]:
    """What else of the weights changed than those modules', which a vector of these does not hold.

    Returns:
        The names of the parameters, and their share of the squared norm of the whole change (those of another shape,
        as after a change of the vocabulary, count with their own norm).
    """
    held = {f"{name}.weight" for name in modules}
    ours, theirs = ({n.replace(".base_layer.", "."): p for n, p in one.named_parameters()} for one in (base, tuned))
    names, left, total = [], 0.0, 0.0
    for name, other in theirs.items():
        if ".lora_" in name:
            continue
        one = ours.get(name)
        alike = one is not None and one.shape == other.shape
        change = float(((other - one) if alike else other).detach().float().square().sum())  # type: ignore[operator]
        total += change
        if change > 0 and name not in held:
            names.append(name)
            left += change
    return names, left / total if total > 0 else 0.0
