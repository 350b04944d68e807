"""What other tools call the keys of a configuration, for whoever comes from there."""

from __future__ import annotations

from collections.abc import Sequence

from pm_llm.errors import PmLlmError, unknown_name

# a key of TRL, transformers or axolotl -> the key here, or what to do in its place
ELSEWHERE = {
    "model_name_or_path": "`model`",
    "base_model": "`model`",
    "torch_dtype": "`dtype`",
    "bf16": "`dtype: bfloat16`",
    "fp16": "`dtype: bfloat16` (float16 is not offered: it needs a scaled loss)",
    "load_in_8bit": "`load_in_4bit`",
    "dataset": "`tasks`",
    "datasets": "`tasks`",
    "dataset_name": "`tasks`",
    "data": "`tasks`",
    "lr": "`train.learning_rate`",
    "epochs": "`train.num_train_epochs`",
    "num_epochs": "`train.num_train_epochs`",
    "batch_size": "`train.per_device_train_batch_size`",
    "micro_batch_size": "`train.per_device_train_batch_size`",
    "lr_scheduler": "`train.lr_scheduler_type`",
    "optimizer": "`train.optim`",
    "warmup_ratio": "`train.warmup_steps` (a number below 1 is a share of all steps)",
    "sample_packing": "`train.packing`",
    "sequence_len": "`max_length`",
    "max_seq_length": "`max_length`",
    "max_seq_len": "`max_length`",
    "model_max_length": "`max_length`",
    "rank": "`lora.r`",
    "alpha": "`lora.lora_alpha`",
    "lora_r": "`lora.r`",
    "lora_dropout": "`lora.lora_dropout`",
    "lora_alpha": "`lora.lora_alpha`",
    "lora_target_modules": "`lora.target_modules`",
    "peft_config": "`lora`",
    "output": "`output_dir`",
    "report_to": "`train.extra: {report_to: ...}`",
    "val_set_size": "`validation_size` of a task",
    "eval_strategy": "nothing: a run scores whole tasks. Rows to choose settings on: `validation_size` of a task, and "
    "`evaluation.split: validation`",
}


def unknown_key(given: str, known: Sequence[str], everywhere: Sequence[str]) -> PmLlmError:
    """The error for a key that there is not, with the one that is meant.

    Args:
        given: The dotted key.
        known: The keys of its section, dotted.
        everywhere: All keys, dotted.
    """
    name = given.rpartition(".")[2]
    there = [f"`{key}`" for key in everywhere if key.rpartition(".")[2] == name]
    meant = ELSEWHERE.get(name) or " or ".join(there)
    if meant:
        return PmLlmError(f"unknown key {given!r}. It is {meant} here (all keys: pm-llm run --help).")
    return unknown_name("key", given, known)
