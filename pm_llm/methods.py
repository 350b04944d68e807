"""A method is three choices: how the adapter starts, what constrains training, how the result is merged.

The registry holds dotted names, so that reading it imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

from pm_llm.errors import PmLlmError, first_line, unknown_name
from pm_llm.system.coerce import convert

if TYPE_CHECKING:
    from pm_llm.constraints.base import Constraint
    from pm_llm.merges.base import Merge
    from pm_llm.starts.base import Start

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
    "anchor": "pm_llm.constraints.anchor:Anchor",
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
GROUPS = {"start": "pm_llm.starts", "constrain": "pm_llm.constraints", "merge": "pm_llm.merges"}


def found(group: str) -> Iterator[importlib.metadata.EntryPoint]:
    """The entry points of that group in the packages that are installed; nothing of them is imported."""
    yield from importlib.metadata.entry_points(group=group)


for _kind, _group in GROUPS.items():
    for _one in found(_group):  # the project's own names stay its own; of several packages the first has it
        REGISTRIES[_kind].setdefault(_one.name, _one.value)


def name_of_choice(one: Any) -> str:
    """What the configuration calls a start, constraint or merge."""
    place = f"{type(one).__module__}:{type(one).__name__}"
    names = (name for registry in REGISTRIES.values() for name, where in registry.items() if where == place)
    return next(names, type(one).__name__)


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
        """The class behind it, a dataclass of its options. Raises PmLlmError if its package cannot be loaded."""
        place = REGISTRIES[kind][self.name]
        module, _, attribute = place.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise PmLlmError(f"{kind} {self.name!r} cannot be loaded from {place}: {first_line(error)}.") from error

    @overload
    def build(self, kind: Literal["start"]) -> Start: ...
    @overload
    def build(self, kind: Literal["constrain"]) -> Constraint: ...
    @overload
    def build(self, kind: Literal["merge"]) -> Merge: ...
    @overload
    def build(self, kind: str) -> Any: ...
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

    def parts(self) -> Parts:
        """The three words' objects. Raises PmLlmError on an option that is unknown or out of range, or one
        constraint named twice."""
        constraints = {choice.name: choice.build("constrain") for choice in self.constrain}
        if len(constraints) < len(self.constrain):
            names = ", ".join(choice.name for choice in self.constrain)
            raise PmLlmError(f"constrain names one twice: {names}. Leave one out.")
        return Parts(self, self.start.build("start"), constraints, self.merge.build("merge"))

    def check(self, setting: Setting | None = None) -> None:
        """Raise PmLlmError unless its words go together, and with the rest of a run."""
        parts = self.parts()
        for broken, message in rules(parts, setting or Setting()):
            if broken:
                raise PmLlmError(message)
        parts.merge.ready()

    def says(self, key: str, value: Any = True) -> bool:
        """Whether a constraint says this of itself: `old_data` (rows of past tasks are kept), `needs_base` ..."""
        return any(getattr(choice.build("constrain"), key, None) == value for choice in self.constrain)

    def plain(self) -> dict[str, Any]:
        """As YAML would hold it."""
        return {
            "start": self.start.plain(),
            "constrain": [c.plain() for c in self.constrain],
            "merge": self.merge.plain(),
        }


@dataclass(frozen=True)
class Parts:
    """A method with its words' objects; `constraints` by name."""

    method: Method
    start: Start
    constraints: dict[str, Constraint]
    merge: Merge


@dataclass(frozen=True)
class Setting:
    """What else of a run decides whether a method means something in it.

    `rank` is the largest of a task's adapter, `max_rank` what the running one is cut to; `own_start` the start before
    `space: factors` made it one that continues, `start_given` whether that was asked for by name. `adapter` and
    `general` say whether the run begins with an adapter made elsewhere, and with the base's own abilities as a past
    task; `kinds` are those of the tasks' rows, where they are known (:data:`pm_llm.families.base.KINDS`).
    """

    rank: int = 1
    max_rank: int | None = None
    load_in_4bit: bool = False
    truncation: str = "plain"
    space: str = "weights"
    own_start: Choice | None = None
    start_given: bool = False
    adapter: bool = False
    general: bool = False
    retain: bool = False
    kinds: frozenset[str] = frozenset()


def rules(parts: Parts, setting: Setting) -> Iterator[tuple[bool, str]]:
    """What does not go together: whether it is so here, and what to say of it. Nothing else decides that."""
    start, merge, merged = parts.start, parts.merge, f"merge {parts.method.merge.name}"
    yield from _rules_of_space(parts, setting)
    yield (
        merge.in_factors and (start.stands_on == "running" or start.begins == "base"),
        f"{merged} needs a start that continues: it compares A and B with what they were. The start is "
        f"{start.name()!r}.",
    )
    yield (
        merge.in_factors and merge.needs.fisher is not None and not start.keeps_coordinates,
        f"{merged} weights A and B entry by entry: it needs a start that keeps A and B as they were (continue or "
        f"last). The start is {start.name()!r}.",
    )
    yield (
        merge.needs.losses and start.begins != "merged",
        f"{parts.method.merge.name}: fisher_scale measured needs a start at the merged model: it measures what the "
        f"task vector gained there. The start is {start.name()!r}.",
    )
    yield (
        merge.brings and start.begins == "last",
        f"{merged} needs a start at the merged or the base model, not at the last adapter as it was trained, which "
        f"lacks the vector. The start is {start.name()!r}.",
    )
    yield (
        setting.truncation == "fisher" and not merge.weighs,
        "truncation fisher needs merge optimal in the space of the weights. Set it to plain.",
    )
    yield (
        start.offset and setting.load_in_4bit,
        "start subspace needs base weights that are not in 4 bits, but for init eva. Use that.",
    )
    yield from _rules_of_beginning(parts, setting)
    yield from _rules_of_rows(parts, setting)
    for name in parts.constraints:
        yield from _rules_of_constraint(name, parts)
    yield from _rules_of_several(parts, setting)


