"""`pm-llm status`: where a run stands, what it will do next, what the method adds to plain training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pm_llm.evaluation.matrix import UNTRAINED
from pm_llm.evaluation.plan import Plan
from pm_llm.run.folder import RunDir
from pm_llm.run.reading import ADAPTER, CURVATURE, MEMORY, RESULTS, STAGES
from pm_llm.system.files import size_of


def describe_run(path: str | Path) -> str:
    """The status in words.

    Raises:
        PmLlmError: If there is no run, or its state file is damaged.
    """
    run_dir = RunDir.open(path)
    state, holder = run_dir.state(), run_dir.holder()
    plan = Plan.of(state["config"])
    back = dict.fromkeys(one.task for one in state["undone"])
    columns = [name for name in state["rows"]["test"] if name not in back or name in state["tasks"]]
    total, done = len(state["tasks"]), len(state["stages"])
    lines = [f"{path}: method {state['config']['method']}, {done} of {total} tasks trained"]
    lines.append(f"at work: {holder or 'nobody'}")
    lines += ["", "| task | state | coefficient | training s | Fisher and merge s | evaluation s |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    todo: list[str] = []
    if not done:
        asked = plan.asked(state["tasks"], columns, UNTRAINED)
        missing = [name for name in asked if name not in (state["untrained"] or {})]
        todo += [f"score the untrained model on {', '.join(missing)}"] if missing else []
    for i, name in enumerate(state["tasks"]):
        if i < done:
            stage = state["stages"][i]
            asked = plan.asked(state["tasks"], columns, i)
            missing = [task for task in asked if task not in stage.scores]
            what = f"trained, scored on {len(asked) - len(missing)} of {len(asked)}" if missing else "done"
            if missing and i == done - 1:
                todo.append(f"score task {i + 1} ({name}) on {', '.join(missing)}")
            seconds = stage.seconds
            numbers = [seconds["train"], seconds["fisher"] + seconds["merge"], seconds["evaluate"]]
            cells = [what, f"{stage.coefficient:.3f}", *(f"{x:.1f}" for x in numbers)]
        else:
            step = _checkpoint(run_dir.work(i + 1, name))
            cells = ["waiting" if step is None else f"checkpoint at step {step}", "", "", "", ""]
            if i == done:
                todo.append(f"train task {i + 1} ({name})" + (f" from step {step}" if step else ""))
        lines.append(f"| {i + 1} {name} | " + " | ".join(cells) + " |")
    if state["undone"]:
        lines += ["", f"taken back: {', '.join(back)} (pm-llm restore {path} --to {[*back][-1]})"]
    if done:
        lines += ["", *_added(state)]
    if not todo and RESULTS not in state["files"]:
        todo.append("write results.json")
    lines += ["", f"next: {todo[0]}" if todo else "next: nothing, it is finished"]
    return "\n".join([*lines, *_wrong(run_dir)])


def _wrong(run_dir: RunDir) -> list[str]:
    """What is not as it was written, and what to do about it."""
    lines = []
    if target := run_dir.link_missed():
        lines.append(f"{run_dir.path / ADAPTER} is no link to {target}: the same command, run again, makes it one")
    wrong = run_dir.damaged()
    if wrong:
        lines += ["", "damaged:", *(f"  {run_dir.path / name} {what}" for name, what in wrong.items())]
        lines.append(run_dir.remedy(wrong))
    return lines


def _checkpoint(folder: Path) -> str | None:
    """`37 of 75` of the newest checkpoint below a folder."""
    steps = [int(p.name.partition("-")[2]) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    if not steps:
        return None
    try:
        trainer = json.loads((folder / f"checkpoint-{max(steps)}" / "trainer_state.json").read_text())
        return f"{max(steps)} of {trainer['max_steps']}"
    except (OSError, ValueError, KeyError, TypeError):  # it will not be gone on from
        return f"{max(steps)} (damaged)"


def _added(state: dict[str, Any]) -> list[str]:
    """What the method adds to plain LoRA training, measured."""
    stages, files = state["stages"], state["files"]
    train = sum(stage.seconds["train"] for stage in stages)
    extra = sum(stage.seconds["fisher"] + stage.seconds["merge"] for stage in stages)
    last = f"{STAGES}/{stages[-1].folder}"
    memory = sum(files[f"{last}/{name}"]["size"] for name in (CURVATURE, MEMORY) if f"{last}/{name}" in files)
    adapter = sum(known["size"] for name, known in files.items() if name.startswith(f"{last}/{ADAPTER}/"))
    peaks = {
        part: max(stage.peak_memory_bytes.get(part, 0) for stage in stages)
        for part in ("train", "fisher", "merge", "evaluate")
    }
    return [
        f"added to plain training: {extra:.1f} s for Fisher and merge ({extra / train:.1%} of training), "
        f"{size_of(adapter)} of running adapter and {size_of(memory)} of other memory kept between tasks",
        "peak memory: " + ", ".join(f"{part} {size_of(x)}" for part, x in peaks.items() if x),
    ]
