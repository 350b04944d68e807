"""Keys of the configuration as flags of a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import yaml

from pm_llm.config import RunConfig, load_config
from pm_llm.errors import PmLlmError
from pm_llm.system.coerce import read_yaml
from pm_llm.system.quiet import quiet_libraries


def add_keys(parser: argparse.ArgumentParser) -> None:
    """Let a command take a configuration: `--config`, and any key of it as a flag."""
    parser.add_argument("--config", metavar="RECIPE.YAML", help="configuration to start from")
    parser.set_defaults(keys=True)
    parser.allow_abbrev = False  # --r is no short form of --restart-from: keys are told by their whole names


def config_of(given: argparse.Namespace) -> RunConfig:
    """The configuration that `--config` and the flags that are no option of the command's own describe; words before
    them are tasks. Raises PmLlmError where they describe none."""
    tasks = list(takewhile(lambda word: not word.startswith("-"), given.rest))
    if recipes := [word for word in tasks if word.endswith((".yaml", ".yml"))]:
        raise PmLlmError(f"{recipes[0]} is a configuration, not a task. Give it as --config {recipes[0]}.")
    overrides = parse_overrides(given.rest[len(tasks) :]) | ({"tasks": tasks} if tasks else {})
    config = load_config(given.config, overrides).check()
    quiet_libraries()
    return config


def parse_overrides(rest: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` pairs; several values make a list; `--data-dir` is `data_dir`.

    Raises:
        PmLlmError: If a value is missing, a list is given twice, or something is not a flag.
    """
    overrides: dict[str, list[Any]] = {}
    texts = {"model", "data_dir", "output_dir", "tasks", "probes", "adapter", "general"}
    texts |= {
        "adapter.path",
        "adapter.revision",
        "adapter.subfolder",
        "adapter.data",
        "general.data",
    }  # paths: `#2` in one is no comment

    def read(key: str, word: str) -> Any:
        return word if key in texts and not word.startswith(("{", "[", '"', "'")) else _yaml(word)

    lists = {"tasks", "probes", "lora.target_modules", "lora.layers_to_transform"}
    key = None
    for word in rest:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            if key in lists & overrides.keys():
                raise PmLlmError(f"--{key} is given twice. Give all of its values after one --{key}.")
            overrides[key] = [read(key, value)] if equals else []
        elif key is None:
            raise PmLlmError(f"{word!r} is not a flag. Settings are given as --key value.")
        else:
            overrides[key].append(read(key, word))
    for key, values in overrides.items():
        if not values:
            raise PmLlmError(f"--{key} needs a value.")
    given = {key: values[0] if len(values) == 1 else values for key, values in overrides.items()}
    none = {key for key in given if key.startswith("lora.") and given[key] in (None, "none")}
    one = {key for key in (lists & given.keys()) - none if not isinstance(given[key], list)}
    return {key: [value] if key in one else value for key, value in given.items()}


def _yaml(text: str) -> Any:
    try:
        return read_yaml(text)
    except (yaml.YAMLError, ValueError):  # 2024-02-30 is taken for a date
        return text
