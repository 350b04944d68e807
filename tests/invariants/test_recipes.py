"""Law 9: every recipe parses and names a real model family, benchmark and method."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from pm_llm.cli import main
from pm_llm.config import flags, load_config
from pm_llm.errors import PmLlmError
from pm_llm.families.models import lora_config, resolve
from pm_llm.presets import PRESETS
from pm_llm.tasks.loading import BENCHMARKS, load_benchmark
from pm_llm.tasks.order import pick_order
from pm_llm.training.arguments import training_arguments
from tests.conftest import KINDS, ROOT, pm_llm

RECIPES = sorted(p for kind in ("*.yaml", "*.yml") for p in (ROOT / "recipes").rglob(kind))
LAUNCHERS = sorted(p for kind in ("*.yaml", "*.yml") for p in (ROOT / "accelerate_configs").rglob(kind))
# Hub ids that recipes may name -> whether the model is an encoder-decoder; the Hub cannot be asked in a test
KNOWN = {
    "google-t5/t5-large": True,
    "meta-llama/Llama-2-7b-hf": False,
    "HuggingFaceTB/SmolLM2-135M-Instruct": False,
    "Qwen/Qwen2.5-0.5B-Instruct": False,
}


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 12
    assert len(LAUNCHERS) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipe(path: Path, tmp_path) -> None:
    config = load_config(path).check()
    method = config.parsed_method()
    for kind, choices in (("start", [method.start]), ("merge", [method.merge]), ("constrain", method.constrain)):
        for choice in choices:
            choice.build(kind)
    own = {word: None for word in ("start", "constrain", "merge") if getattr(config, word) is not None}
    for name, preset in PRESETS.items():  # another method takes the place of the words that a recipe has of its own
        assert load_config(path, {"method": name, **own}).parsed_method() == preset
    if config.model.startswith("embedded:"):
        kind = KINDS["t5" if "t5" in config.model else "llama"]
        assert Path(resolve(config.model), "model.safetensors").is_file()
    else:
        kind = KINDS["t5" if KNOWN[config.model] else "llama"]
    assert config.benchmark in BENCHMARKS or config.tasks
    targets = config.lora.target_modules or []
    assert not set(targets) & ({"q_proj", "v_proj"} if kind is KINDS["t5"] else {"q", "v"})
    if config.benchmark is not None:
        benchmark = load_benchmark(config.benchmark)
        assert pick_order(config.order, benchmark.ORDERS, list(benchmark.TASKS))
    # what the sequence itself builds from it
    arguments = training_arguments(config, kind, tmp_path, 0)
    assert arguments.learning_rate == config.train.learning_rate
    assert arguments.bf16 == (config.dtype == "bfloat16")
    assert lora_config(config.lora, targets or ["q"], kind).r == config.lora.r


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: p.name)
def test_launcher(path: Path) -> None:
    assert load_config_from_file(str(path)).num_processes >= 1


def test_every_folder_of_recipes_has_a_readme() -> None:
    for folder in {path.parent for path in RECIPES}:
        text = (folder / "README.md").read_text()
        for path in folder.glob("*.yaml"):
            assert path.name in text, f"{folder}/README.md does not mention {path.name}"


def test_help_lists_every_key() -> None:
    keys = [key for key, _ in flags()]
    assert len(keys) == len(set(keys))
    assert {"model", "lora.r", "train.learning_rate", "fisher.samples", "evaluate"} <= set(keys)
    text = pm_llm("run", "--help").stdout
    assert all(f"  --{key}\n" in text for key in keys)


def test_a_method_over_a_file_that_sets_words_of_another(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"method": "pm", "constrain": {"name": "perturb", "epsilon": 0.3}}))
    with pytest.raises(PmLlmError, match="Give --constrain null for the method's own"):
        load_config(path, {"method": "ewc"})
    assert load_config(path, {"method": "ewc", "constrain": None}).parsed_method() == PRESETS["ewc"]
    assert load_config(path, {"method": "pm"}).constrain == {"name": "perturb", "epsilon": 0.3}
    assert main(["run", "--config", str(path), "--method", "ewc", "--constrain", "null", "--tasks", "nowhere"]) == 2
    path.write_text(yaml.safe_dump({"constrain": {"name": "curvature", "weight": 1.0}}))
    found = load_config(path, {"method": "pm_curvature"})  # which is the default
    assert found.constrain == {"name": "curvature", "weight": 1.0}
    path.write_text(yaml.safe_dump({"method": "pm", "start": "fresh", "space": "factors", "merge": "optimal"}))
    with pytest.raises(PmLlmError, match="--start null --merge null --space weights for the method's own"):
        load_config(path, {"method": "slao"})


def test_unused_yaml_does_not_slip_through(tmp_path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"method": "pm", "warmup_ratio": 0.1}))
    with pytest.raises(ValueError, match="unknown key 'warmup_ratio'"):
        load_config(path)
