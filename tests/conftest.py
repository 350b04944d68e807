"""Pico models built from a config, small tasks, and the folder of shared data where it exists."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from pm_llm.cli import main
from pm_llm.families import base as families
from pm_llm.families.models import EMBEDDED
from pm_llm.tasks.base import Task
from pm_llm.tasks.benchmarks.embedded import make_task
from pm_llm.tasks.encoding import Encoder
from tests.helpers.forks import ROOT, Forker

SHARED = ROOT.parent / "shared"
FAMILIES = ("llama", "t5")
DECODER = families.family("decoder")
KINDS = {"llama": DECODER, "t5": families.family("encoder_decoder")}

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # on AMD's sums depend on where in memory numbers lie
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not SHARED.is_dir():
        for item in items:
            if "shared" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="the folder ../shared is not here"))


def pytest_collection_finish() -> None:
    """Every training ends with a garbage collection, which took 0.5 s over the objects of all that is imported."""
    gc.collect()
    gc.freeze()


def make_model(family: str, seed: int = 0):
    """A pico LLaMA (2 layers) or T5 (1 + 1), float32, no dropout."""
    set_seed(seed)
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=1024,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=2,
            )
        )
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=1024,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def targets(family: str) -> list[str]:
    return ["q_proj", "v_proj"] if family == "llama" else ["q", "v"]


def make_peft(family: str, name: str = "default", seed: int = 0, random_b: bool = False, **options):
    """A pico PeftModel with one trainable adapter; `random_b` gives it a non-zero update."""
    model = make_model(family, seed)
    set_seed(seed + 1)
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "target_modules": targets(family),
            "init_lora_weights": not random_b,
            "task_type": KINDS[family].task_type,
            **options,
        }
    )
    return get_peft_model(model, config, adapter_name=name)


def tokenizer(family: str):
    return AutoTokenizer.from_pretrained(EMBEDDED / family)


def features(family: str, rows: int = 16, task: str = "sentiment") -> list[dict[str, list[int]]]:
    """Encoded training rows of an embedded task."""
    encoder = Encoder(tokenizer(family), KINDS[family], 64, 6)
    return encoder.features(make_task(task, rows, 1).train)


def small_tasks(*names: str, train: int = 24, test: int = 8) -> list[Task]:
    return [make_task(name, train, test) for name in names]


def batch_of(family: str, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Right-padded model inputs."""
    length = max(len(row["input_ids"]) for row in rows)
    width = max(len(row["labels"]) for row in rows)
    return {
        "input_ids": torch.tensor([r["input_ids"] + [0] * (length - len(r["input_ids"])) for r in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(r["input_ids"]) + [0] * (length - len(r["input_ids"])) for r in rows]
        ),
        "labels": torch.tensor([r["labels"] + [-100] * (width - len(r["labels"])) for r in rows]),
    }


@pytest.fixture(scope="session")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with Forker(tmp_path_factory.mktemp("forker")) as found:
        yield found


@pytest.fixture(scope="session")
def pico_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Both pico models with their tokenizers, on disk."""
    root = tmp_path_factory.mktemp("pico")
    for family in FAMILIES:
        make_model(family).save_pretrained(root / family)
        tokenizer(family).save_pretrained(root / family)
    return {family: str(root / family) for family in FAMILIES}


def pm_llm(*arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pm_llm.cli", *map(str, arguments)], capture_output=True, text=True, **kwargs
    )


@pytest.fixture
def run(capsys, pico_folders, tmp_path):
    """Run `pm-llm run` in this process; give exit code and error line."""

    def call(*arguments: str, **extra: object) -> tuple[int, str]:
        base = {"--model": pico_folders["llama"], "--benchmark": "embedded", "--order": "sentiment,topic"}
        base |= {"--output_dir": tmp_path / "run", "--max_train_samples": 8, "--max_test_samples": 2}
        base |= {"--train.max_steps": 1, "--fisher.samples": 2, "--max_length": 96}
        for key in [a for a in arguments if str(a).startswith("--")]:
            base.pop(key, None)
        if "--tasks" in arguments:
            base.pop("--benchmark"), base.pop("--order")
        code = main(["run", *[str(x) for pair in base.items() for x in pair], *map(str, arguments)])
        return code, capsys.readouterr().err

    return call
