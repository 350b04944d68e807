"""The Trainer's arguments, from a run's configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim import SGD
from transformers import get_scheduler

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError, first_line
from pm_llm.families.base import Family
from pm_llm.system.coerce import extra_value
from pm_llm.system.processes import process_state

# fields of TrainingArguments and SFTConfig that going on from a checkpoint, or which rows are trained on, depends on
OURS = {
    *("output_dir", "seed", "save_strategy", "save_steps", "save_only_model", "save_total_limit", "ignore_data_skip"),
    *("load_best_model_at_end", "auto_find_batch_size", "push_to_hub", "eval_strategy", "eval_on_start"),
    *("max_length", "packing", "padding_free", "assistant_only_loss", "dataloader_drop_last", "completion_only_loss"),
    *("pad_to_multiple_of", "pad_token", "eos_token", "chat_template_path", "truncation_mode", "eval_packing"),
    *("dataset_text_field", "dataset_kwargs"),
}

OWN = ("extra", "packing", "beta")  # of the section `train`: what a family or a stage reads by itself


def training_arguments(config: RunConfig, family: Family, folder: Path, seed: int, steps: int | None = None) -> Any:
    """The Trainer's arguments for one task, of `steps` steps if given.

    Raises:
        PmLlmError: If transformers does not take them.
    """
    cpu = process_state().device.type == "cpu"
    _check_extra(config, family, cpu)
    fields = {key: value for key, value in vars(config.train).items() if key not in OWN}
    fields |= {
        "output_dir": str(folder),
        "seed": seed,
        "max_steps": config.train.max_steps if steps is None else steps,
        "bf16": config.dtype == "bfloat16",
        "save_strategy": "steps",
        "report_to": "none",
        "use_cpu": cpu,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not cpu,
        "ddp_broadcast_buffers": False,  # no module here changes one, and those of OSFT are as large as weights
    }
    fields |= family.arguments()
    arguments_class = family.arguments_class()
    hints = {f.name: f.type for f in dataclasses.fields(arguments_class)}
    extra = {key: extra_value(x, hints.get(key), f"train.extra.{key}") for key, x in config.train.extra.items()}
    try:
        arguments = arguments_class(**{**fields, **extra})
    except (TypeError, ValueError, ImportError) as error:
        raise PmLlmError(f"train: {error}. `train.extra` takes the fields of TrainingArguments.") from error
    _try_schedule(config, arguments)
    return arguments


def _check_extra(config: RunConfig, family: Family, cpu: bool) -> None:
    """Raise PmLlmError if `train.extra` sets what it must not."""
    own = [key for key in config.train.extra if key in vars(config.train)]
    if own:
        raise PmLlmError(f"train.extra sets {', '.join(own)}, a key of its own. Set train.{own[0]} instead.")
    taken = sorted((OURS | family.refused) & config.train.extra.keys())
    if taken:
        raise PmLlmError(f"train.extra sets {', '.join(taken)}, which a run must decide itself. Leave it out.")
    if config.train.extra.get("fsdp"):
        raise PmLlmError("train.extra sets fsdp. Launch with accelerate_configs/fsdp2.yaml instead.")
    if cpu and config.train.extra.get("activation_offloading"):
        raise PmLlmError("train.extra sets activation_offloading, which has no use on a CPU. Leave it out.")


def _try_schedule(config: RunConfig, arguments: Any) -> None:
    """Raise PmLlmError if the schedule of the learning rate lacks something."""
    name, kwargs = arguments.lr_scheduler_type, cast("dict[str, Any] | None", arguments.lr_scheduler_kwargs)
    try:
        optimizer = SGD([torch.zeros(1)], lr=config.train.learning_rate)
        scheduler = get_scheduler(name, optimizer, 0, 2, scheduler_specific_kwargs=kwargs)
        optimizer.step()
        scheduler.step()
    except (TypeError, ValueError, ArithmeticError) as error:
        raise PmLlmError(
            f"train: {config.train.lr_scheduler_type}: {first_line(error)}. Give what it needs in "
            "train.extra.lr_scheduler_kwargs."
        ) from error
