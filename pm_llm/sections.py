"""The sections of a run's configuration: the adapter, its training, curvature, what the run begins with, evaluation.

Imports neither torch nor transformers, so that `pm-llm --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pm_llm.system.options import option

MAX_RANK = 4096  # of an adapter: beyond the width of most layers


@dataclass
class LoraSection:
    """The task adapter, with PEFT's names."""

    r: int = option(8, "Rank of each task's adapter.", least=1, most=MAX_RANK)
    lora_alpha: int = option(
        16, "LoRA alpha; the update is scaled by alpha / r (alpha / sqrt(r) with rsLoRA).", above=0
    )
    lora_dropout: float = option(0.0, "Dropout on the adapter's input while training.", least=0, most=1)
    target_modules: list[str] | str | None = option(
        None, "Modules, a pattern for whole names, or all-linear; none: q and v projections."
    )
    layers_to_transform: list[int] | None = option(None, "Only these layer numbers; none: all.")
    use_rslora: bool = option(False, "Rank-stabilised scaling.")
    rank_pattern: dict[str, int] = option({}, "Module pattern -> rank, where it differs from r.")
    alpha_pattern: dict[str, float] = option({}, "Module pattern -> alpha, where it differs from lora_alpha.")


@dataclass
class TrainSection:
    """Training of each task, with transformers' names."""

    learning_rate: float = option(1e-3, "Peak learning rate.", above=0)
    num_train_epochs: float = option(1.0, "Passes over each task's rows (ignored with max_steps).")
    max_steps: int = option(-1, "Optimizer steps per task; -1: by num_train_epochs.")
    per_device_train_batch_size: int = option(8, "Rows per process and forward pass.", least=1)
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step.", least=1)
    lr_scheduler_type: str = option("constant", "Learning-rate schedule within a task.")
    warmup_steps: float = option(0.0, "Warm-up steps, or their share of the task if below 1.", least=0)
    weight_decay: float = option(0.0, "Weight decay on the adapter.", least=0)
    max_grad_norm: float = option(1.0, "Gradient clipping.", least=0)
    optim: str = option("adamw_torch", "Optimizer.")
    packing: bool = option(False, "Several rows in one of max_length, each by itself: nothing is padded.")
    train_sampling_strategy: str = option(
        "random", "Order of rows: random, or group_by_length (less padding).", choices=("random", "group_by_length")
    )
    beta: float = option(0.1, "DPO's, of preference pairs: how strongly the reference holds.", above=0)
    gradient_checkpointing: bool = option(False, "Trade compute for memory.")
    logging_steps: int = option(10, "Steps between two log lines.", least=1)
    save_steps: int = option(
        500, "Optimizer steps between two checkpoints within a task; one more at its end.", least=1
    )
    extra: dict[str, Any] = option(
        {}, "Other fields of TrainingArguments (e.g. report_to); what a run must decide itself is refused."
    )


@dataclass
class FisherSection:
    """Curvature of each task, for methods that use it."""

    form: str = option(
        "factored",
        "Of the Fisher in the space of the weights, where the merge names none (pm_curvature's does): factored (row "
        "and column sums), dense (the whole diagonal), or kronecker (more than a diagonal).",
        choices=("dense", "factored", "kronecker"),
    )
    samples: int = option(128, "Training rows whose gradients are averaged.", least=1)
    labels: str = option(
        "given",
        "Answers whose loss is differentiated: given (the rows'), or sampled (the model's own: the true Fisher).",
        choices=("given", "sampled"),
    )
    max_new_tokens: int = option(128, "Longest sampled answer in tokens.", least=1)
    batch_size: int = option(4, "Rows per forward pass.", least=1)
    storage: str = option(
        "memory",
        "Where a dense Fisher's sums lie: memory, or disk (files mapped into memory).",
        choices=("memory", "disk"),
    )


