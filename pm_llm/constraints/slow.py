"""Slow: groups of modules learn at rates of their own (slow learner, SLCA, arXiv 2303.05118)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pm_llm.constraints.base import Constraint, Context, Live, Step
from pm_llm.errors import PmLlmError, check_number


@dataclass
class Slow(Constraint):
    """Each optimizer step moves a parameter by its group's share of what the optimizer wanted.

    That is a learning rate per group, whatever the optimizer. SLCA slows the representation against the classifier; a
    language model has no classifier of its own, so the groups are the user's.

    Args:
        rates: Pattern (a regular expression, searched in the parameter's name, e.g.
            `model.layers.3.self_attn.q_proj.lora_A`) -> factor on the learning rate, at least 0. The first that fits
            counts; the others have 1.

    Raises:
        PmLlmError: If a pattern is none or fits nothing, or a factor is out of range.
    """

    rates: dict[str, float] = field(default_factory=lambda: {"lora_A": 0.1})
    _before: list[tuple[nn.Parameter, Tensor, float]] = field(default_factory=list, init=False, repr=False)
    scales_update = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rates, dict) or not self.rates:
            raise PmLlmError(f"slow: rates is {self.rates!r}; it must be a mapping of patterns to factors.")
        for pattern, rate in self.rates.items():
            check_number(f"slow: rates[{pattern!r}]", rate, 0)
            try:
                re.compile(str(pattern))
            except re.error as error:
                raise PmLlmError(f"slow: {pattern!r} is not a regular expression: {error}.") from error

    @property
    def by_itself(self) -> bool:
        return True

    def begin(self, context: Context) -> None:
        if context.live is not None:
            self._rated(context.live)

    def before_update(self, step: Step, live: Live) -> None:
        self._before = [(p, p.data.clone(), rate) for p, rate in self._rated(live)]

    def after_update(self, step: Step, live: Live) -> None:
        for p, before, rate in self._before:
            p.data = before + rate * (p.data - before)
        self._before = []

    def _rated(self, live: Live) -> list[tuple[Any, float]]:
        found, used = [], set()
        for name in live.layers:
            for side, p in zip(("lora_A", "lora_B"), live.weights(name), strict=True):
                pattern = next((key for key in self.rates if re.search(str(key), f"{name}.{side}")), None)
                if pattern is not None:
                    used.add(pattern)
                    found.append((p, self.rates[pattern]))
        if used != set(self.rates):
            raise PmLlmError(
                f"slow: {sorted(set(self.rates) - used)} fit none of the adapted modules that those before them left."
            )
        return found
