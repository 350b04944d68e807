"""Small runs of the embedded tasks."""

from __future__ import annotations

from pm_llm.config import load_config

TASKS = ("sentiment", "topic", "question")


def config_for(model: str, out, **overrides):
    base = {"method": "pm", "model": model, "output_dir": str(out), "benchmark": "embedded", "order": list(TASKS)}
    base |= {"max_train_samples": 24, "max_test_samples": 4, "max_length": 96, "fisher.samples": 6}
    base |= {"train.max_steps": 3, "train.learning_rate": 0.01, "train.logging_steps": 1, "lora.r": 4}
    return load_config(None, {**base, **overrides})
