"""The loop over tasks: open the run, go on, a stage for each task that is not done, finish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from pm_llm.config import RunConfig, configured
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.engine import Engine
from pm_llm.evaluation.matrix import UNTRAINED, Matrix
from pm_llm.evaluation.plan import Plan
from pm_llm.merges.merger import Merger
from pm_llm.origin import Origin, read_sources
from pm_llm.report.gate import Course, GateError, verdict_of
from pm_llm.resume import begun, go_on
from pm_llm.run.adding import added
from pm_llm.run.folder import RunDir
from pm_llm.run.going_on import origin_stays, take_up
from pm_llm.run.kept import kept_tasks, needs_rows, read_all
from pm_llm.run.results import gather_results
from pm_llm.run.taking_back import restore
from pm_llm.session import Session, Watcher
from pm_llm.stage import Stage
from pm_llm.system.mapped import Zeros, mapped_files
from pm_llm.system.processes import on_main, process_state
from pm_llm.system.progress import bar, say
from pm_llm.system.sharding import launched
from pm_llm.system.sharing_out import take_over
from pm_llm.tasks.base import Task, checked
from pm_llm.tasks.fitting import encoders_for
from pm_llm.tasks.loading import load_retained, load_tasks, scored
from pm_llm.tasks.order import retaining
from pm_llm.training.launchers import refuse_sharding, refuse_shared_out
from pm_llm.training.own_answers import check_own_answers
from pm_llm.training.stopping import Stopping


class ContinualSequence:
    """Fine-tunes one model on a sequence of tasks; a run that was stopped goes on where it was.

    Args:
        config: The run's configuration.
        tasks: The tasks in order, taken as they are: the keys that choose rows (`max_train_samples`, `repeat`,
            `evaluation.split` ...) act in :func:`load_tasks`. By default what that gives.
        restart_from: Redo from this task on (its name, or its number in the sequence); what comes before is kept.
        watchers: What looks on, see :class:`pm_llm.session.Watcher`.
        adding: Whether the tasks that follow the finished ones may be trained otherwise (`train` keys).
    """

    def __init__(
        self,
        config: RunConfig,
        tasks: list[Task] | None = None,
        restart_from: str | None = None,
        watchers: Sequence[Watcher] = (),
        adding: bool = False,
    ) -> None:
        self.config = config.check()
        self.restart_from, self.watchers, self.adding = restart_from, watchers, adding
        self.run_dir = RunDir(config.output_dir)
        self.given = self._load() if tasks is None else checked(tasks)
        self.retained = load_retained(config) if any(task.kept is None for task in self.given) else []
        # a stage each; a task may recur
        self.tasks = retaining(self.given, self.retained, config.retain.share, config.seed)
        self.sources = None if self._origin_stays() else read_sources(config)
        self.columns = scored(config, self.tasks)
        if config.fuar:
            Matrix(list(self.columns), stages=[task.name for task in self.tasks]).check_fuar(**config.fuar)
        self.method = config.parsed_method()
        config.check_method(task.kind for task in (*self.tasks, *self.retained))
        check_own_answers(config, self.given)
        self.state = process_state()
        self.stopping = Stopping()
        on_disk = config.fisher.storage == "disk"
        self.zeros: Zeros = mapped_files(self.run_dir.path / "work" / "sums") if on_disk else torch.zeros

    @classmethod
    def open(
        cls, run: str | Path, keys: Mapping[str, Any] | None = None, watchers: Sequence[Watcher] = ()
    ) -> ContinualSequence:
        """A run's finished tasks, with its own settings, to add others to.

        Args:
            run: The run's folder.
            keys: Keys of the configuration by dotted name that are to change, as far as they may.
            watchers: What looks on.

        Raises:
            PmLlmError: If there is no run, or a key may not change.
        """
        run_dir = RunDir.open(run)
        state = run_dir.state()
        config = configured({**state["config"], "output_dir": str(run)}, dict(keys or {}), str(run_dir.path))
        return cls(config, read_all(run_dir, state["stages"]), watchers=watchers, adding=True)

    def add(self, *tasks: Task | str | dict[str, Any]) -> dict[str, Any]:
        """Train tasks after those that the run has finished, and return the results.

        Args:
            tasks: Each a task, an entry as `tasks` takes them, or the name of a task of the run's benchmark.

        Raises:
            PmLlmError: If the run has unfinished tasks (other than these, which are gone on with then), or a task of
                that name.
        """
        config = added(self.config, self.run_dir.state(), tasks, str(self.run_dir.path))
        own = [task for task in tasks if isinstance(task, Task)]
        if own and len(own) < len(tasks):
            raise PmLlmError("some tasks are made in Python, and others are entries. Add them one after the other.")
        given = [*self.given, *own] if own else None
        return ContinualSequence(config, given, watchers=self.watchers, adding=True).run()

    def conclude(self) -> dict[str, Any]:
        """The results of a finished run, written anew; the model is loaded only where a score is missing."""
        if not self.is_scored():
            return self.run()
        with self.run_dir.locked():
            return self._finish()

    def run(self) -> dict[str, Any]:
        """Train everything that is not done yet and return the results (as in `results.json`).

        Raises:
            PmLlmError: If the run cannot begin or go on; what is committed stays as it is.
            GateError: If a task did not pass the gate of the configuration, unless that only warns.
            Stopped: After SIGTERM or SIGINT.
        """
        try:
            return self._run()
        except GateError as error:
            raise GateError(f"{error}\n{on_main(self._after_gate)}", error.status) from None

    def _run(self) -> dict[str, Any]:
        self._check_devices()
        if self.run_dir.has_state() and self.adding:
            self._check_added(self.run_dir.state())
        self.encoders, fitting = encoders_for(self.config, [*self.columns.values(), *self.retained])
        self.tasks = [fitting(task) for task in self.tasks]
        self.columns = {name: fitting(task) for name, task in self.columns.items()}
        if self.config.evaluation.engine == "openai":
            Engine(self.config.evaluation, self.config.model, None).check()
        with self.stopping, ExitStack() as stack:
            on_main(lambda: stack.enter_context(self.run_dir.locked()) and None)
            run = self._open()
            stages = run["stages"]
            self.session = self._session(run["rows"])
            if run["origin"]:
                begun(self.session, run["origin"], stages)
            elif sources := self.sources or read_sources(self.config):
                Origin(self.session, sources).run()
            if stages:
                go_on(self.session, stages)
            else:
                self.session.evaluate(UNTRAINED, run["untrained"] or {})
            with bar(len(self.tasks), self.config.method, "task") as progress:
                progress.update(len(stages))
                if stages:
                    self._judge(len(stages))
                for number in range(len(stages) + 1, len(self.tasks) + 1):
                    Stage(self.session, number).run()
                    progress.update(1)
                    self._judge(number)
            found: dict[str, Any] = on_main(self._finish)
            return found

    def _judge(self, number: int) -> None:
        """Let the gate of the configuration, if there is one, see task `number`. Raises GateError if it may not
        pass."""
        gate = self.config.gate
        if gate.lose is None:
            return
        run: Course = on_main(lambda: Course.of(self.run_dir))
        known = any(run.stages[-1] in run.predictions[i] for i in range(UNTRAINED, number - 1))
        # of a task that was trained before the gate was set nobody knows what it gained
        status, lines = verdict_of(run, gate.lose, gate.gain if known else None, gate.level)
        if not status or gate.action == "warn":
            say(lines)
            return
        on_main(self._finish)  # so that it can be reported
        raise GateError(f"task {run.stages[-1]!r} does not pass the gate:\n{lines}", status)

    def _after_gate(self) -> str:
        """What becomes of a task that did not pass: what is done, and what may be."""
        stages, path = self.run_dir.state()["stages"], self.run_dir.path
        allow = "let it pass with a gate that allows more (--gate.lose)"
        if len(stages) < 2:
            return f"It is the run's first task and stays: {allow}, or restart the run with other settings."
        if self.config.gate.action != "restore":
            return f"It stays: take it back with pm-llm restore {path} --to {len(stages) - 1}, or {allow}."
        with self.run_dir.locked():
            restore(self.run_dir, len(stages) - 1)
        back = ContinualSequence.open(path)
        if back.is_scored():
            back.conclude()
        return f"It was taken back: the run is after {stages[-2].task!r} again. To keep it, {allow}."

    def is_scored(self) -> bool:
        """Whether all tasks are trained and all that is to be scored after the last is."""
        stages = self.run_dir.state()["stages"]
        names = [task.name for task in self.tasks]
        asked = Plan.of(self.config.plain()).asked(names, list(self.columns), len(stages) - 1)
        return len(stages) == len(names) and all(name in stages[-1].scores for name in asked)

    def _load(self) -> list[Task]:
        """The tasks of the configuration; of finished ones what the run has kept."""
        kept = kept_tasks(self.run_dir, self.config, self.restart_from)
        try:
            return load_tasks(self.config, kept or ())
        except PmLlmError as error:
            if kept is not None:
                raise
            raise PmLlmError(self._forgotten(str(error))) from error

    def _origin_stays(self) -> bool:
        """Whether what the run begins with is measured, and will not be again: its rows may be gone then."""
        state = self.run_dir.state() if self.run_dir.has_state() else None
        going_on = state is not None and bool(state["stages"]) and self.restart_from is None
        return state is not None and state["origin"] is not None and (going_on or origin_stays(state, self.config))

    def _check_added(self, state: dict[str, Any]) -> None:
        """Raise PmLlmError if an opened run lacks something to go on: its unfinished tasks, or its rows."""
        done, names = len(state["stages"]), [task.name for task in self.tasks]
        if len(names) < len(state["tasks"]):
            raise PmLlmError(
                f"{self.run_dir.path} has unfinished tasks: {', '.join(state['tasks'][done:])}. Add them, or give the "
                "command that began them."
            )
        kept = any(task.kept for task in self.tasks)
        if kept and 0 < done < len(names) and needs_rows(self.run_dir, done):
            raise PmLlmError(self._forgotten("the run keeps none."))

    def _forgotten(self, why: str) -> str:
        return (
            f"what the merge remembers of {self.run_dir.path} at that task is not kept any more (keep_curvature), so "
            f"it must be measured again on the rows of all tasks before it, and they cannot be read: {why} Bring the "
            "files back, or restart or restore to a later task."
        )

    def _check_devices(self) -> None:
        if self.state.num_processes == 1 and self.state.device.type == "cuda" and torch.cuda.device_count() > 1:
            raise PmLlmError(
                "several GPUs are visible to one process. Use `accelerate launch recipes/continual.py`, "
                "or show it one with CUDA_VISIBLE_DEVICES."
            )
        take_over()
        refuse_shared_out(self.method)
        refuse_sharding([choice.build("constrain") for choice in self.method.constrain], *launched())

    def _open(self) -> dict[str, Any]:
        """The run's state: begun, or as far as it has come."""
        lengths = {name: encoder.max_new_tokens for name, encoder in self.encoders.items()}
        how = (self.restart_from, self.adding)
        on_main(lambda: take_up(self.run_dir, self.config, self.tasks, self.columns, lengths, *how))
        found: dict[str, Any] = on_main(self.run_dir.state)
        return found

    def _session(self, rows: dict[str, Any]) -> Session:
        merger = Merger(self.method.merge, max_rank=self.config.max_rank, truncation=self.config.truncation)
        merger.rule.zeros = self.zeros
        return Session(
            self.config,
            self.method,
            self.run_dir,
            self.tasks,
            self.columns,
            self.encoders,
            rows,
            merger,
            self.zeros,
            self.stopping,
            self.watchers,
        )

    def _finish(self) -> dict[str, Any]:
        results = gather_results(self.run_dir.state(), self.columns)
        self.run_dir.write_results(results)
        return results.plain()
