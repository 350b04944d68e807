"""The loop over tasks: start, train, Fisher, merge, evaluate, commit."""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, reduce
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig

from pm_llm.adapters import Adapter, lora_layers, remove, set_active
from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.matrix import UNTRAINED, Matrix
from pm_llm.evaluation.predictions import Predictions
from pm_llm.evaluation.run import answer_task
from pm_llm.evaluation.scorers import SCORERS
from pm_llm.fisher import Fisher, diagonal_fisher
from pm_llm.merges import Merger
from pm_llm.models import load_base
from pm_llm.processes import Clock, process_state
from pm_llm.progress import TrainingBar, bar, say
from pm_llm.run_dir import ADAPTER, PREDICTIONS, TASK_ADAPTER, RunDir, write_jsonl
from pm_llm.starts import RUNNING, TASK
from pm_llm.tasks import Task, checked, distinct, load_probes, load_tasks, one_direction
from pm_llm.tasks.encode import encoders_for
from pm_llm.trainer import ContinualSeq2SeqTrainer, ContinualSFTTrainer, original_forward

VERSIONS = ("pm_llm", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


class ContinualSequence:
    """Fine-tunes one model on a sequence of tasks; a run that was stopped goes on after its last finished task.

    Args:
        config: The run's configuration.
        tasks: The tasks in order; by default what the configuration names.
    """

    def __init__(self, config: RunConfig, tasks: list[Task] | None = None) -> None:
        self.config = config.check()
        self.tasks = load_tasks(config) if tasks is None else checked(tasks)  # a stage each; a task may recur
        self.distinct = distinct(self.tasks)
        self.columns = self.distinct | {task.name: task for task in load_probes(config)}  # all that is scored
        if len(self.columns) < len(self.distinct) + len(config.probes):
            raise PmLlmError("a probe has the name of a task or of another probe. Give each its own `name`.")
        one_direction(self.columns.values())
        if config.fuar:
            Matrix(list(self.columns), stages=[task.name for task in self.tasks]).check_fuar(**config.fuar)
        self.method = config.parsed_method()
        self.state = process_state()
        self.run_dir = RunDir(config.output_dir)

    def run(self) -> dict[str, Any]:
        """Train everything that is not done yet and return the results (as in `results.json`)."""
        if self.state.num_processes == 1 and self.state.device.type == "cuda" and torch.cuda.device_count() > 1:
            raise PmLlmError(
                "several GPUs are visible to one process. Use `accelerate launch recipes/continual.py`, "
                "or show it one with CUDA_VISIBLE_DEVICES."
            )
        self.encoders = encoders_for(self.config, self.columns.values())
        names = [task.name for task in self.tasks]
        self._on_main(lambda: self.run_dir.create(self.config, names, _versions()))
        self.base = load_base(self.config.model, self.config.dtype)
        self.model: Any = self.base.model.to(self.state.device)
        merger, running, done = self._resume()
        if self.config.evaluate == "all" and not done:
            untrained = self._evaluate(list(self.columns))
            self._on_main(
                lambda: self.run_dir.note_untrained({p.task: p.score() for p in untrained}, _lines(untrained))
            )
        with bar(len(self.tasks), self.config.method, "task") as progress:
            progress.update(done)
            for number, task in enumerate(self.tasks[done:], start=done + 1):
                started = time.monotonic()
                running, entry = self._stage(number, task, merger, running)
                progress.update(1)
                say(_stage_line(number, len(self.tasks), entry, time.monotonic() - started))
        return self._finish()

    # ---- one task ----
    def _stage(
        self, number: int, task: Task, merger: Merger, running: Adapter | None
    ) -> tuple[Adapter, dict[str, Any]]:
        set_seed(self.config.seed * 1000 + number)
        clock = Clock(self.state.device)
        start = self.method.start.build("start")
        self.model = start.prepare(self.model, running, self.config.lora, self.base.seq2seq)
        rows = self.encoders[task.name].features(task.train)
        for name, foreign in task.foreign:
            rows += self.encoders[name].features(foreign)
        logs = self._train(number, task, rows)
        clock.stop("train")
        new = Adapter.from_model(self.model, TASK)
        fisher = self._fisher(number, task, rows) if merger.rule.needs_fisher else None
        clock.stop("fisher")
        merged = merger.fold(running, new, fisher, continues=start.continues)
        merged.attach(self.model, RUNNING)
        remove(self.model, TASK)
        set_active(self.model, [RUNNING], trainable=None)
        clock.stop("merge")
        predictions = self._evaluate(self._to_score(number))
        clock.stop("evaluate")
        entry = {
            "task": task.name,
            "scores": {found.task: found.score() for found in predictions},
            "coefficient": merger.report.coefficient,
            "raw_coefficient": merger.report.raw_coefficient,
            "clipped": merger.report.clipped,
            "coefficients": merger.report.coefficients,
            "raw_coefficients": merger.report.raw_coefficients,
            "truncation_error": merger.report.truncation_error,
            "rank": merger.report.rank,
            "curvature": next((log["curvature"] for log in reversed(logs) if "curvature" in log), None),
            "seconds": clock.seconds,
            "peak_memory_bytes": clock.peak_memory(),
        }
        self._on_main(lambda: self._commit(number, task, merged, new, merger, _lines(predictions), logs, entry))
        return merged, entry

    def _train(self, number: int, task: Task, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        constraints = [choice.build("constrain") for choice in self.method.constrain]
        shown = TrainingBar(f"train {task.name}")
        trainer_class = ContinualSeq2SeqTrainer if self.base.seq2seq else ContinualSFTTrainer
        with tempfile.TemporaryDirectory() as scratch, original_forward(self.model):
            trainer = trainer_class(
                self.model,
                args=training_arguments(
                    self.config, self.base.seq2seq, scratch, self.config.seed * 1000 + number, self.state.device.type
                ),
                train_dataset=Dataset.from_list(rows),
                data_collator=self._collator(),
                processing_class=self.base.tokenizer,
                constraint=constraints,
                callbacks=[shown],
            )
            for callback in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(callback)
            trainer.train()
        return shown.logs

    def _fisher(self, number: int, task: Task, rows: list[dict[str, Any]]) -> Fisher:
        size = self.config.fisher.batch_size
        rng = torch.Generator().manual_seed(self.config.seed * 1000 + number)
        chosen = torch.randperm(len(rows), generator=rng)[: self.config.fisher.samples].tolist()
        mine = chosen[self.state.process_index :: self.state.num_processes]
        collate = self._collator()
        batches = (
            collate([rows[i] for i in mine[at : at + size]]).to(self.state.device) for at in range(0, len(mine), size)
        )
        with bar(len(mine), f"Fisher {task.name}", "row") as progress:
            sums, _ = diagonal_fisher(self.model, batches, progress.update)
        if self.state.num_processes > 1:
            sums = {name: self._summed(sums.get(name), layer) for name, layer in lora_layers(self.model).items()}
        return {name: x / len(chosen) for name, x in sums.items()}

    def _summed(self, mine: torch.Tensor | None, layer: Any) -> torch.Tensor:
        """Over all processes; one that had no row must take part with zeros, or the others wait for it."""
        if mine is None:
            mine = torch.zeros(layer.out_features, layer.in_features)
        return reduce(mine.to(self.state.device), "sum").cpu()

    def _to_score(self, number: int) -> list[str]:
        """The tasks that are scored after stage `number` (from 1)."""
        what, every = self.config.evaluate, list(self.columns)
        if what == "all" or number == len(self.tasks):
            return every
        seen = list(dict.fromkeys(task.name for task in self.tasks[:number]))
        return {"seen": seen, "final": [], "diagonal+final": [self.tasks[number - 1].name]}[what]

    def _evaluate(self, names: list[str]) -> list[Predictions]:
        how = self.config.evaluation
        return [answer_task(self.model, self.encoders[name], self.columns[name], how) for name in names]

    def _commit(
        self,
        number: int,
        task: Task,
        merged: Adapter,
        new: Adapter,
        merger: Merger,
        predictions: list[dict[str, Any]],
        logs: list[dict[str, Any]],
        entry: dict[str, Any],
    ) -> None:
        folder = self.run_dir.new_stage(number, task.name)
        merged.save(folder / ADAPTER)
        new.save(folder / TASK_ADAPTER)
        write_jsonl(folder / PREDICTIONS, predictions)
        write_jsonl(folder / "log.jsonl", logs)
        self.run_dir.commit(folder, entry, merger.state())

    # ---- around the tasks ----
    def _resume(self) -> tuple[Merger, Adapter | None, int]:
        merger = Merger(self.method.merge, max_rank=self.config.max_rank)
        stages = self.run_dir.state()["stages"]
        if not stages:
            return merger, None, 0
        merger.load_state(self.run_dir.curvature(), len(stages))
        running = Adapter.load(self.run_dir.adapter)
        say(f"going on after task {len(stages)} of {len(self.tasks)} in {self.run_dir.path}")
        return merger, running, len(stages)

    def _finish(self) -> dict[str, Any]:
        state, scorers = self.run_dir.state(), [task.scorer for task in self.columns.values()]
        stages = state["stages"]
        matrix = Matrix(
            list(self.columns),
            stages=[task.name for task in self.tasks],
            lower_is_better=SCORERS[scorers[0]].lower_is_better,
        )
        for i, stage in enumerate(stages):
            for name, value in stage["scores"].items():
                matrix.set(i, name, value)
        for name, value in state.get("untrained", {}).items():
            matrix.set(UNTRAINED, name, value)
        results = {
            "config": self.run_dir.config(),
            "method": self.method.plain(),
            "versions": state["versions"],
            "tasks": matrix.tasks,
            "stages": matrix.stages,
            "scorers": scorers,
            "lower_is_better": matrix.lower_is_better,
            "test_rows": [len(task.test) for task in self.columns.values()],
            "matrix": matrix.rows(),
            "untrained": state.get("untrained"),
            "coefficients": [stage["coefficient"] for stage in stages],
            "raw_coefficients": [stage["raw_coefficient"] for stage in stages],
            "module_coefficients": [stage["coefficients"] for stage in stages],
            "truncation_errors": [stage["truncation_error"] for stage in stages],
            "ranks": [stage["rank"] for stage in stages],
            "curvatures": [stage["curvature"] for stage in stages],
            "seconds": [stage["seconds"] for stage in stages],
            "peak_memory_bytes": [stage["peak_memory_bytes"] for stage in stages],
            **matrix.summary(self.config.evaluate),
            **({"fuar": matrix.fuar(**self.config.fuar)} if self.config.fuar else {}),
        }
        self._on_main(lambda: self.run_dir.write_results(results))
        return results

    def _collator(self) -> DataCollatorForSeq2Seq:
        return DataCollatorForSeq2Seq(self.base.tokenizer, self.model)

    def _on_main(self, action: Any) -> None:
        """Run `action` on the main process; if it fails there, every process stops with that error."""
        box: list[str | None] = [None]
        failed: BaseException | None = None
        if self.state.is_main_process:
            try:
                action()
            except Exception as error:
                failed, box[0] = error, str(error)
        if self.state.num_processes > 1:
            broadcast_object_list(box)
        if failed is not None:
            raise failed
        if box[0] is not None:
            raise PmLlmError(box[0])


def training_arguments(config: RunConfig, seq2seq: bool, scratch: str, seed: int, device: str) -> Any:
    """The Trainer's arguments for one task. Raises PmLlmError if transformers does not take them."""
    fields = {key: value for key, value in vars(config.train).items() if key != "extra"}
    fields |= {
        "output_dir": scratch,
        "seed": seed,
        "bf16": config.dtype == "bfloat16",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": device == "cpu",
        "remove_unused_columns": False,
        "dataloader_pin_memory": device == "cuda",
    }
    if not seq2seq:
        fields["max_length"] = None  # rows are cut inside their frame already
    try:
        return (Seq2SeqTrainingArguments if seq2seq else SFTConfig)(**{**fields, **config.train.extra})
    except (TypeError, ValueError) as error:
        raise PmLlmError(f"train: {error}. `train.extra` takes the fields of TrainingArguments.") from error


def _stage_line(number: int, total: int, entry: dict[str, Any], seconds: float) -> str:
    scores = " ".join(f"{name} {value:.1f}" for name, value in entry["scores"].items()) or "(not scored)"
    clipped = f" (raw {entry['raw_coefficient']:.3f})" if entry["clipped"] else ""
    return (
        f"[{number}/{total}] {entry['task']}: coefficient {entry['coefficient']:.3f}{clipped}, rank {entry['rank']}, "
        f"truncation error {entry['truncation_error']:.1e} | {scores} | {seconds:.0f} s"
    )


def _lines(found: list[Predictions]) -> list[dict[str, Any]]:
    return [line for one in found for line in one.lines()]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONS}
