"""Gathering what is recorded: of a stage when it is committed, of a run when it is finished."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pm_llm.evaluation.matrix import UNTRAINED, Matrix, lower_of
from pm_llm.presets import PRESETS
from pm_llm.run.going_on import changes
from pm_llm.run.record import Facts, Results, StageRecord
from pm_llm.system.processes import process_state
from pm_llm.tasks.base import Task

if TYPE_CHECKING:
    from pm_llm.stage import Stage


VERSIONS = ("pm_llm", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """Those of the packages that decide what comes out."""
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def stage_record(stage: Stage) -> StageRecord:
    """What a stage did, when it is merged; its scores are added as they are made."""
    session, report, fisher = stage.session, stage.session.merger.report, stage.fisher
    method = session.method
    return StageRecord(
        task=stage.task.name,
        seed=stage.seed,
        config={key: value for key, value in session.config.plain().items() if key != "output_dir"},
        words=method.plain(),
        facts=Facts(PRESETS[session.config.method].plain() == method.plain(), method.says("old_data"), method.task_id),
        versions=versions(),
        processes=process_state().num_processes,
        coefficient=report.coefficient,
        raw_coefficient=report.raw_coefficient,
        clipped=report.clipped,
        coefficients=report.coefficients,
        raw_coefficients=report.raw_coefficients,
        truncation_error=report.truncation_error,
        rank=report.rank,
        curvature=next((log["curvature"] for log in reversed(stage.logs) if "curvature" in log), None),
        curvature_errors=report.curvature_errors,
        constraint_reports=stage.reports,
        losses=fisher.losses if fisher is not None else None,
        exact_curvature=fisher.exact if fisher is not None else None,
        shift=stage.shift,
        seconds={"evaluate": 0.0, **stage.clock.seconds},
        peak_memory_bytes=stage.clock.peak_memory,
    )


def stage_line(record: StageRecord, number: int, tasks: int, seconds: float) -> str:
    """What stage `number` (from 1) of so many tasks came to, in a line."""
    scores = " ".join(f"{name} {found['score']:.1f}" for name, found in record.scores.items()) or "(not scored)"
    clipped = f" (raw {record.raw_coefficient:.3f})" if record.clipped else ""
    reports = "".join(f", {key} {x:.1e}" for key, x in record.constraint_reports.items())
    cut = f", truncation error {record.truncation_error:.1e}" if record.truncation_error else ""
    return (
        f"[{number}/{tasks}] {record.task}: coefficient {record.coefficient:.3f}{clipped}, rank {record.rank}"
        f"{cut}{reports} | {scores} | {seconds:.0f} s"
    )


def gather_results(run: dict[str, Any], columns: Mapping[str, Task]) -> Results:
    """The matrix, what follows from it, and what each stage did.

    Args:
        run: The run folder's state.
        columns: All that was scored, by name.

    Returns:
        The results; of a method whose result is used with the task known, with the average over each task's own stage.

    Raises:
        MissingScoreError: If a score is missing that the configuration's numbers need.
    """
    config, scorers = run["config"], [task.scorer for task in columns.values()]
    stages: list[StageRecord] = run["stages"]
    matrix, last = _matrix(run, columns), stages[-1]
    measured = matrix.with_task_known if last.facts.knows_task else matrix.summary
    fuar = {"fuar": matrix.fuar(**config["fuar"])} if config["fuar"] else {}
    return Results(
        config=config,
        method=last.words,
        facts=last.facts,
        versions=last.versions,
        tasks=matrix.tasks,
        stages=list(matrix.stages),
        stage_settings=[_own(stage, run) for stage in stages],
        scorers=scorers,
        lower_is_better=matrix.lower_is_better,
        aside=[name for name in columns if name in matrix.aside],
        test_rows=[task.kept.test_rows if task.kept else len(task.test) for task in columns.values()],
        matrix=matrix.rows(),
        untrained={n: x["score"] for n, x in run["untrained"].items() if n in columns} if run["untrained"] else None,
        coefficients=[stage.coefficient for stage in stages],
        raw_coefficients=[stage.raw_coefficient for stage in stages],
        module_coefficients=[stage.coefficients for stage in stages],
        truncation_errors=[stage.truncation_error for stage in stages],
        ranks=[stage.rank for stage in stages],
        curvatures=[stage.curvature for stage in stages],
        curvature_errors=[stage.curvature_errors for stage in stages],
        exact_curvatures=[stage.exact_curvature for stage in stages],
        constraint_reports=[stage.constraint_reports for stage in stages],
        losses=[stage.losses for stage in stages],
        shifts=[stage.shift for stage in stages],
        seconds=[stage.seconds for stage in stages],
        peak_memory_bytes=[max(stage.peak_memory_bytes.values()) for stage in stages],
        numbers={**measured(config["evaluate"], config["keep_test_rows"]), **fuar},
    )


def _matrix(run: dict[str, Any], columns: Mapping[str, Task]) -> Matrix:
    """All that was scored. Where of some trained tasks a lower score is better, and of others not, the former are
    aside."""
    stages: list[StageRecord] = run["stages"]
    trained = {stage.task for stage in stages}
    below = lower_of(list(columns), [task.scorer for task in columns.values()])
    aside = below & trained if not trained <= below else frozenset[str]()
    matrix = Matrix(list(columns), {}, [stage.task for stage in stages], trained <= below, aside, below)
    for number, scores in [(UNTRAINED, run["untrained"] or {}), *enumerate(stage.scores for stage in stages)]:
        for name, found in ((name, scores[name]) for name in scores if name in columns):  # others were taken back
            matrix.set(number, name, found["score"])
    return matrix


def _own(stage: StageRecord, run: dict[str, Any]) -> list[str]:
    """In what a stage's settings and versions differ from the run's last: `key: the last's -> its own`."""
    last, own = run["stages"][-1].versions, stage.versions
    found = [f"{name}: {last[name]} -> {own[name]}" for name in own if own[name] != last.get(name)]
    return changes(run["config"], stage.config) + found
