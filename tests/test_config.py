"""The keys of a configuration: what they may be, and what is said of what they may not."""

from __future__ import annotations

import re

import pytest
import yaml

from pm_llm.cli import main
from pm_llm.commands.keys import parse_overrides
from pm_llm.config import RunConfig, flags, load_config
from pm_llm.errors import PmLlmError
from pm_llm.methods import Choice
from pm_llm.system.coerce import write_yaml
from pm_llm.system.names import ELSEWHERE
from pm_llm.training.arguments import training_arguments
from tests.conftest import DECODER
from tests.helpers.errors import one_line


def test_unknown_yaml_key_names_the_nearest(tmp_path, run) -> None:
    (tmp_path / "r.yaml").write_text("train:\n  learnin_rate: 0.1\n")
    one_line(*run("--config", tmp_path / "r.yaml"), "train.learnin_rate", "Did you mean 'train.learning_rate'?")
    one_line(*run("--methud", "pm"), "methud", "Did you mean 'method'?")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--method", "pn"), ("unknown method 'pn'", "seqlora")),
        (("--merge", "{name: optimal, granularty: module}"), ("granularty", "Did you mean 'granularity'?")),
        (("--constrain", "{name: perturb, epsilon: 2}"), ("epsilon is 2", "from 0 to 1")),
        (("--start", "frsh"), ("unknown start 'frsh'", "fresh")),
        (("--lora.r", "0"), ("lora.r is 0", "from 1 to 4096")),
        (("--lora.r", "many"), ("lora.r is 'many'", "a whole number")),
        (("--dtype", "float16"), ("dtype is 'float16'", "bfloat16")),
        (("--benchmark", "standrd_cl"), ("unknown benchmark", "standard_cl")),
        (("--order", "sentiment,topik"), ("topik", "topic")),
        (("--benchmark", "standard_cl", "--order", "order1"), ("--data-dir",)),
        (("--model", "embedded:lama"), ("embedded:lama", "embedded:llama")),
        (("--train.extra", "{no_such: 1}"), ("no_such", "TrainingArguments")),
        (("--train.extra", "{max_steps: 9}"), ("sets max_steps", "Set train.max_steps instead")),
        (("--train.extra", "{eval_strategy: steps}"), ("eval_strategy", "Leave it out")),
        (("--train.extra", "{max_length: 26}"), ("max_length", "Leave it out")),  # it would cut answers off
        (("--train.extra", "{packing: true}"), ("packing", "Set train.packing instead")),
        (("--tasks", "a.jsonl", "--tasks", "b.jsonl"), ("--tasks is given twice", "after one --tasks")),
        (("--train.extra", "{optim_args: 3}"), ("train.extra.optim_args is 3", "a text or none")),
        (("--train.extra", "{adam_beta1: abc}"), ("train.extra.adam_beta1 is 'abc'", "a finite number")),
        (("--train.extra", "{tf32: maybe}"), ("train.extra.tf32 is 'maybe'", "true or false")),
        (("--train.extra", "{dataloader_drop_last: true}"), ("dataloader_drop_last", "Leave it out")),
        (("--method", "slao", "--space", "factors"), ("space factors", "start continue", "'orthogonal'")),
        (("--seed",), ("--seed needs a value",)),
    ],
)
def test_values(arguments, expected, run) -> None:
    one_line(*run(*arguments), *expected)


def test_a_configuration_made_in_python_is_what_its_file_says(tmp_path) -> None:
    choice = Choice("perturb", {"epsilon": 0.2})
    config = RunConfig(constrain=(choice, "sparse"), merge=Choice("optimal"), order=("sentiment", "topic"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.plain()))
    again = load_config(tmp_path / "config.yaml")
    assert again.plain() == config.plain()
    assert again.parsed_method() == config.parsed_method()
    assert config.plain()["constrain"] == [{"name": "perturb", "epsilon": 0.2}, "sparse"]
    assert RunConfig(output_dir=tmp_path / "run").plain()["output_dir"] == str(tmp_path / "run")


