"""The configuration of a run. YAML sets values, command-line flags override them, an unknown key is an error.

Imports neither torch nor transformers, so that `pm-llm --help` answers at once.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import yaml

from pm_llm.errors import PmLlmError, check_number, check_pattern
from pm_llm.methods import Choice, Method, Setting
from pm_llm.presets import PRESETS, method_of
from pm_llm.sections import (
    MAX_RANK,
    AdapterSection,
    EvaluationSection,
    FisherSection,
    GateSection,
    GeneralSection,
    LoraSection,
    RetainSection,
    TrainSection,
)
from pm_llm.system.coerce import check_no_secrets, cleaned, convert, read_yaml
from pm_llm.system.names import unknown_key
from pm_llm.system.options import check_options, option
from pm_llm.tasks.loading import BENCHMARKS

SEEDS = 2**32  # how many numpy knows
SHORT = {
    "adapter": "path",
    "general": "data",
    "gate": "lose",
    "retain": "data",
}  # sections that may be given as one key's value
# keys of them that mean something without that one
FREELY = {f"general.{key}" for key in ("skills", "when", "lm_eval", "lm_eval_dir", "limit", "apply_chat_template")}


@dataclass
class RunConfig:
    """One run: a model, a sequence of tasks, a method."""

    model: str = option("embedded:llama", "Hub id or folder of the base model, or embedded:llama, embedded:t5.")
    dtype: str = option("float32", "Weights and compute: float32 or bfloat16.", choices=("float32", "bfloat16"))
    attn_implementation: str | None = option(
        None, "Attention: eager, sdpa, flash_attention_2 ... as transformers names them; none: the model's own."
    )
    load_in_4bit: bool = option(False, "Base weights in 4 bits (NF4 by bitsandbytes); adapters keep full precision.")
    benchmark: str | None = option(None, f"A benchmark: {', '.join(BENCHMARKS)}.")
    order: Any = option(None, "An order of the benchmark by name, a list of task names, or random:SEED.")
    repeat: int = option(1, "How many times the sequence is gone through.", least=1)
    blur: float = option(
        0.0, "Share of each task's training rows that come from its neighbours in the sequence.", least=0, below=1
    )
    bad_rows: str = option(
        "error", "Rows that cannot be used: error (all are shown), or drop.", choices=("error", "drop")
    )
    data_dir: str | None = option(
        None, "Folder with the benchmark's rows (none: the Hub), or that `tasks` are relative to."
    )
    tasks: list[Any] = option([], "Your own tasks: files, folders, dataset ids, or mappings with `data`.")
    probes: list[Any] = option([], "Tasks that are scored and never trained, given as `tasks` are.")
    keep_test_rows: bool = option(
        True, "Keep a finished task's test rows in the run, to score it on; without, only scores are kept of it."
    )
    fuar: dict[str, Any] | None = option(None, "For FUAR: {kept: [a task a state], updated: task, acquired: task}.")
    adapter: AdapterSection = field(default_factory=AdapterSection)
    general: GeneralSection = field(default_factory=GeneralSection)
    gate: GateSection = field(default_factory=GateSection)
    retain: RetainSection = field(default_factory=RetainSection)
    method: str = option("pm_curvature", "Preset: " + ", ".join(PRESETS) + ".")
    start: Any = option(None, "Replaces the preset's start.")
    constrain: Any = option(None, "Replaces the preset's constraints: a name, a mapping, a list, or none.")
    merge: Any = option(None, "Replaces the preset's merge: a name, or a mapping with its options.")
    space: str = option(
        "weights",
        "What P&M perturbs and merges: weights, or factors (A and B, which continue).",
        choices=("weights", "factors"),
    )
    max_rank: int | None = option(64, "Rank the running adapter is truncated to; none: never, it grows.", least=1)
    truncation: str = option(
        "plain",
        "What truncation keeps: plain (the largest), or fisher (what matters to tasks).",
        choices=("plain", "fisher"),
    )
    fold_running: str = option(
        "auto",
        "Add the running adapter to the base weights while a task trains: auto (if it can be), always, never.",
        choices=("auto", "always", "never"),
    )
    max_train_samples: int | None = option(None, "At most this many training rows a task.", least=1)
    max_test_samples: int | None = option(None, "At most this many test rows a task.", least=1)
    max_length: int = option(
        512, "Tokens of prompt and answer (T5: of the prompt); longer prompts are shortened.", least=1
    )
    max_new_tokens: int | None = option(
        None, "Longest answer in tokens; none: the task's longest training answer.", least=1
    )
    lora: LoraSection = field(default_factory=LoraSection)
    train: TrainSection = field(default_factory=TrainSection)
    fisher: FisherSection = field(default_factory=FisherSection)
    evaluate: str = option(
        "seen",
        "Scored after each task: seen (tasks so far), final, diagonal+final, all.",
        choices=("seen", "final", "diagonal+final", "all"),
    )
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    seed: int = option(
        0, "Seed of rows, initial adapters, batches and perturbations.", least=0, most=SEEDS - 1, whole=True
    )
    keep_curvature: int = option(
        2,
        "After how many of the last tasks what the merge remembers is kept: so far back a restart needs no old rows.",
        least=1,
    )
    output_dir: str = option("runs/default", "The run's folder.")

    def __post_init__(self) -> None:
        """Sections may be given as mappings. Raises PmLlmError as :func:`load_config`."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, dict) and dataclasses.is_dataclass(f.default_factory):
                setattr(self, f.name, build(typing.cast(type, f.default_factory), value, f"{f.name}."))

    def seed_of(self, number: int) -> int:
        """The seed of task `number` (1, 2, ...)."""
        return (self.seed * 1000 + number) % SEEDS

    def parsed_method(self) -> Method:
        """The method with its overrides."""
        method = method_of(self.method, self.start, self.constrain, self.merge)
        return method if self.space == "weights" else method.in_factors()

    def check(self) -> RunConfig:
        """This configuration. Raises PmLlmError on a value out of range or a choice that cannot be built."""
        check_options(self)
        if self.fuar is not None:
            if set(self.fuar) != {"kept", "updated", "acquired"} or not isinstance(self.fuar["kept"], list):
                raise PmLlmError(f"fuar is {self.fuar!r}; it names kept (a list of tasks), updated and acquired.")
            if self.evaluate != "all" or not self.keep_test_rows:
                raise PmLlmError(
                    "fuar needs scores before training and after every task: set evaluate to all and keep_test_rows "
                    "to true."
                )
        for pattern, rank in self.lora.rank_pattern.items():
            check_pattern("lora.rank_pattern", pattern)
            check_number(f"lora.rank_pattern: {pattern!r}", rank, 1, MAX_RANK, whole=True)
        for pattern, alpha in self.lora.alpha_pattern.items():
            check_pattern("lora.alpha_pattern", pattern)
            if not alpha > 0:
                raise PmLlmError(f"lora.alpha_pattern: {pattern!r} is {alpha}; it must be a number above 0.")
        by_epochs = self.train.max_steps == -1
        if by_epochs and not 0 < self.train.num_train_epochs < inf:
            raise PmLlmError(f"train.num_train_epochs is {self.train.num_train_epochs}; it must be a number above 0.")
        if not by_epochs and self.train.max_steps < 1:
            raise PmLlmError(f"train.max_steps is {self.train.max_steps}; it must be at least 1, or -1 for epochs.")
        if self.evaluation.engine == "openai" and self.evaluation.mode == "labels":
            raise PmLlmError(
                "evaluation.engine openai generates, evaluation.mode labels asks for likelihoods. Give one of them."
            )
        if self.gate.lose is not None:
            self._check_gate()
        if self.fold_running == "always" and self.parsed_method().says("needs_base"):
            raise PmLlmError(
                "constrain anchor to the base needs the base as it is: set fold_running to auto or never."
            )
        check_no_secrets(self.plain())
        self._check_beginning()
        self.check_method()
        return self

    def _check_gate(self) -> None:
        if self.evaluate not in ("seen", "all") or not self.keep_test_rows:
            raise PmLlmError(
                "a gate compares every task with what it was: set evaluate to seen, keep_test_rows to true."
            )
        if self.gate.action == "restore" and self.fuar is not None:
            raise PmLlmError(
                "FUAR names a task for each of a run's states, so none can be taken back: gate.action stop."
            )
        if self.parsed_method().task_id:
            raise PmLlmError(f"method {self.method} keeps a model for each task, so no task costs another: no gate.")

    def check_method(self, kinds: Iterable[str] = ()) -> None:
        """Raise PmLlmError unless the method goes with the rest, and with tasks of these kinds of rows."""
        self.parsed_method().check(
            Setting(
                rank=max([self.lora.r, *self.lora.rank_pattern.values()]),
                max_rank=self.max_rank,
                load_in_4bit=self.load_in_4bit,
                truncation=self.truncation,
                space=self.space,
                own_start=method_of(self.method, self.start).start,
                start_given=self.start is not None,
                adapter=self.adapter.path is not None,
                general=self.general.data is not None,
                retain=self.retain.data is not None,
                kinds=frozenset(kinds),
            )
        )

    def _check_beginning(self) -> None:
        for section, key in SHORT.items():
            given, default = getattr(self, section), type(getattr(self, section))()
            names = [f.name for f in dataclasses.fields(given) if f"{section}.{f.name}" not in FREELY]
            lost = [name for name in names if getattr(given, name) != getattr(default, name)]
            if getattr(given, key) is None and lost:
                raise PmLlmError(f"{section}.{lost[0]} is given, and {section}.{key} is not. Give both, or neither.")

    def plain(self) -> dict[str, Any]:
        """As YAML would hold it: no tuple, no :class:`Choice`; a path or a date as text."""

        def word(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [word(x) for x in value]
            return value.plain() if isinstance(value, Choice) else value

        words = {name: word(getattr(self, name)) for name in ("start", "constrain", "merge")}
        found: dict[str, Any] = json.loads(json.dumps({**dataclasses.asdict(self), **words}, default=str))
        return found


def load_config(path: str | Path | Mapping[str, Any] | None, overrides: dict[str, Any] | None = None) -> RunConfig:
    """A configuration from a YAML file, a mapping of the same shape or the defaults, and overrides by dotted key, e.g.
    `{"lora.r": 4}`.

    Raises:
        PmLlmError: If the file is missing or no mapping, a key is unknown (the nearest known one is named), or a value
            has the wrong type, or a method is given over a file that replaces words of another.
    """
    values: dict[str, Any] = {}
    if isinstance(path, Mapping):
        return configured(copy.deepcopy(dict(path)), overrides, "the mapping")
    if path is not None:
        try:
            values = read_yaml(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise PmLlmError(f"cannot read the configuration {path}: {error.strerror}.") from error
        except (yaml.YAMLError, ValueError) as error:  # also bytes that are no UTF-8, and 2024-02-30
            raise PmLlmError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise PmLlmError(f"{path} holds no mapping of keys to values.")
    return configured(values, overrides, str(path or "the command line"))


def configured(values: dict[str, Any], overrides: dict[str, Any] | None, path: str) -> RunConfig:
    """A configuration from values as `path` holds them, and overrides. Raises as :func:`load_config`."""
    values, given = cleaned(values, path), cleaned(overrides or {}, "the command line")
    method = values.get("method", RunConfig.method)
    if given.get("method", method) != method:
        usual = {"start": "null", "constrain": "null", "merge": "null", "space": RunConfig.space}
        words = [w for w in usual if values.get(w) not in (None, usual[w]) and w not in given]
        if words:
            raise PmLlmError(
                f"{path} sets {', '.join(f'{w}: {values[w]!r}' for w in words)}, which would replace what "
                f"{given['method']!r} has. Give {' '.join(f'--{w} {usual[w]}' for w in words)} for "
                "the method's own, or the words that you want."
            )
    for section, name in SHORT.items():  # a text stands for the section's first key
        for some in (values, given):
            if section in some and not isinstance(some[section], dict):
                some[section] = {name: some[section]}
        if section in given:
            given |= {f"{section}.{key}": x for key, x in given.pop(section).items()}
    for key, value in given.items():
        section, _, name = key.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        if not isinstance(target, dict):
            raise PmLlmError(f"{section!r} is {target!r}, so {key!r} cannot be set.")
        target[name] = value
    found: RunConfig = build(RunConfig, values, "")
    return found


def flags() -> list[tuple[str, str]]:
    """Every dotted key with its help text and default, for `--help`."""
    rows, hints = [], typing.get_type_hints(RunConfig)
    for f in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(f.default_factory):
            rows += [(f"{f.name}.{g.name}", _help(g)) for g in dataclasses.fields(f.default_factory)]
        else:
            rows.append((f.name, _help(f, "unset" if hints[f.name] is Any else "none")))  # which `none` would not mean
    return rows


def _help(f: dataclasses.Field[Any], nothing: str = "none") -> str:
    default = f.default_factory() if callable(f.default_factory) else f.default
    shown = nothing if default is None else default
    return f"{f.metadata['help']} (default: {shown})"


def build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """The dataclass `cls` from a mapping. Raises PmLlmError on an unknown key or a value of the wrong type."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    built = {}
    for key, value in values.items():
        if key not in known:
            everywhere = [name for name, _ in flags()]
            raise unknown_key(prefix + str(key), [prefix + name for name in known], everywhere)
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise PmLlmError(f"{prefix}{key} is {value!r}; it must be a mapping.")
            built[key] = build(typing.cast(type, hints[key]), value, f"{prefix}{key}.")
        else:
            built[key] = convert(value, hints[key], prefix + key)
    return cls(**built)