def _rules_of_space(parts: Parts, setting: Setting) -> Iterator[tuple[bool, str]]:
    own, factors = setting.own_start or parts.method.start, setting.space == "factors"
    yield (
        factors and own != parts.method.start and (setting.start_given or own.name != "fresh"),
        f"space factors needs start continue; start is {own.plain()!r}. Give --start continue.",
    )
    yield (
        factors and not parts.merge.in_factors,
        "space factors needs merge optimal, or another merge of the factors themselves.",
    )


def _rules_of_beginning(parts: Parts, setting: Setting) -> Iterator[tuple[bool, str]]:
    """Those of what a run begins with."""
    merge, begun = parts.merge, setting.adapter or setting.general
    word = "adapter" if setting.adapter else "general"
    inherits = [name for name, one in parts.constraints.items() if one.fills("remember") and not one.old_data]
    based = [name for name, one in parts.constraints.items() if one.needs_base]
    yield setting.adapter and bool(based), "the base is no anchor for an adapter that is to be kept: anchor to before."
    yield (
        begun and parts.start.begins == "base",
        f"{word} is what a run begins with, and start {parts.start.name()!r} leaves that out. Use another start.",
    )
    yield (
        begun and bool(merge.stores) and not merge.quadratic,
        f"{word} does not go with merge {parts.method.merge.name}: it is of all adapters as they were trained here "
        "(it keeps " + merge.stores + "). Use merge optimal, sum, average or replace.",
    )
    yield (
        setting.general and not merge.quadratic and not inherits,
        "general is a past task's curvature, and this method has no use for one. Use merge optimal, or constrain "
        "curvature, ewc, null_space or gradient_subspace.",
    )
    yield (
        setting.general and getattr(merge, "fisher_scale", "") == "own",
        "general has no task vector for fisher_scale own to measure by. Use raw, trace or measured.",
    )


def _rules_of_rows(parts: Parts, setting: Setting) -> Iterator[tuple[bool, str]]:
    """Those of the kinds of rows."""
    pairs = "preference" in setting.kinds
    yield pairs and setting.retain, "retain does not go with preference pairs, which have a Trainer of their own."
    for name, one in parts.constraints.items():
        yield (
            pairs and one.fills("loss"),
            f"constrain {name} adds to the loss of each answer token, which preference pairs do not have. Leave it "
            "out, or train the pairs in a run of their own.",
        )
        yield (
            bool(setting.kinds - {"prompt"}) and getattr(one, "answers", "given") == "own",
            f"constrain {name} with answers of its own asks prompts, which raw text and preference pairs do not have. "
            "Use answers given.",
        )
        yield (
            pairs and one.old_data and len(setting.kinds) > 1,
            f"constrain {name} trains rows of all tasks together, and preference pairs have a Trainer of their own. "
            "Give tasks of pairs alone, or none.",
        )


def _rules_of_constraint(name: str, parts: Parts) -> Iterator[tuple[bool, str]]:
    """Those of one constraint with the start and the merge."""
    one, start, merge = parts.constraints[name], parts.start, parts.merge
    yield (
        one.needs.quadratic and not merge.quadratic,
        f"constrain {name} needs merge optimal, which keeps the past tasks' quadratics.",
    )
    yield (
        one.fills("scale") and (one.space == "factors") != merge.in_factors,
        f"constrain {name} and the merge must be in one space: give both `space: factors`, or neither.",
    )
    yield (
        bool(one.anew) and not start.anew and not (one.in_factors_too and merge.in_factors),
        f"constrain {name} needs a start that is fresh: {one.anew}. The start is {start.name()!r}.",
    )
    yield (
        one.needs.quadratic and start.begins == "base",
        f"constrain {name} is about changes of what was learned before, and start {start.name()!r} leaves that out. "
        "Use start fresh.",
    )
    yield (
        start.offset and one.from_zero,
        f"constrain {name} is about an adapter that begins at zero; with start {start.name()} it does not. Use "
        "another start, or init eva.",
    )
    yield (
        one.in_coordinates
        and not (start.keeps_coordinates and (merge.in_factors or parts.method.merge.name == "replace")),
        f"constrain {name} compares A and B with what they were: it needs a start that continues (continue or last) "
        f"and a merge of the factors, or replace; not {parts.method.start.name} and {parts.method.merge.name}.",
    )


def _rules_of_several(parts: Parts, setting: Setting) -> Iterator[tuple[bool, str]]:
    """Those of constraints with each other, and with ranks and bits."""
    named = parts.constraints.items()
    yield (
        (parts.merge.in_factors or any(one.in_coordinates for _, one in named))
        and setting.max_rank is not None
        and setting.max_rank < setting.rank,
        f"max_rank is {setting.max_rank}, below the adapter's rank {setting.rank}: truncation would change the "
        "factors that are merged or compared. Set max_rank to none.",
    )
    fixed, moving = [n for n, one in named if one.fixes_a], [n for n, one in named if one.moves]
    if fixed and moving:
        yield True, f"constrain {fixed[0]} leaves A as it is, and {moving[0]} moves it. Leave one out."
    whole = [name for name, one in named if one.trains_weights]
    others = [name for name, one in named if name not in whole and one.acts()]
    if whole and others:
        yield True, f"constrain {whole[0]} trains no adapter, and {', '.join(others)} acts on one. Leave one out."
    if whole and setting.load_in_4bit:
        yield (
            True,
            f"constrain {whole[0]} trains the base weights, which cannot be in 4 bits. Unset load_in_4bit.",
        )