@dataclass
class AdapterSection:
    """An adapter made elsewhere, which a run begins with."""

    path: str | None = option(
        None, "Folder or Hub id of a LoRA adapter made elsewhere, which the run begins with and later tasks keep."
    )
    revision: str | None = option(None, "Its revision on the Hub.")
    subfolder: str | None = option(None, "The folder in it that holds the adapter.")
    data: str | dict[str, Any] | list[Any] | None = option(
        None,
        "Its curvature is measured on: rows of its task, or prompts alone, which the model answers (given as an entry "
        "of `tasks`); none: on text that the model writes itself.",
    )
    labels: str = option(
        "given",
        "Answers to these: given (where the rows have some), or sampled from the model.",
        choices=("given", "sampled"),
    )
    protect: bool = option(True, "Whether its curvature is measured; without, nothing keeps later tasks off it.")


@dataclass
class GeneralSection:
    """What the base model can do by itself, as a past task."""

    data: str | dict[str, Any] | list[Any] | None = option(
        None, "Rows or prompts that show what the base model must not lose (given as an entry of `tasks`)."
    )
    samples: int = option(256, "Of these, how many its curvature is measured on.", least=1)
    labels: str = option(
        "sampled", "Answers to these: sampled from the base model, or given in the rows.", choices=("given", "sampled")
    )
    weight: float = option(1.0, "Of its curvature, beside a task's.", above=0)
    skills: str | list[str] | None = option(
        None, "Skills of the general suite that are scored: all, or a list (instructions, arithmetic, json ...)."
    )
    lm_eval: list[str] = option([], "Tasks of lm-evaluation-harness that are scored on the live model (ifeval ...).")
    lm_eval_dir: str | None = option(None, "Folder with YAML files of tasks for lm_eval.")
    limit: int | None = option(None, "At most this many rows of each task of lm_eval.", least=1)
    apply_chat_template: bool = option(False, "Whether lm_eval renders prompts by the model's chat template.")
    when: str = option(
        "each",
        "General abilities are scored before the first task and after each, or after the last.",
        choices=("each", "last"),
    )


@dataclass
class GateSection:
    """Whether a task may stay that cost more than it may."""

    lose: float | None = option(
        None, "Points (percent of a perplexity) that earlier tasks and probes may lose; none: no gate.", least=0
    )
    gain: float | None = option(None, "Points that each task must gain; none: not looked at.", least=0)
    level: float = option(0.95, "Of the intervals, over all that is guarded.", least=0.5, most=0.9999)
    action: str = option(
        "stop",
        "Where the gate fails: stop (the task stays), restore (the stage before it is the current one) or warn.",
        choices=("stop", "restore", "warn"),
    )


@dataclass
class RetainSection:
    """Rows of another kind that are mixed into every task's training."""

    data: str | dict[str, Any] | list[Any] | None = option(
        None, "Rows with answers that are mixed into every task's training (given as an entry of `tasks`)."
    )
    share: float = option(0.05, "Of what is trained on in each task.", above=0, below=1)


@dataclass
class EvaluationSection:
    """How the test rows are answered."""

    mode: str = option(
        "generate",
        "generate: greedy answers; labels: the most likely option, where a task has labels.",
        choices=("generate", "labels"),
    )
    split: str = option("test", "Rows that are scored: test, or validation.", choices=("test", "validation"))
    engine: str = option(
        "transformers",
        "What answers prompts: transformers (the model here), or openai (a server that speaks OpenAI's protocol).",
        choices=("transformers", "openai"),
    )
    url: str | None = option(
        None, "Where the server is (none: http://localhost:8000/v1); its key is in OPENAI_API_KEY."
    )
    served: str | None = option(None, "The base model's name at the server; none: `model`.")
    parallel: int = option(16, "Prompts that the server is asked at once.", least=1)
    retries: int = option(4, "How often a prompt is asked again.", least=0)
    timeout: float = option(600.0, "Seconds to wait for an answer.", above=0)
    batch_size: int = option(64, "At most this many prompts decoded together.", least=1)
    batch_tokens: int = option(
        8192, "At most this many tokens, prompts with padding and answers, decoded together.", least=1
    )
