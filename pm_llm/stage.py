"""One task's way: start, prepare, train, measure, merge, commit, evaluate.

A run goes it for every task. It is gone again without training where a finished task's curvature has to be remembered
once more (:meth:`Stage.replay`), and on whole models after training where that shared the model out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import save_file
from transformers import set_seed

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.in_base import folded
from pm_llm.adapters.live import TASK, lora_layers, set_active
from pm_llm.constraints.base import Constraint, Context, Live
from pm_llm.evaluation.shift import divergence, norm
from pm_llm.families.base import Row
from pm_llm.families.packing import blocks, check_packing, packed
from pm_llm.families.rows import joined, table_of
from pm_llm.fisher.base import Fisher
from pm_llm.fisher.probe import Probe
from pm_llm.fisher.rows import ChosenRows
from pm_llm.merges.base import Fold, Trained
from pm_llm.merges.merger import Merger
from pm_llm.run.going_on import stage_key
from pm_llm.run.kept import write_kept
from pm_llm.run.reading import ADAPTER, LOG, MEMORY, TASK_ADAPTER
from pm_llm.run.record import StageRecord
from pm_llm.run.results import stage_line, stage_record
from pm_llm.session import Session
from pm_llm.system.files import jsonl
from pm_llm.system.mapped import mapped_files
from pm_llm.system.processes import Clock, on_main, process_state, total
from pm_llm.system.progress import say
from pm_llm.system.sharding import is_sharded
from pm_llm.tasks.fitting import encoded
from pm_llm.training.checkpoints import Checkpoints
from pm_llm.training.one_task import train
from pm_llm.training.own_answers import own_answers
from pm_llm.training.rehearsal import rehearse


class Stage:
    """The way of one task.

    Args:
        session: What the run has at hand; its running adapter is the next one when the way is gone.
        number: Of the task, from 1.
    """

    def __init__(self, session: Session, number: int) -> None:
        self.session, self.number, self.task = session, number, session.tasks[number - 1]
        self.seed = session.config.seed_of(number)
        self.began_at = time.monotonic()
        self.clock = Clock(process_state().device)
        self.family = session.encoders[self.task.name].family
        self.rows: Sequence[Row] = []
        self.chosen: ChosenRows
        self.began: Adapter | None = None  # the first task's adapter as it began
        self.constraints: list[Constraint] = []
        self.loss_before: float | None = None
        self.logs: list[dict[str, Any]] = []
        self.reports: dict[str, float] = {}
        self.new: Adapter  # as it was trained
        self.fisher: Fisher | None = None
        self.merged: Adapter
        self.shift: dict[str, float | None] = {}  # how far the merged model is from its base
        self.drawn: ChosenRows | None = None  # the chosen rows with answers of the trained model

    def run(self) -> StageRecord:
        """Train the task, merge it, commit and score it; returns the stage's record."""
        self.start()
        if self.number == 1:
            rehearse(self.session, self.rows, self.family, self.constraints)
        self.session.start.look(self.session.model, self.chosen)
        with self._folded():
            self.prepare()
            self.train()
            self.measure()
        self.clock.stop("prepare")
        self.merge()
        self._measure_shift()
        record = self.commit()
        self.session.evaluate(self.number - 1, record.scores)
        say(stage_line(record, self.number, len(self.session.tasks), time.monotonic() - self.began_at))
        return record

    def replay(self, new: Adapter) -> None:
        """Go the way of a finished task again, with its adapter in place of training: its Fisher and its fold."""
        self.start()
        self.new = new
        with self._folded():
            self._measure_before()
            self._put_back()
            self.fisher = self._fisher()
        self.merge()

    # ---- the steps ----
    def start(self) -> None:
        """The task's adapter in the model, at its beginning."""
        set_seed(self.seed)
        self.session.prepare()
        if self.session.running is None:
            self.began = Adapter.from_model(self.session.model, TASK)
        self.constraints = self.session.constraints()
        self._encode()

    def prepare(self) -> None:
        """Constraints are told their task; what the merge must know from before training is measured."""
        self._context = self._new_context()
        for constraint in self.constraints:
            constraint.prepare(self._context)
        self.clock.stop("prepare")
        self._measure_before()
        self.clock.stop("fisher")

    def train(self) -> None:
        """Training, and the trained adapter as what it changes in the model it began at."""
        with ExitStack() as stack:
            for watcher in self.session.watchers:
                stack.enter_context(watcher.training(self))
            self._train()
        session = self.session
        self.new = session.start.as_update(Adapter.from_model(session.model, TASK))
        if is_sharded(session.model):  # what follows runs on whole models, each process with its share of the rows
            session.load()
            session.prepare()
            self._put_back()

    def _train(self) -> None:
        session, context = self.session, self._context
        key = stage_key(
            session.config, self.number, session.rows["train"][self.number - 1], process_state().num_processes
        )
        checkpoints = Checkpoints(session.run_dir.work(self.number, self.task.name), key)
        rows, steps = context.rows, session.config.train.max_steps
        for constraint in self.constraints:
            rows, steps = constraint.rows(rows, context), constraint.steps(steps, context)
        self.logs = train(
            session.model,
            session.base.tokenizer,
            self.family,
            session.config,
            self._blocks(rows),
            steps,
            label=self.task.name,
            seed=self.seed,
            constraints=self.constraints,
            checkpoints=checkpoints,
            stopping=session.stopping,
        )
        for constraint in self.constraints:
            self.reports |= constraint.finish(context)
        self.clock.stop("train")
        self.clock.seconds["train"] = checkpoints.elapsed()  # in all processes that had a part in it

    def measure(self) -> None:
        """The Fisher, and what constraints remember of the task."""
        self.fisher = self._fisher()
        for watcher in self.session.watchers:
            watcher.measured(self)
        context = replace(self._new_context(), new=self.new.factors)
        wanted = [one.needs.form(self.session.config.fisher.form) for one in self.constraints]
        found = {
            form: self._measured_on(self.chosen).fisher(self.session.model, form, zeros=self.session.zeros)
            for form in dict.fromkeys(wanted)
            if form is not None
        }
        for constraint, form in zip(self.constraints, wanted, strict=True):
            constraint.remember(replace(context, fisher=found.get(form or "")))
        self.session.memories = [constraint.memory() for constraint in self.constraints]
        self.clock.stop("fisher")

    def merge(self) -> None:
        """The trained adapter joins the running one, which is then alone in the model."""
        session = self.session
        probe = Probe(session.model, TASK, self.new, self.chosen)
        self.merged = session.merger.fold(session.running, self.new, self.fisher, replace(self.trained(), probe=probe))
        session.activate(self.merged)
        session.last = self.new if session.start.begins == "last" else None
        self.clock.stop("merge")

    def commit(self) -> StageRecord:
        """The stage becomes part of the run."""
        session, record = self.session, stage_record(self)

        def fill(folder: Path) -> None:
            self.merged.save(folder / ADAPTER)
            self.new.save(folder / TASK_ADAPTER)
            (folder / LOG).write_bytes(jsonl(self.logs))
            answer = session.encoders[self.task.name].max_new_tokens
            rows = session.rows
            write_kept(folder, self.task, answer, rows["train"][self.number - 1], rows["test"][self.task.name])
            memory = session.memory_tensors()
            if memory:
                save_file(memory, folder / MEMORY)

        on_main(lambda: session.run_dir.commit_stage(self.number, record, fill, session.merger.state_dict()))
        return record

    # ---- what the steps stand on ----
    def trained(self) -> Trained:
        """How the task's adapter was trained, for the merge."""
        start, began = self.session.start, self.began
        return Trained(start.stands_on, start.begins, began.factors if began is not None else {})

    def measured_as(self, merger: Merger, chosen: ChosenRows) -> Fisher | None:
        """The task's Fisher as a merger needs it, if it needs one, on some of the task's rows."""
        rule, direction, session = merger.rule, None, self.session
        form = rule.needs.form(session.config.fisher.form)
        if form is None:
            return None
        if rule.needs.direction:
            fold = Fold(merger.tasks + 1, session.past, self.new.factors, trained=self.trained())
            direction = rule.direction(fold)
        rows = self._measured_on(chosen)
        found = rows.fisher(session.model, form, direction, self.loss_before, session.zeros)
        if rows is chosen or self.loss_before is None:
            return found
        own = chosen.fisher(session.model, "factored", direction, self.loss_before)  # the loss is that of the task
        return replace(found, losses=own.losses, slopes=own.slopes)

    def _measured_on(self, chosen: ChosenRows) -> ChosenRows:
        """The rows as they are, or with answers drawn from the model (`fisher.labels: sampled`)."""
        session, config = self.session, self.session.config
        if config.fisher.labels == "given":
            return chosen
        if self.drawn is None or chosen is not self.chosen:
            encoder = replace(session.encoders[self.task.name], max_new_tokens=config.fisher.max_new_tokens)
            rows = self.family.draw(session.model, encoder, chosen.rows, self.seed, config.evaluation)
            self.drawn = chosen.answered(rows)
        return self.drawn

    def _fisher(self) -> Fisher | None:
        return self.measured_as(self.session.merger, self.chosen)

    def _measure_before(self) -> None:
        if self.session.merger.rule.needs.losses:
            self.loss_before = self.chosen.loss(self.session.model)

    def _measure_shift(self) -> None:
        self.shift = {
            "kl_from_base": divergence(self.session.model, self.chosen),
            "update_norm": norm(self.new.factors),
            "adapter_norm": norm(self.merged.factors),
        }
        self.clock.stop("evaluate")

    def _put_back(self) -> None:
        """The model, prepared for the task, as it was right after that was trained."""
        model = self.session.model
        active = list(model.active_adapters)
        self.session.start.as_live(self.new).attach(model, TASK)
        set_active(model, active, trainable=TASK)

    def _folded(self) -> Any:
        """The running adapter in the base weights, where that can be."""
        config = self.session.config
        never = "deepspeed" in config.train.extra or any(one.needs_base for one in self.constraints)
        room = mapped_files(self.session.run_dir.path / "work" / "folded")
        return folded(self.session.model, "never" if never else config.fold_running, room)

    def _new_context(self) -> Context:
        session = self.session
        return Context(
            session.folds + self.number,
            session.past,
            session.merger.rule,
            Live(lora_layers(session.model), TASK, total, self.family),
            session.model,
            self.chosen,
            self.rows,
            seed=self.seed,
            answer=partial(own_answers, session, self.seed),
        )

    def _blocks(self, rows: Sequence[Row]) -> Dataset:
        """What the Trainer reads: rows, several in one with `train.packing`."""
        session, found = self.session, table_of(rows)
        if not session.config.train.packing or self.family.packs:
            return found
        check_packing(session.model, self.family)
        return packed(found, session.config.max_length)

    def _encode(self) -> None:
        """The rows, with what their loss must know of the model as it begins; and those that curvature is measured
        on."""
        session, encoders = self.session, self.session.encoders
        own = encoded(encoders[self.task.name], self.task.train, self.task.name)
        own = joined(own, [row for name, foreign in self.task.foreign for row in encoders[name].features(foreign)])
        rows = blocks(own, session.config.max_length, session.model) if self.family.packs else own
        tokenizer, size = session.base.tokenizer, session.config.evaluation.batch_size
        self.rows = self.family.referenced(session.model, tokenizer, rows, size)
        self.chosen = ChosenRows(self.task.name, self.rows, session.config.fisher, self.seed, tokenizer, self.family)