def test_numbers_with_an_exponent_in_extra(tmp_path) -> None:
    """YAML 1.1 takes `1e-6` for a text."""
    path = tmp_path / "mine.yaml"
    kwargs = "{min_lr: 2e-5, mode: 1e-6b}"
    path.write_text(f'train: {{extra: {{adam_epsilon: 1e-6, lr_scheduler_kwargs: {kwargs}, run_name: "1e5"}}}}\n')
    arguments = training_arguments(load_config(path), DECODER, tmp_path, 0)
    assert arguments.adam_epsilon == 1e-6
    assert arguments.lr_scheduler_kwargs == {"min_lr": 2e-5, "mode": "1e-6b"}
    assert arguments.run_name == "1e5"
    path.write_text("train: {extra: {fsdp: true}}\n")  # of which transformers would tell all processes to come
    with pytest.raises(PmLlmError, match=r"Launch with accelerate_configs/fsdp2.yaml"):
        training_arguments(load_config(path), DECODER, tmp_path, 0)


def test_extra_settings_that_do_not_go_together(run, tmp_path) -> None:
    """Some are found by the Trainer alone; they are one line all the same."""
    one_line(*run("--benchmark", "embedded", "--train.extra", "{use_liger_kernel: true}"), "train: ", "liger")
    one_line(*run("--benchmark", "embedded", "--train.extra", "{report_to: no_such}"), "train: ", "no_such")
    one_line(*run("--benchmark", "embedded", "--train.extra", "{report_to: comet_ml}"), "train: ", "comet")
    for name, said in (("cosine_with_min_lr", "min_lr"), ("warmup_stable_decay", "num_decay_steps")):
        one_line(*run("--benchmark", "embedded", "--train.lr_scheduler_type", name), f"train: {name}", said)
    config = RunConfig()
    config.train.learning_rate, config.train.lr_scheduler_type = 0.5, "polynomial"
    config.train.extra = {"lr_scheduler_kwargs": {"lr_end": 0.2}}
    assert training_arguments(config, DECODER, tmp_path, 0).lr_scheduler_kwargs == {"lr_end": 0.2}
    for wrong in ({"lr_end": 0.6}, {"power": "two"}):
        config.train.extra = {"lr_scheduler_kwargs": wrong}
        with pytest.raises(PmLlmError, match="train: polynomial: "):
            training_arguments(config, DECODER, tmp_path, 0)


@pytest.mark.parametrize("key", ["completion_only_loss", "pad_to_multiple_of", "eos_token", "chat_template_path"])
def test_fields_of_rows_that_are_made_here_are_refused(key: str, tmp_path) -> None:
    config = RunConfig()
    config.train.extra = {key: 1}
    with pytest.raises(PmLlmError, match=f"sets {key}, which a run must decide itself"):
        training_arguments(config, DECODER, tmp_path, 0)


def test_texts_that_yaml_stumbles_over(tmp_path) -> None:
    assert parse_overrides(["--output_dir", "2024-02-30"]) == {"output_dir": "2024-02-30"}
    path = tmp_path / "mine.yaml"
    for text in (b"output_dir: 2024-02-30\n", "# \u00e9\n".encode("latin-1")):
        path.write_bytes(text)
        with pytest.raises(PmLlmError, match=r"mine\.yaml is not valid YAML"):
            load_config(path)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        *(("train.learning_rate", value, "above 0") for value in ("-0.001", "0.0")),
        *(("train.num_train_epochs", value, "above 0") for value in ("-1.0", "0.0")),
        *(("train.max_steps", value, "at least 1, or -1") for value in ("0", "-2")),
        ("train.weight_decay", "-0.1", "from 0"),
        ("train.warmup_steps", "-3.0", "from 0"),
        ("lora.lora_alpha", "0", "above 0"),
        ("lora.lora_dropout", "1.5", "to 1"),
        ("seed", "-1", "from 0 to 4294967295"),
    ],
)
def test_numbers_of_training(key: str, value: str, allowed: str, run, tmp_path) -> None:
    steps = ["--train.max_steps", "-1"] if key.endswith("epochs") else []
    one_line(*run(f"--{key}", value, *steps), f"{key} is {value}", allowed)
    assert not (tmp_path / "run").exists()


