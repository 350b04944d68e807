"""A preset on two small tasks."""

from __future__ import annotations

from pathlib import Path

from pm_llm import ContinualSequence
from pm_llm.config import load_config
from tests.conftest import small_tasks
from tests.helpers.kinds import kind_tasks

KEYS = {
    "lora.r": 4,
    "train.learning_rate": 1e-2,
    "train.per_device_train_batch_size": 4,
    "train.max_steps": 3,
    "train.save_steps": 1,
    "fisher.samples": 4,
    "max_new_tokens": 1,
    "evaluate": "final",
}


# constraints that would sleep through three steps
AWAKE = {
    "pam": {"constrain": {"name": "align", "every": 1}},
    # Adam's first steps move all entries alike: which of them are the largest would be decided by rounding
    "lori": {"constrain": {"name": "lori", "calibration": 0.6}, "train.optim": "sgd"},
    "coso": {"constrain": {"name": "gradient_subspace", "size": 2}},
}


def sequence(preset: str, model: str, folder: Path, kind: str = "embedded", **keys) -> ContinualSequence:
    """With tasks of a kind of rows, see :mod:`tests.helpers.kinds`, or the embedded ones."""
    config = load_config(
        None, {**KEYS, "model": model, "method": preset, "output_dir": str(folder), **AWAKE.get(preset, {}), **keys}
    )
    small = small_tasks("sentiment", "topic", train=12, test=2)
    return ContinualSequence(config, small if kind == "embedded" else kind_tasks(kind))
