"""Training one task with the Trainer of the model's family, from its newest checkpoint if there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from pm_llm.config import RunConfig
from pm_llm.constraints.base import Constraint
from pm_llm.errors import PmLlmError, first_line
from pm_llm.families.base import Family
from pm_llm.system.progress import TrainingBar, say
from pm_llm.system.sharding import weights_only
from pm_llm.training.arguments import training_arguments
from pm_llm.training.checkpoints import Checkpoints
from pm_llm.training.constrained import AlreadyTrainedError
from pm_llm.training.patches import original_forward
from pm_llm.training.stopping import Stopping


class SaveSteps(TrainerCallback):
    """Makes a resumed training save as often as the configuration says now, not as the checkpoint remembers."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


def train(
    model: Any,
    tokenizer: Any,
    family: Family,
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
    arguments = training_arguments(config, family, checkpoints.folder, seed, steps)
    if (newest := checkpoints.newest()) is not None:
        say(f"{label}: going on from {Path(newest).name}")
    with stopping.gently() as stop, original_forward(model), _tensorboard_in(config.output_dir, checkpoints.folder):
        with _told(bool(config.train.extra)):
            trainer = family.trainer_class()(
                model,
                args=arguments,
                train_dataset=rows,
                data_collator=family.collator(tokenizer, model),
                processing_class=tokenizer,
                constraint=constraints,
                checkpoints=checkpoints,
                callbacks=[TrainingBar(f"train {label}"), stop, SaveSteps()],
            )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        try:
            with weights_only(), _told(extra=False):
                trainer.train(resume_from_checkpoint=newest)
        except AlreadyTrainedError:
            model.train()  # as it would be, for the constraints to log
            trainer.log({})
        # under ZeRO-3 transformers would go on sharding what is loaded, and wait for all processes at every token
        unset_hf_deepspeed_config()
        return list(trainer.state.log_history)


@contextmanager
def _tensorboard_in(run: str, work: Path) -> Iterator[None]:
    """Where TensorBoard's events go, if they are asked for: beside the checkpoints in `work` they would vanish."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:  # the user's
        yield
        return
    os.environ[name] = str(Path(run) / "logs" / work.name)
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _told(extra: bool) -> Iterator[None]:
    """What the libraries say against settings, in one line; with `extra` whatever they say is about those."""
    try:
        yield
    except (PmLlmError, AlreadyTrainedError):
        raise
    except (ValueError, RuntimeError, ImportError) as error:
        if "PEFT adapter" in str(error):  # of modules that TRL does not train
            raise PmLlmError(str(error)) from error
        # `train.extra` may ask for what does not go together, or is not installed
        if extra or isinstance(error, ImportError):
            raise PmLlmError(f"train: {first_line(error)}") from error
        raise
