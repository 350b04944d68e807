"""What a constraint is: the protocol, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from pm_llm.algebra.lowrank import LowRank
from pm_llm.families.base import Family, Row
from pm_llm.fisher.base import Fisher, Needs, Penalties
from pm_llm.methods import name_of_choice
from pm_llm.system.options import check_options

if TYPE_CHECKING:
    from pm_llm.fisher.rows import ChosenRows


# hooks that look at, or change, whole parameters, and of these the ones that do so with their gradients
UPDATE = ("before_pass", "before_update", "after_update")
WHOLE = ("around", *UPDATE)
ANEW = "it is about an adapter that begins anew"  # the usual reason


@dataclass(frozen=True)
class Step:
    """Where training stands: what a constraint may depend on, so that a resumed run repeats it exactly.

    `step` counts optimizer steps from 0, out of `steps`; `micro_step` counts the forward passes accumulated within it,
    out of `micro_steps`; `rank` is the data-parallel process out of `world_size`.
    """

    seed: int
    step: int
    micro_step: int = 0
    micro_steps: int = 1
    rank: int = 0
    world_size: int = 1
    steps: int = 0


@dataclass(frozen=True)
class Live:
    """The adapter that is being trained, in a live model.

    `layers` are its layers by module name, `adapter` its name in them; `total` adds a tensor up over all processes;
    `family` says what the model's rows are.
    """

    layers: Mapping[str, Any]
    adapter: str
    total: Callable[[Tensor], Tensor] = lambda x: x
    family: Family = field(default_factory=Family)

    def sides(self, name: str) -> tuple[nn.Module, nn.Module]:
        """A module's `lora_A` and `lora_B`."""
        layer = self.layers[name]
        return layer.lora_A[self.adapter], layer.lora_B[self.adapter]

    def weights(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A (rank, d_in) and B (d_out, rank) of a module; its update is :meth:`scaling` times B A."""
        a, b = self.sides(name)
        return a.weight, b.weight  # type: ignore[return-value]

    def scaling(self, name: str) -> float:
        """The LoRA scaling of a module."""
        found: float = self.layers[name].scaling[self.adapter]
        return found

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every module."""
        return [p for name in self.layers for p in self.weights(name)]

    def device(self) -> Any:
        """Where they are."""
        return self.parameters()[0].device


class Quadratics(Protocol):
    """What a merge tells of the past tasks' quadratics, if it keeps them (:class:`pm_llm.merges.base.Merge`)."""

    quadratic: bool

    def penalties(self, running: Mapping[str, LowRank]) -> Penalties:
        """Of all modules, what leaving `running` costs the past tasks."""


@dataclass(frozen=True)
class Context:
    """The task that a constraint is prepared for, or is to remember.

    `answer(rows, tasks, at_least)` lets the model, as it is, answer the prompts of encoded rows of the tasks of those
    numbers, and gives each row with its answer where that scores so much, else None.

    `task` is 1, 2, ...; `running` the merged adapter before it (empty before the first); `merge` the rule with what it
    remembers; `live` the adapter in the model `model`; `chosen` the rows that a curvature is measured on; `seed` the
    task's. After training: `new` is the adapter as it was trained, `fisher` what `needs` asks for.
    """

    task: int
    running: Mapping[str, LowRank] = field(default_factory=dict)
    merge: Quadratics | None = None
    live: Live | None = None
    model: Any = None
    chosen: ChosenRows | None = None
    rows: Sequence[Row] = field(default_factory=list)
    seed: int = 0
    new: Mapping[str, LowRank] = field(default_factory=dict)
    fisher: Fisher | None = None
    answer: Callable[[Sequence[Row], Sequence[int], float], list[Row | None]] | None = None


class Constraint:
    """The hooks a constraint can fill. The defaults constrain nothing.

    `space` is what :meth:`scale` scales: in `weights` the task adapter's update B A, in `factors` the way that A and
    that B have gone since training began. `from_zero` says whether it is about an update that begins at zero,
    `in_coordinates` whether it compares A and B with what they were after past tasks, `scales_update` whether
    :meth:`after_update` scales what the optimizer did, so that it comes before those that set values,
    `trains_weights` whether the base weights are trained in place of A and B, `fixes_a` whether A stays as it is while
    B is trained, `moves` whether it moves A by itself, or says where A may go. `anew` says why the task's adapter must
    be a new one (empty: it need not be), `in_factors_too` whether it need not where A and B themselves are merged.
    `needs_base` says whether it asks for the base model while it trains, so that the running adapter must not be added
    to that. `needs` says what :meth:`remember` is given, `inherits` the form of the Fisher for :meth:`inherit`
    (empty: as `needs`). `old_data` says whether rows of past tasks are kept, `stores` what is kept between tasks.
    """

    space = "weights"
    from_zero: ClassVar[bool] = False
    in_coordinates: ClassVar[bool] = False
    scales_update: ClassVar[bool] = False
    trains_weights: ClassVar[bool] = False
    fixes_a: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    anew: ClassVar[str] = ""
    in_factors_too: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs()
    inherits: ClassVar[str] = ""
    old_data: ClassVar[bool] = False
    stores: ClassVar[str] = ""
    prepared = False

    def __post_init__(self) -> None:
        check_options(self, f"{name_of_choice(self)}: ")

    @property
    def by_itself(self) -> bool:
        """Whether it works in a Trainer that is used alone, where nobody calls :meth:`prepare`."""
        return not self.fills("begin", "rows", "steps")

    # ---- around a task ----
    def rows(self, rows: Sequence[Row], context: Context) -> Sequence[Row]:
        """What is trained on, from the task's own rows."""
        return rows

    def steps(self, steps: int, context: Context) -> int:
        """How many optimizer steps are trained where the configuration says `steps`."""
        return steps

    def prepare(self, context: Context) -> None:
        """Make ready for a task, which is to be trained next; not a hook itself, see :meth:`begin`."""
        self.begin(context)
        self.prepared = True

    def begin(self, context: Context) -> None:
        """Before a task is trained."""

    def finish(self, context: Context) -> dict[str, float]:
        """Right after training: leave what was learned in A and B. Returns numbers for the stage's record."""
        return {}

    def remember(self, context: Context) -> None:
        """After a task was trained, before it is merged."""

    def inherit(self, context: Context) -> None:
        """Remember what was learned elsewhere, before the first task; `needs` may ask otherwise for that, see
        `inherits`."""
        self.remember(context)

    def memory(self) -> dict[str, Tensor]:
        """What :meth:`remember` has gathered, to go on from."""
        return {}

    def load_memory(self, memory: dict[str, Tensor]) -> None:
        """The inverse of :meth:`memory`."""

    def remembers(self, n: int, m: int, r: int) -> int:
        """How many numbers :meth:`memory` has of an (n, m) matrix with an adapter of rank r, at most."""
        return 0

    # ---- around a forward and backward pass ----
    def scale(self, step: Step) -> float:
        """The factor on the task adapter during this forward and backward pass."""
        return 1.0

    def before_pass(self, step: Step, live: Live, gradient: Callable[[], list[Tensor]]) -> None:
        """Before the pass; `gradient()` is that of its loss, for each of `live.parameters()`, the processes' mean."""

    def around(self, step: Step, live: Live, batch: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """A context in which the pass over `batch` (the model's inputs) is made."""
        return nullcontext()

    def penalty(self, live: Mapping[str, LowRank]) -> Tensor | None:
        """What to add to the loss of an optimizer step (0-dim), from each module's live (s B, A); None: nothing."""
        return None

    def loss(
        self, step: Step, live: Live, inputs: Mapping[str, Any], outputs: Tensor, reference: Callable[[str], Tensor]
    ) -> Tensor | None:
        """What to add to the loss at each answer token of a pass, shape (tokens,), in nats; None: nothing.

        It becomes part of the step's mean over answer tokens, as the loss is. `inputs` are the model's inputs with
        `labels`; `outputs` the logits (tokens, vocabulary) at the positions that say the answers' tokens, in the order
        of the rows; `reference("before")` gives the same of the network with the task adapter off, `reference("base")`
        with all adapters off, in evaluation mode and without gradient, by a forward pass of its own.
        """
        return None

    def observe(self, step: Step, loss: Tensor) -> None:
        """Take note of the loss (0-dim tensor, mean over answer tokens) of the pass that has just run."""

    # ---- around an optimizer step ----
    def before_update(self, step: Step, live: Live) -> None:
        """The step's gradients are there, in `grad`, before they are clipped."""

    def after_update(self, step: Step, live: Live) -> None:
        """The optimizer has moved the parameters."""

    # ---- what is kept while training ----
    def state_dict(self) -> dict[str, list[Tensor]]:
        """This process's sums; they are added over all processes before :meth:`logs` reads them."""
        return {}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """The inverse of :meth:`state_dict`, when training goes on from a checkpoint."""

    def logs(self, state: dict[str, list[float]]) -> dict[str, float]:
        """What to add to the Trainer's log line, from :meth:`state_dict` summed over processes."""
        return {}

    @classmethod
    def acts(cls) -> bool:
        """Whether it does anything to the adapter, or the loss, while a task is trained."""
        return cls.fills("scale", "penalty", "loss", *WHOLE)

    @classmethod
    def fills(cls, *hooks: str) -> bool:
        """Whether it does anything in one of these hooks."""
        return any(getattr(cls, hook) is not getattr(Constraint, hook) for hook in hooks)
