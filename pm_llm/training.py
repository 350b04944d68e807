"""Training one task with the Trainer of the model's family, from its newest checkpoint if there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch.optim import SGD
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments, get_scheduler
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig

from pm_llm.checkpoints import Checkpoints
from pm_llm.config import RunConfig
from pm_llm.constraints import Constraint
from pm_llm.errors import PmLlmError, first_line
from pm_llm.models import Base
from pm_llm.processes import process_state
from pm_llm.progress import TrainingBar, say
from pm_llm.sharding import weights_only
from pm_llm.stopping import Stopping
from pm_llm.trainer import AlreadyTrainedError, ContinualSeq2SeqTrainer, ContinualSFTTrainer, original_forward
from pm_llm.values import extra_value

# fields of TrainingArguments and SFTConfig that going on from a checkpoint, or which rows are trained on, depends on
OURS = {
    *("output_dir", "seed", "save_strategy", "save_steps", "save_only_model", "save_total_limit", "ignore_data_skip"),
    *("load_best_model_at_end", "auto_find_batch_size", "push_to_hub", "eval_strategy", "eval_on_start"),
    *("max_length", "packing", "padding_free", "assistant_only_loss", "dataloader_drop_last", "completion_only_loss"),
    *("pad_to_multiple_of", "pad_token", "eos_token", "chat_template_path", "truncation_mode", "eval_packing"),
    *("dataset_text_field", "dataset_kwargs"),
}


class SaveSteps(TrainerCallback):
    """Checkpoints are as frequent as is asked for now, not as when the one that training goes on from was written."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


def train(
    model: Any,
    base: Base,
    config: RunConfig,
    rows: Dataset,
    steps: int,
    label: str,
    seed: int,
    constraints: Sequence[Constraint],
    checkpoints: Checkpoints,
    stopping: Stopping,
) -> list[dict[str, Any]]:
    """Train `model` (a PeftModel with one trainable adapter) on encoded rows, and return the Trainer's log lines.

    `steps` is `max_steps`; -1: as many as `num_train_epochs` takes.

    Raises:
        PmLlmError: If the Trainer does not take the settings, the loss is not finite, or a checkpoint cannot be
            written.
        Stopped: After a signal, with a checkpoint of the step it came in.
    """
    arguments = training_arguments(config, base.seq2seq, checkpoints.folder, seed, steps)
    newest = checkpoints.newest()
    if newest is not None:
        say(f"{label}: going on from {Path(newest).name}")
    trainer_class = ContinualSeq2SeqTrainer if base.seq2seq else ContinualSFTTrainer
    with stopping.gently() as stop, original_forward(model):
        try:
            trainer = trainer_class(
                model,
                args=arguments,
                train_dataset=rows,
                data_collator=DataCollatorForSeq2Seq(base.tokenizer, model),
                processing_class=base.tokenizer,
                constraint=constraints,
                checkpoints=checkpoints,
                callbacks=[TrainingBar(f"train {label}"), stop, SaveSteps()],
            )
        except PmLlmError:
            raise
        except (ValueError, RuntimeError, ImportError) as error:
            if "PEFT adapter" in str(error):  # of modules that TRL does not train
                raise PmLlmError(str(error)) from error
            if not config.train.extra:
                raise
            # it may ask for what does not go together, or is not installed
            raise PmLlmError(f"train: {first_line(error)}") from error
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        try:
            with weights_only():
                trainer.train(resume_from_checkpoint=newest)
        except ImportError as error:  # of what `train.extra` asks for
            raise PmLlmError(f"train: {first_line(error)}") from error
        except AlreadyTrainedError:
            model.train()  # as it would be, for the constraints to log
            trainer.log({})
        except ValueError as error:
            if "managed by another FSDP group" not in str(error):
                raise
            raise PmLlmError(
                "FSDP2 cannot share out this model, whose encoder and decoder have one embedding (with accelerate "
                "1.15 and torch 2.13). Use accelerate_configs/zero3.yaml, or ddp.yaml."
            ) from error
        # under ZeRO-3 transformers would go on sharding what is loaded, and wait for all processes at every token
        unset_hf_deepspeed_config()
        return trainer.state.log_history


def training_arguments(config: RunConfig, seq2seq: bool, folder: Path, seed: int, steps: int | None = None) -> Any:
    """The Trainer's arguments for one task, of `steps` steps if given.

    Raises:
        PmLlmError: If transformers does not take them.
    """
    own = [key for key in config.train.extra if key in vars(config.train)]
    if own:
        raise PmLlmError(f"train.extra sets {', '.join(own)}, a key of its own. Set train.{own[0]} instead.")
    taken = sorted(OURS & config.train.extra.keys())
    if taken:
        raise PmLlmError(f"train.extra sets {', '.join(taken)}, which a run must decide itself. Leave it out.")
    cpu = process_state().device.type == "cpu"
    if cpu and config.train.extra.get("activation_offloading"):
        raise PmLlmError("train.extra sets activation_offloading, which has no use on a CPU. Leave it out.")
    fields = {key: value for key, value in vars(config.train).items() if key != "extra"}
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
    if not seq2seq:
        fields["max_length"] = None  # rows are cut inside their frame already
    arguments_class = Seq2SeqTrainingArguments if seq2seq else SFTConfig
    hints = {f.name: f.type for f in dataclasses.fields(arguments_class)}
    extra = {key: extra_value(x, hints.get(key), f"train.extra.{key}") for key, x in config.train.extra.items()}
    try:
        arguments = arguments_class(**{**fields, **extra})
    except (TypeError, ValueError, ImportError) as error:
        raise PmLlmError(f"train: {error}. `train.extra` takes the fields of TrainingArguments.") from error
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
    return arguments
