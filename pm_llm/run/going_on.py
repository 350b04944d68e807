"""Going on with a run: what has not run yet may change, what has run may not."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.run.folder import RunDir
from pm_llm.run.record import StageRecord
from pm_llm.system.files import sha256_of, sha256_of_list
from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.store import remembered

# keys without influence on any result, beyond the rounding of sums
FREE = (
    *("output_dir", "train.save_steps", "fisher.storage", "fold_running"),
    *("keep_curvature", "fisher.batch_size", "evaluation.batch_size", "evaluation.batch_tokens"),
    *("evaluation.url", "evaluation.served", "evaluation.parallel", "evaluation.retries", "evaluation.timeout"),
    *("gate.lose", "gate.gain", "gate.level", "gate.action"),
)
# keys that say which rows are trained and scored on: judged by the rows themselves
ROWS = (
    *("benchmark", "order", "repeat", "blur", "bad_rows", "data_dir", "tasks", "probes"),
    *("max_train_samples", "max_test_samples"),
)
# of a row, what all have had from the first
DEFAULTS = [f.default for f in dataclasses.fields(Example)]
FIRST_FIELDS = [f.name for f in dataclasses.fields(Example)].index("tools")
# keys that runs of before do not have, with what they did
LATER = {
    "train.packing": False,
    "train.train_sampling_strategy": "random",
    "train.beta": 0.1,
    "attn_implementation": None,
    "general.skills": None,
    "general.when": "each",
    "general.lm_eval": [],
    "general.lm_eval_dir": None,
    "general.limit": None,
    "general.apply_chat_template": False,
    "evaluation.engine": "transformers",
    "retain.data": None,
    "retain.share": 0.05,
}
NOTHING = object()
# what accelerate launch says of sharding: each way writes checkpoints that another cannot read
LAUNCHER = ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE")


def take_up(
    run_dir: RunDir,
    config: RunConfig,
    tasks: Sequence[Task],
    columns: Mapping[str, Task],
    lengths: Mapping[str, int],
    restart_from: str | None = None,
    adding: bool = False,
) -> None:
    """Make the run's folder, or open it to go on; the caller has the lock.

    Args:
        run_dir: The folder.
        config: The configuration asked for.
        tasks: The tasks, a stage each.
        columns: All that is scored, by name.
        lengths: The longest answer to each of them, in tokens.
        restart_from: Redo from this task on: its name, or its number in the sequence.
        adding: Whether tasks that follow may be trained otherwise.

    Raises:
        PmLlmError: If the folder holds a run that differs in what has already run (the differences are shown), files
            of it are damaged, or there is nothing to restart.
    """
    plain, names = config.plain(), [task.name for task in tasks]
    del plain["output_dir"]
    rows = _rows(tasks, columns, lengths)
    new = {"tasks": names, "config": plain, "rows": rows}
    if not run_dir.has_state():
        if restart_from is not None:
            raise PmLlmError(f"{run_dir.path} holds no run that could be restarted. Leave --restart-from out.")
        run_dir.begin({**new, "restarted": None})
        return
    state = run_dir.state()
    stages = state["stages"]
    stage = len(stages) if restart_from is None else stage_named(restart_from, names, len(stages))
    token = None if restart_from is None else restart_token(config, stage)
    if token is not None and token == state["restarted"]:  # the same command again, after that restart was stopped
        stage, token = len(stages), None
    kept = stages[:stage]
    if not kept:
        settings = _settings(state["config"]) == _settings(plain)
        if token is not None or not settings or state["rows"] != rows:
            if not origin_stays(state, config):
                run_dir.begin({**new, "restarted": token})
                return
            token = token or restart_token(config, 0)  # what it begins with is measured already
    else:
        differences = _differences(state, kept, new, restarted=token is not None or adding)
        if not differences and kept:  # a method of the same name, of another version of pm_llm
            differences = changes(kept[-1].words, config.parsed_method().plain())
        if differences:
            raise PmLlmError(
                f"{run_dir.path} holds a run with another configuration ({'; '.join(differences)}). Run as before, "
                "choose another output_dir, or delete the folder. What has not run yet may change: tasks that follow, "
                "and with --restart-from TASK the `train` section."
            )
    run_dir.check([f"stages/{record.folder}/" for record in kept] + ["origin/", "untrained/"])
    if token is not None:
        run_dir.restart(stage, token, plain)
    run_dir.go_on(plain, rows, names)


def _rows(tasks: Sequence[Task], columns: Mapping[str, Task], lengths: Mapping[str, int]) -> dict[str, Any]:
    """Digests of the rows that are trained on, a stage each, and of those that are scored, by name; of finished tasks
    those that are known."""
    return {
        "train": [
            task.kept.train
            if task.kept
            else _fingerprint(
                task.train,
                *(_fingerprint(found, name) for name, found in task.foreign),
                *_learnt(task),
                name=task.name,
            )
            for task in tasks
        ],
        "test": {
            name: task.kept.test
            if task.kept
            else _fingerprint(task.test, task.scorer, task.labels, lengths[name], name=name)
            for name, task in columns.items()
        },
    }


def restart_token(config: RunConfig, stage: int) -> str:
    """What stands for a command that redoes a run of this configuration from a stage (from 0) on."""
    return sha256_of([stage, _settings(config.plain())])


def origin_stays(state: Mapping[str, Any], config: RunConfig) -> bool:
    """Whether what a run began with was measured under a configuration, as far as it depends on that."""
    return state["origin"] is not None and not changes(state["config"], config.plain(), stages_only=True)


def stage_named(given: str, names: Sequence[str], done: int) -> int:
    """The stage (from 0) of a task's name or number (from 1). Raises PmLlmError if it is none, or not reached yet."""
    numbers = [i for i, name in enumerate(names) if name == given]
    if not numbers and given.isdigit() and 1 <= int(given) <= len(names):
        numbers = [int(given) - 1]
    if len(numbers) != 1:
        found = f"comes {len(numbers)} times" if numbers else "is no task of this run"
        shown = ", ".join(f"{i} {name}" for i, name in enumerate(names, 1))
        raise PmLlmError(f"--restart-from {given!r} {found}. Give a task by name or number: {shown}.")
    if numbers[0] > done:
        raise PmLlmError(
            f"--restart-from {given!r}: only {done} of {len(names)} tasks are trained. Leave --restart-from out."
        )
    return numbers[0]


