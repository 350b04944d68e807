"""What a run has at hand from stage to stage, and what may look on while it goes its way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import Tensor

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import RUNNING, TASK, remove, set_active
from pm_llm.config import RunConfig
from pm_llm.constraints.base import Constraint
from pm_llm.evaluation.answering import Generate, answer_task
from pm_llm.evaluation.engine import Engine
from pm_llm.evaluation.generate import generate
from pm_llm.evaluation.plan import Plan, is_general
from pm_llm.families.models import Base, load_base
from pm_llm.merges.base import Factors
from pm_llm.merges.merger import Merger
from pm_llm.methods import Method
from pm_llm.run.folder import RunDir
from pm_llm.sections import LoraSection
from pm_llm.starts.base import Start
from pm_llm.system.mapped import Zeros
from pm_llm.system.processes import Clock, on_main, process_state
from pm_llm.tasks.base import Task
from pm_llm.tasks.encoding import Encoder
from pm_llm.tasks.store import forget
from pm_llm.training.stopping import Stopping

if TYPE_CHECKING:
    from pm_llm.stage import Stage


class Watcher:
    """Looks on while a run goes its way; what it does not fill does nothing."""

    def loaded(self, session: Session) -> None:
        """The base model has been loaded; no adapter is in it yet."""

    @contextmanager
    def training(self, stage: Stage) -> Iterator[None]:
        """A context in which a task is trained."""
        yield

    def measured(self, stage: Stage) -> None:
        """A task is trained and measured, and not merged yet."""


@dataclass
class Session:
    """What a run has at hand from stage to stage.

    `running` is the merged adapter, `last` the one that was trained last (where the start needs it), `memories` what
    each constraint remembers, `rows` the digests of the `train` and `test` rows, `generate` what answers prompts.
    `modules` are the adapted ones by name, where what the run began with has more than the configuration names, and
    `folds` says for how many tasks that stands in the merge.
    """

    config: RunConfig
    method: Method
    run_dir: RunDir
    tasks: Sequence[Task]
    columns: dict[str, Task]
    encoders: dict[str, Encoder]
    rows: Mapping[str, Any]
    merger: Merger
    zeros: Zeros
    stopping: Stopping
    watchers: Sequence[Watcher] = ()
    running: Adapter | None = None
    last: Adapter | None = None
    memories: list[dict[str, Tensor]] = field(default_factory=list)
    generate: Generate = generate
    modules: list[str] | None = None
    folds: int = 0
    start: Start = field(init=False)
    base: Base = field(init=False)
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.method.start.build("start")
        self.load()

    def load(self) -> None:
        """The base model, anew."""
        self.base = load_base(
            self.config.model, self.config.dtype, self.config.load_in_4bit, self.config.attn_implementation
        )
        self.model = self.base.model
        for watcher in self.watchers:
            watcher.loaded(self)

    @property
    def past(self) -> Factors:
        """The running adapter by module; empty before the first task."""
        return {} if self.running is None else self.running.factors

    @property
    def lora(self) -> LoraSection:
        """The configuration of a task's adapter."""
        lora = self.config.lora
        return replace(lora, target_modules=self.modules, layers_to_transform=None) if self.modules else lora

    def prepare(self) -> None:
        """Put the next task's adapter into the model, as the start wants it."""
        self.model = self.start.prepare(self.model, self.running, self.lora, self.base.family, self.last)

    def begin_at(self, adapter: Adapter) -> None:
        """Let the first task begin at an adapter."""
        self.last = adapter if self.start.begins == "last" else None
        self.running = adapter
        if not isinstance(self.model, PeftModel):
            self.prepare()
        self.activate(adapter)

    def memory_tensors(self) -> dict[str, Tensor]:
        """What all constraints remember, by the number of each."""
        return {f"{i}.{key}": x.contiguous() for i, one in enumerate(self.memories) for key, x in one.items()}

    def activate(self, merged: Adapter) -> None:
        """Make an adapter the running one: alone active, and frozen."""
        self.running = merged
        merged.attach(self.model, RUNNING)
        remove(self.model, TASK)
        set_active(self.model, [RUNNING], trainable=None)

    def constraints(self) -> list[Constraint]:
        """The method's constraints with what they remember of past tasks."""
        constraints = [choice.build("constrain") for choice in self.method.constrain]
        for constraint, memory in zip(constraints, self.memories, strict=False):
            if memory:
                constraint.load_memory(memory)
        return constraints

    def _answering(self) -> Generate:
        """What answers prompts: the model here, or a server that is given the running adapter."""
        how, folder = self.config.evaluation, self.run_dir.path / "work" / "served"
        if how.engine == "transformers" or self.base.family.task_type != "CAUSAL_LM":
            return self.generate
        running = self.running
        if running is not None:
            on_main(lambda: running.save(folder))
        return Engine(how, self.config.model, None if running is None else folder)

    def evaluate(self, stage: int, scores: dict[str, Any]) -> None:
        """Score and commit what stage `stage` (from 0; -1: the untrained model) is to be scored on and is not yet."""
        names, keep = [task.name for task in self.tasks], self.config.keep_test_rows
        wanted = Plan.of(self.config.plain()).asked(names, list(self.columns), stage)
        answering = self._answering() if any(name not in scores for name in wanted) else self.generate
        for name in [name for name in wanted if name not in scores]:
            clock = Clock(process_state().device)
            found = answer_task(self.model, self.encoders[name], self.columns[name], self.config.evaluation, answering)
            clock.stop("evaluate")
            took, memory = clock.seconds["evaluate"], clock.peak_memory["evaluate"]
            score, lines = found.score(), found.lines() if keep or is_general(name) else None
            on_main(partial(self.run_dir.commit_score, stage, name, score, lines, took, memory))
            scores[name] = {"score": score}
        if not keep and stage >= 0:
            on_main(partial(self.run_dir.forget_rows, stage))
            forget(names[stage])
