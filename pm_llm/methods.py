"""A method is three choices: how the adapter starts, what constrains training, how the result is merged.

The registry holds dotted names, so that reading it imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from dataclasses import dataclass, field
from typing import Any

from pm_llm.errors import PmLlmError, unknown_name
from pm_llm.system.coerce import convert

STARTS = {
    "fresh": "pm_llm.starts.fresh:Fresh",
    "continue": "pm_llm.starts.continuing:Continue",
    "last": "pm_llm.starts.last:Last",
    "orthogonal": "pm_llm.starts.orthogonal:Orthogonal",
    "subspace": "pm_llm.starts.subspace:Subspace",
    "alone": "pm_llm.starts.alone:Alone",
}
CONSTRAINTS = {
    "perturb": "pm_llm.constraints.perturb:Perturb",
    "curvature": "pm_llm.constraints.curvature:Curvature",
    "gaussian": "pm_llm.constraints.gaussian:Gaussian",
    "ewc": "pm_llm.constraints.ewc:Ewc",
    "l2": "pm_llm.constraints.l2:L2",
    "orthogonal": "pm_llm.constraints.orthogonal:Orthogonal",
    "sparse": "pm_llm.constraints.sparse:Sparse",
    "migu": "pm_llm.constraints.migu:Migu",
    "align": "pm_llm.constraints.align:Align",
    "null_space": "pm_llm.constraints.null_space:NullSpace",
    "gradient_subspace": "pm_llm.constraints.gradient_subspace:GradientSubspace",
    "refresh": "pm_llm.constraints.refresh:Refresh",
    "slow": "pm_llm.constraints.slow:Slow",
    "lori": "pm_llm.constraints.lori:Lori",
    "osft": "pm_llm.constraints.osft:Osft",
    "replay": "pm_llm.constraints.replay:Replay",
}
MERGES = {
    "replace": "pm_llm.merges.replace:Replace",
    "sum": "pm_llm.merges.summation:Sum",
    "average": "pm_llm.merges.average:Average",
    "exponential": "pm_llm.merges.exponential:Exponential",
    "slao": "pm_llm.merges.slao:Slao",
    "task_arithmetic": "pm_llm.merges.arithmetic:Arithmetic",
    "ties": "pm_llm.merges.ties:Ties",
    "dare": "pm_llm.merges.dare:Dare",
    "magmax": "pm_llm.merges.magmax:MagMax",
    "opcm": "pm_llm.merges.opcm:Opcm",
    "constant": "pm_llm.merges.constant:Constant",
    "cofima": "pm_llm.merges.cofima:Cofima",
    "pam": "pm_llm.merges.pam:Pam",
    "max": "pm_llm.merges.max_merge:Max",
    "frank_wolfe": "pm_llm.merges.frank_wolfe:FrankWolfe",
    "transfer": "pm_llm.merges.transfer:Transfer",
    "optimal": "pm_llm.merges.optimal:Optimal",
}
REGISTRIES = {"start": STARTS, "constrain": CONSTRAINTS, "merge": MERGES}


@dataclass(frozen=True)
class Choice:
    """One of the three words with its options, e.g. `Choice("perturb", {"epsilon": 0.5})`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any, kind: str) -> Choice:
        """From YAML: a name, or a mapping with `name` and options. Raises PmLlmError on anything else."""
        if isinstance(value, Choice):
            choice = value
        elif isinstance(value, str):
            choice = cls(value)
        elif isinstance(value, dict) and isinstance(value.get("name"), str):
            choice = cls(value["name"], {k: v for k, v in value.items() if k != "name"})
        else:
            raise PmLlmError(
                f"{kind}: {value!r} is not a choice. Give a name ({', '.join(REGISTRIES[kind])}) "
                "or a mapping with `name` and its options."
            )
        if choice.name not in REGISTRIES[kind]:
            raise unknown_name(kind, choice.name, REGISTRIES[kind])
        return choice

    def factory(self, kind: str) -> Any:
        """The class behind it, a dataclass of its options."""
        module, _, attribute = REGISTRIES[kind][self.name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def build(self, kind: str) -> Any:
        """The object itself. Raises PmLlmError on an unknown option or a value out of range."""
        factory = self.factory(kind)
        allowed = {f.name for f in dataclasses.fields(factory) if f.init}
        hints, options = typing.get_type_hints(factory), {}
        for key, value in self.options.items():
            if key not in allowed:
                raise unknown_name(f"option of {kind} {self.name!r}:", key, allowed or {"(none)"})
            options[key] = convert(value, hints[key], f"{self.name}: {key}")
        return factory(**options)

    def plain(self) -> Any:
        """As YAML would hold it."""
        return {"name": self.name, **self.options} if self.options else self.name


@dataclass(frozen=True)
class Method:
    """`start`, `constrain` (any number, they compose) and `merge`, each a :class:`Choice`."""

    start: Choice = Choice("fresh")
    constrain: tuple[Choice, ...] = ()
    merge: Choice = Choice("replace")
    source: str = field(default="", compare=False)
    task_id: bool = field(default=False, compare=False)  # whether its result is used with the task known

    def replaced(self, start: Any = None, constrain: Any = None, merge: Any = None) -> Method:
        """The same with other words where they are given; `constrain: none` or `[]` means no constraint."""
        method = self
        if start is not None:
            method = dataclasses.replace(method, start=Choice.parse(start, "start"))
        if constrain is not None:
            items = [] if constrain == "none" else constrain if isinstance(constrain, (list, tuple)) else [constrain]
            method = dataclasses.replace(method, constrain=tuple(Choice.parse(i, "constrain") for i in items))
        if merge is not None:
            method = dataclasses.replace(method, merge=Choice.parse(merge, "merge"))
        return dataclasses.replace(method, task_id=self.task_id and method == self)

    def in_factors(self) -> Method:
        """The same in the space of the LoRA factors: the adapter continues, all else is of A and of B."""

        def moved(choice: Choice) -> Choice:
            if choice.name not in ("perturb", "optimal"):
                return choice
            return Choice(choice.name, {"space": "factors", **choice.options})

        return Method(Choice("continue"), tuple(moved(choice) for choice in self.constrain), moved(self.merge))

    def keeps_rows(self) -> bool:
        """Whether rows of past tasks are trained on again."""
        return any(choice.build("constrain").old_data for choice in self.constrain)

    def plain(self) -> dict[str, Any]:
        """As YAML would hold it."""
        return {
            "start": self.start.plain(),
            "constrain": [c.plain() for c in self.constrain],
            "merge": self.merge.plain(),
        }