def stage_key(config: RunConfig, number: int, rows: str, processes: int) -> str:
    """What a checkpoint in stage `number` belongs to: these settings, rows, processes and this way of sharding."""
    launcher = [os.environ.get(name) for name in LAUNCHER]
    drawn = []  # answers of the model's own are drawn in batches
    if config.parsed_method().says("answers", "own"):
        drawn = [[config.evaluation.batch_size, config.evaluation.batch_tokens]]
    return sha256_of([_settings(config.plain()), number, rows, processes, launcher, *drawn])


def _differences(
    state: dict[str, Any], kept: Sequence[StageRecord], new: dict[str, Any], restarted: bool
) -> list[str]:
    """What differs in what has run: settings, rows trained on, rows scored on."""
    found = changes(state["config"], new["config"], stages_only=restarted)
    count, rows = len(kept), new["rows"]
    columns_fixed = new["config"]["evaluate"] == "all" and state["rows"]["test"].keys() != rows["test"].keys()
    if state["tasks"][:count] != new["tasks"][:count] or columns_fixed:
        return [*found, f"its tasks: {state['tasks']!r} -> {new['tasks']!r}"]
    for i, (old, now) in enumerate(zip(state["rows"]["train"][:count], rows["train"], strict=False)):
        if old != now:
            found.append(f"training rows of task {new['tasks'][i]!r}")
    scored = {name for record in kept for name in record.scores} | set(state["untrained"] or {})
    found += [
        f"test rows of task {name!r}"
        for name in sorted(scored)
        if state["rows"]["test"].get(name) != rows["test"].get(name)
    ]
    return found


def changes(old: dict[str, Any], new: dict[str, Any], stages_only: bool = False, rows: bool = False) -> list[str]:
    """`key: old -> new` of two configurations.

    Args:
        old: One.
        new: The other.
        stages_only: Without what a stage may have of its own.
        rows: With the keys that choose rows, which runs judge by the rows themselves.
    """
    a, b = _settings(old, rows), _settings(new, rows)
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in a | b
        if a.get(key) != b.get(key) and not (stages_only and key.startswith("train."))
    ]


def _settings(config: dict[str, Any], rows: bool = False) -> dict[str, Any]:
    """By dotted key, without those that say nothing or, unless `rows`, are judged by rows."""
    aside = ("fuar", *(("data_dir",) if rows else ROWS))  # FUAR is computed from scores when a run is finished
    return {
        key: value
        for key, value in _flat(config).items()
        if key not in FREE and key.split(".")[0] not in aside and LATER.get(key, NOTHING) != value
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _fingerprint(rows: Iterable[Example], *more: Any, name: str = "") -> str:
    """What rows hold, wherever they lie."""
    found: str = _once(rows, more, lambda: sha256_of_list(map(_plain, rows), *more), name)
    return found


def _once(rows: Iterable[Example], key: Iterable[Any], make: Callable[[], Any], name: str) -> Any:
    """What `make` finds by going through a task's rows; of many rows it does that once."""
    own = getattr(rows, "key", None)
    return make() if own is None else remembered([own, *key], lambda: {"found": make()}, bool, name)["found"]


def _plain(row: Example) -> list[Any]:
    """What a row holds; later fields count where they say something."""
    plain = dataclasses.astuple(dataclasses.replace(row, id=None, place=""))
    size = len(plain)
    while size > FIRST_FIELDS and plain[size - 1] == DEFAULTS[size - 1]:
        size -= 1
    return [*plain[:size]]


def _learnt(task: Task) -> list[str]:
    """Which turns of its chats a task learns, where that makes a difference to its training rows."""

    def several() -> bool:
        return any(turn["role"] == "assistant" for row in task.train for turn in row.messages or ())

    learnt = task.loss_on != "last" and _once(task.train, ["turns"], several, task.name)
    return [task.loss_on] if learnt else []
