"""Adapters from elsewhere: what is looked at before anything of them is loaded."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from pm_llm.errors import PmLlmError, first_line
from pm_llm.sections import MAX_RANK

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
MAX_NAMES, MAX_PATTERN = 10_000, 10_000  # modules of an adapter, and characters of one pattern
PATIENCE = 10.0  # seconds to match patterns in, the start of a process included
PREFIX = "base_model.model."
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def fetched(adapter: str, revision: str | None = None, subfolder: str | None = None) -> str:
    """The folder of an adapter given as a folder or a Hub id, after :func:`check_files`.

    Args:
        adapter: The folder, or the id.
        revision: A branch, tag or commit on the Hub.
        subfolder: The folder in it that holds the adapter.

    Raises:
        PmLlmError: If there is none, or it is refused.
    """
    folder, inside = Path(adapter), Path(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise PmLlmError(f"the subfolder {subfolder!r} is not in the adapter's folder. Give a folder in it.")
    if not folder.is_dir():
        folder = _from_hub(adapter, revision, inside)
    elif revision is not None:
        raise PmLlmError(
            f"the adapter {adapter!r} is a folder here, and {revision!r} is a revision on the Hub. Leave it out."
        )
    check_files(folder / inside)
    return str(folder / inside)


def _from_hub(adapter: str, revision: str | None, inside: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    names = [(inside / name).as_posix() for name in (CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER_FILES)]
    what = f"cannot load the adapter {adapter!r}: "
    try:
        return Path(snapshot_download(adapter, revision=revision, allow_patterns=names))
    except RevisionNotFoundError as error:
        raise PmLlmError(
            f"{what}it has no revision {revision!r} on the Hub. Name a branch, a tag or a commit."
        ) from error
    except GatedRepoError as error:
        raise PmLlmError(
            f"{what}the Hub asks for a login that has access. Ask for access, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise PmLlmError(
            f"{what}it is no folder, and the Hub has none of that name, or shows it only to a login: `hf auth login`."
        ) from error
    except Exception as error:  # whatever the HTTP client of this huggingface_hub raises
        raise PmLlmError(f"{what}it is no folder, and the Hub says: {first_line(error)}") from error


def check_files(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter folder whose two files can be loaded without harm.

    Raises:
        PmLlmError: If a file is missing, damaged or a pickle; the configuration has keys that this PEFT does not know;
            a tensor's name is none of a module's; or the rank of the configuration is not that of the tensors (PEFT
            would allocate what the configuration asks for).
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            pickles = [pickle for pickle in PICKLES if (folder / pickle).exists()]
            found = f" {pickles[0]} is a pickle, which may run any code when it is loaded." if pickles else ""
            raise PmLlmError(
                f"{folder} is not an adapter folder: {name} is missing.{found} "
                "Give a folder written by PEFT's save_pretrained with safetensors."
            )
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:  # checks the header against the file's size
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise PmLlmError(f"{folder} is damaged: {error}. Write the adapter again.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise PmLlmError(f"{folder / CONFIG_FILE}: peft_type is {kind!r}, which this PEFT does not know.")
    known = {f.name for f in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])}
    unknown = sorted(key for key in config.keys() - known if config[key] is not None)
    if unknown:
        raise PmLlmError(
            f"{folder / CONFIG_FILE} has keys that this PEFT does not know for {kind}: {', '.join(unknown[:5])}. "
            "Upgrade PEFT if a newer one wrote it; otherwise do not trust it."
        )
    for name in shapes:
        if kind == "LORA":
            module_of(name, str(folder))
        if not PLAIN_NAME.fullmatch(name):
            raise PmLlmError(f"{folder / WEIGHTS_FILE}: {name!r} is not the name of a module's tensor.")
    _check_values(config, shapes, folder)
    if kind == "LORA":
        _check_ranks(config, shapes, folder)
    return config


def _check_values(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """What PEFT would allocate, load or match by: sizes, other adapters, patterns."""
    if config["peft_type"] in ("XLORA", "MIXED"):
        raise PmLlmError(f"{folder} is of type {config['peft_type']}, which names other adapters. Give a plain one.")
    if not shapes:
        raise PmLlmError(f"{folder} holds no weights.")
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    wrong = [key for key, value in patterns.items() if not _is_pattern(value)]
    places = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
    wrong += [key for key in places if not _is_place(config.get(key))]
    wrong += ["layer_replication"] if config.get("layer_replication") else []
    largest = max([MAX_RANK, *(size for shape in shapes.values() for size in shape)])
    numbers = ("r", "lora_alpha", "lora_dropout", "num_virtual_tokens")
    found = {key: config[key] for key in numbers if config.get(key) is not None}
    wrong += [key for key, value in found.items() if not isinstance(value, (int, float))]
    wrong += [key for key in ("r", "lora_alpha") if config["peft_type"] == "LORA" and config.get(key, 8) is None]
    wrong += [key for key in ("r", "num_virtual_tokens") if key not in wrong and found.get(key, 0) > largest]
    ranks = patterns["rank_pattern"]
    wrong += ["rank_pattern"] if not wrong and any(x > MAX_RANK for x in ranks.values()) else []
    if wrong:
        shown = ", ".join(f"{key} {str(config.get(key))[:60]!r}" for key in dict.fromkeys(wrong))
        raise PmLlmError(f"{folder / CONFIG_FILE} has values that no adapter needs: {shown}. Do not trust it.")


def _is_pattern(value: Any) -> bool:
    """Names of modules, or regular expressions for them, with numbers."""
    return (
        isinstance(value, dict)
        and len(value) <= MAX_NAMES
        and all(len(name) <= MAX_PATTERN and isinstance(x, (int, float)) and x > 0 for name, x in value.items())
    )


def _is_place(value: Any) -> bool:
    """None, names of modules, or one regular expression (never matched here, see :func:`without_patterns`)."""
    if value is None:
        return True
    if isinstance(value, list):
        return len(value) <= MAX_NAMES and all(isinstance(x, str) and PLAIN_NAME.fullmatch(x) for x in value)
    return isinstance(value, str) and len(value) <= MAX_PATTERN


def module_of(key: str, where: str) -> str:
    """A tensor's name in the base model, of the name that PEFT gives it, without what wrappers put in between
    (torch.compile, DDP, FSDP, checkpointing, a second PeftModel).

    Raises:
        PmLlmError: If it is none of PEFT's.
    """
    plain = ".".join(part for part in key.split(".") if part not in WRAPPERS).removeprefix("module.")
    while plain.startswith(PREFIX * 2):
        plain = plain.removeprefix(PREFIX)
    if not plain.startswith(PREFIX) or plain.startswith(f"{PREFIX}module."):
        raise PmLlmError(
            f"{where}: {key!r} is not a name that PEFT gives ({PREFIX}...). No model would find the adapter."
        )
    return plain.removeprefix(PREFIX)


def keys_for(patterns: list[str], modules: list[str]) -> dict[str, str]:
    """Module -> the first of the keys of a rank or alpha pattern that stands for it, as PEFT finds it.

    Keys that are regular expressions are matched in a process of their own, for a few seconds at most: they may be of
    a file that is not trusted.

    Raises:
        PmLlmError: If one is no regular expression, or takes too long.
    """
    if not patterns:
        return {}
    if all(PLAIN_NAME.fullmatch(pattern) for pattern in patterns):
        pairs = ((module, get_pattern_key(patterns, module)) for module in modules)
        return {module: key for module, key in pairs if key in patterns}
    script = (
        "import json, re, sys\np, m = json.load(sys.stdin)\n"
        "print(json.dumps({x: k for x in m for k in [next((k for k in p if re.match(rf'(.*\\.)?({k})$', x)), None)] "
        "if k is not None}))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", script],
            input=json.dumps([patterns, modules]),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise PmLlmError(
            f"the pattern {patterns[0][:60]!r} takes too long to match. Do not trust the adapter."
        ) from error
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:] or ["it failed"]
        raise PmLlmError(f"the patterns {', '.join(patterns)[:60]!r} cannot be matched: {reason[0]}.") from error
    found: dict[str, str] = json.loads(done.stdout)
    return found


def without_patterns(config: Any, folder: Path) -> Any:
    """The PEFT configuration of an adapter folder, a LoRA's by :func:`by_name`.

    PEFT would match patterns with all names of a model; one that comes with a file may take for ever.
    """
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        return config
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        names = [module_of(name, str(folder)) for name in file.keys()]  # noqa: SIM118
    return by_name(config, sorted({name.partition(".lora_")[0] for name in names if ".lora_" in name}))


def by_name(config: Any, modules: list[str]) -> Any:
    """A LoRA's configuration with the names of its modules in place of patterns for them.

    Raises:
        PmLlmError: If a pattern with a rank or an alpha cannot be matched, see :func:`keys_for`.
    """
    config = copy.copy(config)
    for key in ("rank_pattern", "alpha_pattern"):
        given = getattr(config, key) or {}
        if not all(PLAIN_NAME.fullmatch(name) for name in given):
            setattr(config, key, {module: given[k] for module, k in keys_for(list(given), modules).items()})
    if any(isinstance(getattr(config, key), str) for key in ("target_modules", "exclude_modules", "layers_pattern")):
        config.target_modules = set(modules)
        config.exclude_modules = config.layers_pattern = config.layers_to_transform = None
    return config


def _check_ranks(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    pattern = config.get("rank_pattern") or {}
    modules = {name: module_of(name, str(folder)).rpartition(".lora_")[0] for name in shapes}
    keys = keys_for(list(pattern), sorted(set(modules.values())))
    for name, shape in shapes.items():
        module, side = modules[name], name.rpartition(".lora_")[2]
        if side == "A.weight" and len(shape) == 2:
            rank = pattern.get(keys.get(module), config.get("r"))
            other = shapes.get(name.replace(".lora_A.", ".lora_B."))
            if rank != shape[0] or (other is not None and other[1:] != (rank,)):
                raise PmLlmError(
                    f"{folder}: the configuration gives {module} rank {rank}, its tensors have shapes {shape} and "
                    f"{other}. The two files do not belong together."
                )
