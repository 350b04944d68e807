"""The loop over tasks: start, train, Fisher, merge, commit, evaluate, commit."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import set_seed

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.in_base import folded
from pm_llm.adapters.live import lora_layers, remove, set_active
from pm_llm.config import FisherSection, RunConfig
from pm_llm.constraints.base import Constraint, Context, Live
from pm_llm.errors import PmLlmError, first_line
from pm_llm.evaluation.answering import answer_task
from pm_llm.evaluation.matrix import UNTRAINED, Matrix, asked_for
from pm_llm.families.models import load_base
from pm_llm.fisher.base import Fisher
from pm_llm.fisher.probe import Probe
from pm_llm.fisher.rows import ChosenRows
from pm_llm.merges.base import Fold
from pm_llm.merges.merger import Merger
from pm_llm.run.folder import ADAPTER, LOG, MEMORY, TASK_ADAPTER, RunDir, jsonl
from pm_llm.run.going_on import stage_key, take_up
from pm_llm.run.record import gather_results
from pm_llm.starts.base import RUNNING, TASK
from pm_llm.system.mapped import Zeros, mapped_files
from pm_llm.system.processes import Clock, process_state, total
from pm_llm.system.progress import bar, say
from pm_llm.system.sharding import is_sharded, launched
from pm_llm.tasks.base import Task, checked, distinct
from pm_llm.tasks.encoding import Encoder, encoders_for
from pm_llm.tasks.loading import load_tasks, scored
from pm_llm.training.checkpoints import Checkpoints
from pm_llm.training.one_task import train
from pm_llm.training.stopping import Stopping
from pm_llm.training.trainers import refuse_sharding

VERSIONS = ("pm_llm", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


class ContinualSequence:
    """Fine-tunes one model on a sequence of tasks; a run that was stopped goes on where it was.

    Args:
        config: The run's configuration.
        tasks: The tasks in order, taken as they are: the keys that choose rows (`max_train_samples`, `repeat`,
            `evaluation.split` ...) act in :func:`load_tasks`. By default what that gives.
        restart_from: Redo from this task on (its name, or its number in the sequence); what comes before is kept.
    """

    def __init__(self, config: RunConfig, tasks: list[Task] | None = None, restart_from: str | None = None) -> None:
        self.config = config.check()
        self.restart_from = restart_from
        self.tasks = load_tasks(config) if tasks is None else checked(tasks)  # a stage each; a task may recur
        self.distinct = distinct(self.tasks)
        self.columns = scored(config, self.tasks)
        if config.fuar:
            Matrix(list(self.columns), stages=[task.name for task in self.tasks]).check_fuar(**config.fuar)
        self.method = config.parsed_method()
        self.start = self.method.start.build("start")
        self.last: Adapter | None = None  # as it was last trained
        self.memories: list[dict[str, Tensor]] = []  # what each constraint remembers
        self.state = process_state()
        self.run_dir = RunDir(config.output_dir)
        self.stopping = Stopping()
        on_disk = config.fisher.storage == "disk"
        self.zeros: Zeros = mapped_files(self.run_dir.path / "work" / "sums") if on_disk else torch.zeros

    def run(self) -> dict[str, Any]:
        """Train everything that is not done yet and return the results (as in `results.json`).

        Raises:
            PmLlmError: If the run cannot begin or go on; what is committed stays as it is.
            Stopped: After SIGTERM or SIGINT.
        """
        if self.state.num_processes == 1 and self.state.device.type == "cuda" and torch.cuda.device_count() > 1:
            raise PmLlmError(
                "several GPUs are visible to one process. Use `accelerate launch recipes/continual.py`, "
                "or show it one with CUDA_VISIBLE_DEVICES."
            )
        refuse_sharding(self._constraints(), *launched())
        self.encoders, fitting = encoders_for(self.config, self.columns.values())
        self.tasks = [fitting(task) for task in self.tasks]
        self.columns = {name: fitting(task) for name, task in self.columns.items()}
        with self.stopping, ExitStack() as stack:
            self._on_main(lambda: stack.enter_context(self.run_dir.locked()) and None)
            lengths = {name: encoder.max_new_tokens for name, encoder in self.encoders.items()}
            self._on_main(
                lambda: take_up(self.run_dir, self.config, self.tasks, self.columns, lengths, self.restart_from)
            )
            run = self._on_main(self.run_dir.state)
            self.stages: list[dict[str, Any]] = run["stages"]
            self.rows = run["rows"]["train"]
            self._load()
            if self.config.evaluate == "all" and not self.stages:
                self._evaluate(UNTRAINED, run["untrained"] or {})
            merger, running = self._go_on()
            with bar(len(self.tasks), self.config.method, "task") as progress:
                progress.update(len(self.stages))
                for number, task in enumerate(self.tasks[len(self.stages) :], start=len(self.stages) + 1):
                    running = self._stage(number, task, merger, running)
                    progress.update(1)
            return self._on_main(self._finish)

    def _load(self) -> None:
        self.base = load_base(self.config.model, self.config.dtype, self.config.load_in_4bit)
        self.model: Any = self.base.model

    def _prepare(self, running: Adapter | None) -> None:
        self.model = self.start.prepare(self.model, running, self.config.lora, self.base.seq2seq, self.last)

    # ---- one task ----
    def _stage(self, number: int, task: Task, merger: Merger, running: Adapter | None) -> Adapter:
        started = time.monotonic()
        set_seed(self.config.seed_of(number))
        clock = Clock(self.state.device)
        self._prepare(running)
        rows = self._features(task)
        began = Adapter.from_model(self.model, TASK) if running is None else None
        chosen = self._chosen(number, task, rows)
        constraints = self._constraints()
        if number == 1:
            self._rehearse(merger, rows, constraints)
        self.start.look(self.model, chosen)
        with self._folded():
            context = self._context(number, merger, running, chosen, rows)
            for constraint in constraints:
                constraint.prepare(context)
            clock.stop("prepare")
            loss_before = chosen.loss(self.model) if merger.rule.needs_losses else None
            clock.stop("fisher")
            logs, seconds = self._train(number, task, context, constraints)
            reports = {key: x for constraint in constraints for key, x in constraint.finish(context).items()}
            clock.stop("train")
            new = self.start.as_update(Adapter.from_model(self.model, TASK))
            if is_sharded(self.model):  # what follows runs on whole models, each process with its share of the rows
                self._load()
                self._prepare(running)
                self._as_trained(new)
            fisher = self._fisher(merger, chosen, running, new, loss_before, began)
            context = replace(self._context(number, merger, running, chosen, rows), new=new.factors)
            measured = {
                form: chosen.fisher(self.model, form, zeros=self.zeros)
                for form in {c.needs_fisher for c in constraints if c.needs_fisher}
            }
            for constraint in constraints:
                constraint.remember(replace(context, fisher=measured.get(constraint.needs_fisher or "")))
            self.memories = [constraint.memory() for constraint in constraints]
            clock.stop("fisher")
        clock.stop("prepare")
        probe, on_base = Probe(self.model, TASK, new, chosen), self.start.on_base
        merged = merger.fold(running, new, fisher, self.start.continues, start=began, probe=probe, on_base=on_base)
        self._activate(merged)
        self.last = new if self.start.needs_last else None
        clock.stop("merge")
        report = merger.report
        entry = {
            "task": task.name,
            "seed": self.config.seed_of(number),
            "config": {key: value for key, value in self.config.plain().items() if key != "output_dir"},
            "words": self.method.plain(),
            "versions": _versions(),
            "processes": self.state.num_processes,
            "coefficient": report.coefficient,
            "raw_coefficient": report.raw_coefficient,
            "clipped": report.clipped,
            "coefficients": report.coefficients,
            "raw_coefficients": report.raw_coefficients,
            "truncation_error": report.truncation_error,
            "rank": report.rank,
            "curvature": next((log["curvature"] for log in reversed(logs) if "curvature" in log), None),
            "curvature_errors": report.curvature_errors,
            "constraint_reports": reports,
            "losses": fisher.losses if fisher is not None else None,
            "exact_curvature": fisher.exact if fisher is not None else None,
            "seconds": {**clock.seconds, "train": seconds, "evaluate": 0.0},
            "peak_memory_bytes": clock.peak_memory,
            "scores": {},
        }

        def fill(folder: Any) -> None:
            merged.save(folder / ADAPTER)
            new.save(folder / TASK_ADAPTER)
            (folder / LOG).write_bytes(jsonl(logs))
            memory = {f"{i}.{key}": x.contiguous() for i, one in enumerate(self.memories) for key, x in one.items()}
            if memory:
                save_file(memory, folder / MEMORY)

        self._on_main(lambda: self.run_dir.commit_stage(number, entry, fill, merger.state()))
        self.stages.append(entry)
        self._evaluate(number - 1, entry["scores"])
        say(_stage_line(number, len(self.tasks), entry, time.monotonic() - started))
        return merged

    def _rehearse(self, merger: Merger, rows: list[dict[str, Any]], constraints: list[Constraint]) -> None:
        """What comes after training, on a row each before it: models that cannot be measured or scored are known then.

        Raises:
            PmLlmError: If something fails.
        """
        longest = max(rows, key=lambda row: len(row["input_ids"]))
        fishers = FisherSection(samples=1, batch_size=1)
        what = "trained on its longest row"
        try:
            with torch.random.fork_rng(devices=[]):
                one = ChosenRows("rehearsal", [longest] * self.state.num_processes, fishers, 0, self.base.tokenizer)
                one.loss(self.model)
                if merger.rule.needs_fisher or any(c.needs_fisher for c in constraints):
                    what = "measured (its Fisher)"
                    one.fisher(self.model, "factored")
                what = "scored"
                for task, encoder in self._one_of_each_kind():
                    row = max(task.test, key=lambda row: len(encoder.prompt(row)))
                    first = encoder if encoder.seq2seq else replace(encoder, max_length=encoder.prompt_budget + 1)
                    answer_task(
                        self.model, replace(first, max_new_tokens=1), replace(task, test=[row]), self.config.evaluation
                    )
        except PmLlmError:
            raise
        except Exception as error:  # whatever a model's own code raises
            raise PmLlmError(
                f"{self.config.model!r} cannot be {what}: {type(error).__name__}: {first_line(error)}. Nothing was "
                "trained. Is max_length beyond what the model takes, or target_modules more than its linear layers "
                "with (batch, tokens, width) inputs?"
            ) from error

    def _one_of_each_kind(self) -> list[tuple[Task, Encoder]]:
        """Tasks that are scored in unlike ways, one of each."""
        found: dict[tuple[Any, ...], str] = {}
        for name, task in self.columns.items():
            labels = bool(task.labels) and self.config.evaluation.mode == "labels"
            found.setdefault((task.scorer == "perplexity", labels, bool(task.test[0].messages)), name)
        return [(self.columns[name], self.encoders[name]) for name in found.values()]

    def _features(self, task: Task) -> list[dict[str, Any]]:
        rows = self.encoders[task.name].features(task.train)
        for name, foreign in task.foreign:
            rows += self.encoders[name].features(foreign)
        return rows

    def _constraints(self) -> list[Constraint]:
        """The method's constraints with what they remember of past tasks."""
        constraints = [choice.build("constrain") for choice in self.method.constrain]
        for constraint, memory in zip(constraints, self.memories, strict=False):
            if memory:
                constraint.load_memory(memory)
        return constraints

    def _context(
        self, number: int, merger: Merger, running: Adapter | None, chosen: ChosenRows, rows: list[dict[str, Any]]
    ) -> Context:
        return Context(
            number,
            running.factors if running is not None else {},
            merger.rule,
            Live(lora_layers(self.model), TASK, total, self.base.seq2seq),
            self.model,
            chosen,
            rows,
            seed=self.config.seed_of(number),
        )

    def _train(
        self, number: int, task: Task, context: Context, constraints: list[Constraint]
    ) -> tuple[list[dict[str, Any]], float]:
        """The Trainer's log, and the seconds that training took, in all processes that had a part in it."""
        key = stage_key(self.config, number, self.rows[number - 1], self.state.num_processes)
        checkpoints = Checkpoints(self.run_dir.work(number, task.name), key)
        rows, steps = context.rows, self.config.train.max_steps
        for constraint in constraints:
            rows, steps = constraint.rows(rows, context), constraint.steps(steps, context)
        logs = train(
            self.model,
            self.base,
            self.config,
            Dataset.from_list(rows),
            steps,
            label=task.name,
            seed=self.config.seed_of(number),
            constraints=constraints,
            checkpoints=checkpoints,
            stopping=self.stopping,
        )
        return logs, checkpoints.elapsed()

    def _chosen(self, number: int, task: Task, rows: list[dict[str, Any]]) -> ChosenRows:
        return ChosenRows(task.name, rows, self.config.fisher, self.config.seed_of(number), self.base.tokenizer)

    def _fisher(
        self,
        merger: Merger,
        chosen: ChosenRows,
        running: Adapter | None,
        new: Adapter,
        loss_before: float | None,
        began: Adapter | None,
    ) -> Fisher | None:
        """The task's Fisher, if the merge needs one, with what else it needs."""
        rule, direction = merger.rule, None
        if not rule.needs_fisher:
            return None
        if rule.needs_direction:
            past, first = running.factors if running is not None else {}, began.factors if began is not None else {}
            direction = rule.direction(Fold(merger.tasks + 1, past, new.factors, self.start.continues, start=first))
        form = rule.fisher_form(self.config.fisher.form)
        return chosen.fisher(self.model, form, direction, loss_before, self.zeros)

    def _as_trained(self, new: Adapter) -> None:
        """The model, prepared for a task, as it was right after that was trained."""
        active = list(self.model.active_adapters)
        self.start.as_live(new).attach(self.model, TASK)
        set_active(self.model, active, trainable=TASK)

    def _folded(self) -> AbstractContextManager:
        """The running adapter in the base weights, where that can be."""
        sharded = {"deepspeed", "fsdp"} & self.config.train.extra.keys()
        return folded(self.model, "never" if sharded else self.config.fold_running)

    def _activate(self, merged: Adapter) -> None:
        """Only the running adapter, frozen."""
        merged.attach(self.model, RUNNING)
        remove(self.model, TASK)
        set_active(self.model, [RUNNING], trainable=None)

    def _evaluate(self, stage: int, scores: dict[str, Any]) -> None:
        """Score and commit what stage `stage` (from 0) is to be scored on and is not in `scores` yet."""
        wanted = asked_for(self.config.evaluate, [task.name for task in self.tasks], list(self.columns), stage)
        for name in [name for name in wanted if name not in scores]:
            clock = Clock(self.state.device)
            found = answer_task(self.model, self.encoders[name], self.columns[name], self.config.evaluation)
            clock.stop("evaluate")
            took, memory = clock.seconds["evaluate"], clock.peak_memory["evaluate"]
            score = found.score()
            self._on_main(partial(self.run_dir.commit_score, stage, name, score, found.lines(), took, memory))
            scores[name] = {"score": score}

    # ---- around the tasks ----
    def _go_on(self) -> tuple[Merger, Adapter | None]:
        """The merger and the running adapter after the finished stages; scores that the last one lacks are made."""
        merger = Merger(self.method.merge, max_rank=self.config.max_rank, truncation=self.config.truncation)
        done = len(self.stages)
        merger.rule.zeros = self.zeros
        if not done:
            return merger, None
        say(f"going on after task {done} of {len(self.tasks)} in {self.run_dir.path}")
        before, now = self.stages[-1].get("versions", {}), _versions()
        others = [f"{name} {before[name]} then, {now[name]} now" for name in before if now.get(name) != before[name]]
        if others:
            say(f"versions differ: {', '.join(others)}; what follows may come out otherwise than it would have")
        curvature = self.run_dir.curvature()
        if curvature is None and self.stages[-1]["remembers"]:
            self._replay(merger)
        else:
            merger.load_state(curvature or {}, done)
        running = Adapter.load(self.run_dir.adapter)
        self.memories = self.run_dir.memories(done - 1, len(self.method.constrain))
        if self.start.needs_last:
            self.last = Adapter.load(self.run_dir.stage_adapter(done - 1, TASK_ADAPTER))
        self._prepare(running)
        self._activate(running)
        self._evaluate(done - 1, self.stages[-1]["scores"])
        return merger, running

    def _replay(self, merger: Merger) -> None:
        """Let the merger remember the finished tasks, from their adapters and rows: a Fisher and a fold each.

        After a restart in the middle, since only the last stage's curvature is kept.

        Raises:
            PmLlmError: If another coefficient comes out than was used.
        """
        running: Adapter | None = None
        for number, (task, entry) in enumerate(zip(self.tasks, self.stages, strict=False), start=1):
            say(f"curvature of task {number} of {len(self.stages)}, {task.name}, once more")
            new = Adapter.load(self.run_dir.stage_adapter(number - 1, TASK_ADAPTER))
            chosen = self._chosen(number, task, self._features(task))
            set_seed(self.config.seed_of(number))
            self._prepare(running)
            began = Adapter.from_model(self.model, TASK) if running is None else None
            with self._folded():
                loss_before = chosen.loss(self.model) if merger.rule.needs_losses else None
                self._as_trained(new)
                fisher = self._fisher(merger, chosen, running, new, loss_before, began)
            probe, on_base = Probe(self.model, TASK, new, chosen), self.start.on_base
            merger.fold(running, new, fisher, self.start.continues, start=began, probe=probe, on_base=on_base)
            before = entry["raw_coefficient"]
            if abs(merger.report.raw_coefficient - before) > 1e-2 * max(abs(before), 0.1):
                raise PmLlmError(
                    f"the curvature of task {task.name!r} gives the coefficient {merger.report.raw_coefficient:.4f} "
                    f"now and gave {entry['raw_coefficient']:.4f}. Restart from an earlier task, or run elsewhere."
                )
            running = Adapter.load(self.run_dir.stage_adapter(number - 1))
            self.last = new if self.start.needs_last else None
            self._activate(running)

    def _finish(self) -> dict[str, Any]:
        results = gather_results(self.run_dir.state(), self.method, self.columns)
        self.run_dir.write_results(results)
        return results

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """What `action` gives on the main process, on every process; if it fails there, all stop with that error."""
        box: list[Any] = [None, None]
        failed: BaseException | None = None
        if self.state.is_main_process:
            try:
                box[1] = action()
            except Exception as error:
                failed, box[0] = error, str(error)
        if self.state.num_processes > 1:
            broadcast_object_list(box)
        if failed is not None:
            raise failed
        if box[0] is not None:
            raise PmLlmError(box[0])
        return box[1]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def _stage_line(number: int, total: int, entry: dict[str, Any], seconds: float) -> str:
    scores = " ".join(f"{name} {found['score']:.1f}" for name, found in entry["scores"].items()) or "(not scored)"
    clipped = f" (raw {entry['raw_coefficient']:.3f})" if entry["clipped"] else ""
    reports = "".join(f", {key} {x:.1e}" for key, x in entry["constraint_reports"].items())
    return (
        f"[{number}/{total}] {entry['task']}: coefficient {entry['coefficient']:.3f}{clipped}, rank {entry['rank']}, "
        f"truncation error {entry['truncation_error']:.1e}{reports} | {scores} | {seconds:.0f} s"
    )
