"""A run that goes on: the session as it was when the run began, or after its finished stages."""

from __future__ import annotations

from typing import Any

from pm_llm.adapters.adapter import Adapter
from pm_llm.errors import PmLlmError
from pm_llm.run.reading import TASK_ADAPTER
from pm_llm.run.record import StageRecord
from pm_llm.run.results import versions
from pm_llm.session import Session
from pm_llm.stage import Stage
from pm_llm.system.progress import say


def begun(session: Session, origin: dict[str, Any], stages: list[StageRecord]) -> None:
    """The session of a run that did not begin with the bare model; before the first stage ready for it."""
    session.modules, session.folds = origin["modules"], origin["folds"]
    if not stages:
        session.begin_at(_take_origin(session))


def _take_origin(session: Session) -> Adapter:
    """What merge and constraints remember of what the run began with, and its adapter."""
    run_dir = session.run_dir
    session.merger.load_state_dict(run_dir.curvature(-1) or {}, session.folds)
    session.memories = run_dir.memories(-1, len(session.method.constrain))
    session.running = Adapter.load(run_dir.origin)
    session.last = session.running if session.start.begins == "last" else None
    return session.running


def go_on(session: Session, stages: list[StageRecord]) -> None:
    """The session as it was after the finished stages; scores that the last one lacks are made."""
    run_dir, done = session.run_dir, len(stages)
    say(f"going on after task {done} of {len(session.tasks)} in {run_dir.path}")
    before, now = stages[-1].versions, versions()
    others = [f"{name} {before[name]} then, {now[name]} now" for name in before if now.get(name) != before[name]]
    if others:
        say(f"versions differ: {', '.join(others)}; what follows may come out otherwise than it would have")
    curvature = run_dir.curvature(done - 1)
    if curvature is None and stages[-1].remembers and done < len(session.tasks):
        _replay(session, stages)
    else:
        session.merger.load_state_dict(curvature or {}, session.folds + done)
    session.running = Adapter.load(run_dir.adapter)
    session.memories = run_dir.memories(done - 1, len(session.method.constrain))
    if session.start.begins == "last":
        session.last = Adapter.load(run_dir.stage_adapter(done - 1, TASK_ADAPTER))
    session.prepare()
    session.activate(session.running)
    session.evaluate(done - 1, stages[-1].scores)


def _replay(session: Session, stages: list[StageRecord]) -> None:
    """Let the merger remember the finished tasks, from their adapters and rows: a Fisher and a fold each.

    After a restart further back than curvature is kept.

    Raises:
        PmLlmError: If another coefficient comes out than was used.
    """
    run_dir = session.run_dir
    if run_dir.state()["origin"]:
        _take_origin(session)
    for number, record in enumerate(stages, start=1):
        say(f"curvature of task {number} of {len(stages)}, {record.task}, once more")
        Stage(session, number).replay(Adapter.load(run_dir.stage_adapter(number - 1, TASK_ADAPTER)))
        before, now = record.raw_coefficient, session.merger.report.raw_coefficient
        if abs(now - before) > 1e-2 * max(abs(before), 0.1):
            raise PmLlmError(
                f"the curvature of task {record.task!r} gives the coefficient {now:.4f} now and gave {before:.4f}. "
                "Restart from an earlier task, or run elsewhere."
            )
        session.activate(Adapter.load(run_dir.stage_adapter(number - 1)))