def test_epochs_do_not_count_where_steps_are_given() -> None:
    load_config(None, {"train.max_steps": 5, "train.num_train_epochs": 0.0}).check()
    with pytest.raises(PmLlmError, match="'q_proj' is 0; it must be a whole number from 1"):
        load_config(None, {"lora.rank_pattern": {"q_proj": 0}}).check()
    with pytest.raises(PmLlmError, match="'q_proj' is 'x'; it must be a finite number"):
        load_config(None, {"lora.alpha_pattern": {"q_proj": "x"}})
    with pytest.raises(PmLlmError, match=r"'q_proj' is 0.0; it must be a number above 0"):
        load_config(None, {"lora.alpha_pattern": {"q_proj": 0}}).check()
    with pytest.raises(PmLlmError, match=r"lora.rank_pattern: '\[\(' is no pattern"):
        load_config(None, {"lora.rank_pattern": {"[(": 4}}).check()
    assert load_config(None, {"lora.alpha_pattern": {"q_proj": 0.5}}).check().lora.alpha_pattern == {"q_proj": 0.5}


@pytest.mark.parametrize(("key", "value"), [("target_modules", [None]), ("layers_to_transform", [1, "x"])])
def test_elements_of_a_list(key: str, value: list) -> None:
    expected = f"lora.{key}: element {len(value)} is {value[-1]!r}; it must be a"
    with pytest.raises(PmLlmError, match=expected):
        load_config(None, {f"lora.{key}": value})


def test_a_large_seed(run) -> None:
    """Every task has one of its own made of it, which must be one that numpy takes."""
    assert run("--seed", "4294967295")[0] == 0


def test_lists_can_be_set_to_none() -> None:
    found = parse_overrides(["--lora.layers_to_transform", "none", "--lora.target_modules", "none", "--tasks", "none"])
    assert found == {"lora.layers_to_transform": "none", "lora.target_modules": "none", "tasks": ["none"]}
    lora = load_config(None, found).lora
    assert (lora.layers_to_transform, lora.target_modules) == (None, None)


def test_numbers_given_in_python_are_numbers() -> None:
    for section, key in (("train", "weight_decay"), ("train", "learning_rate"), ("lora", "r"), ("", "repeat")):
        for value in ("x", True):
            config = RunConfig()
            setattr(getattr(config, section) if section else config, key, value)
            with pytest.raises(PmLlmError, match=f"{key} is"):
                config.check()


def test_a_runs_own_configuration_is_read_back(tmp_path) -> None:
    for text in ("1e3", "-1.5E-3", "1e3x", "0x10", "true"):
        (tmp_path / "config.yaml").write_text(write_yaml({"output_dir": text, "train": {"learning_rate": 1e-5}}))
        config = load_config(tmp_path / "config.yaml")
        assert (config.output_dir, config.train.learning_rate) == (text, 1e-5)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--learning_rate", "`train.learning_rate`"),
        ("--lr", "`train.learning_rate`"),
        ("--r", "`lora.r`"),
        ("--train.warmup_ratio", "`train.warmup_steps`"),
        ("--train.bf16", "`dtype: bfloat16`"),
        ("--per_device_train_batch_size", "`train.per_device_train_batch_size`"),
        ("--eval_strategy", "evaluation.split"),
    ],
)
def test_keys_of_other_tools(run, flag: str, meant: str) -> None:
    one_line(*run(flag, "1"), f"unknown key {flag[2:]!r}. It is", meant)


def test_what_other_tools_call_keys_leads_to_keys() -> None:
    known = {name for key, _ in flags() for name in (key, key.partition(".")[0])} | {"validation_size"}
    for name, said in ELSEWHERE.items():
        assert name not in known
        (*_, last) = re.findall(r"`([\w.]+)", said)
        assert last in known, name


def test_a_configuration_in_python() -> None:
    config = RunConfig(train={"max_steps": 3}, lora={"r": 4}).check()
    assert config == load_config({"train": {"max_steps": 3}, "lora": {"r": 4}})
    with pytest.raises(PmLlmError, match=r"unknown key 'train.steps'"):
        RunConfig(train={"steps": 3})


def test_a_configuration_given_as_a_task(capsys) -> None:
    one_line(main(["run", "my.yaml"]), capsys.readouterr().err, "Give it as --config my.yaml")
