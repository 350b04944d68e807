"""Loading a decoder whose weights are shared out over the processes, a group of weights at a time."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.initialization import no_init_weights

from pm_llm.errors import PmLlmError
from pm_llm.system.processes import process_state
from pm_llm.system.sharing_out import share_out


def load_shared_out(auto: Any, path: str, dtype: torch.dtype, **options: Any) -> Any:
    """A model of transformers, shared out (:mod:`pm_llm.system.sharing_out`).

    Where its safetensors name the weights as the model does, each process reads one group after the other and keeps
    its part. Else transformers loads the whole into every process's host memory first, and a group at a time goes to
    the device.

    Args:
        auto: The auto class.
        path: Folder or Hub id.
        dtype: Of the weights.
        options: For the model's configuration.

    Raises:
        PmLlmError: If the weights are quantised, or of other shapes than the model's.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise PmLlmError(f"the weights of {path!r} are quantised; FSDP2 shares out plain ones. Use ddp.yaml.")
    folder = Path(
        path
        if Path(path).is_dir()
        else snapshot_download(
            path, allow_patterns=["*.json", "*.safetensors"], ignore_patterns=["consolidated*", "original/*"]
        )
    )
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = auto.from_config(config, dtype=dtype, **options)
    model.tie_weights()
    files, wanted = _files(folder), _Wanted(model)
    if wanted.names() <= files.keys():
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        share_out(model, lambda module: wanted.fill(module, lambda key: _read(files[key], key), dtype))
    else:
        model = auto.from_pretrained(path, dtype=dtype, trust_remote_code=False, **options)
        share_out(model, lambda module: module.to(process_state().device))
    return model


class _Wanted:
    """The parameters and buffers of a model without values, and all their places: tied ones have several."""

    def __init__(self, model: nn.Module) -> None:
        self.places = defaultdict[int, list[tuple[dict[str, Any], str]]](list)
        self.files: dict[int, str] = {}  # the first name of each that files have
        self.held: list[Tensor] = []  # or their numbers would become others'
        for prefix, module in model.named_modules(remove_duplicate=False):
            for table in (module._parameters, module._buffers):
                for key, x in table.items():
                    if x is not None:
                        self.held.append(x)
                        self.places[id(x)].append((table, key))
                        if key not in module._non_persistent_buffers_set:
                            self.files.setdefault(id(x), f"{prefix}.{key}".lstrip("."))

    def names(self) -> set[str]:
        """Of what files must have."""
        return set(self.files.values())

    def fill(self, module: nn.Module, read: Callable[[str], Tensor], dtype: torch.dtype) -> None:
        """Put a module's values in place, on this process's device."""
        device = process_state().device
        for x in [*(p for p in module.parameters() if p.is_meta), *module.buffers()]:
            value = read(self.files[id(x)]) if id(x) in self.files else x
            if value.shape != x.shape:
                raise PmLlmError(f"{self.files[id(x)]} is {tuple(value.shape)}, the model has {tuple(x.shape)}.")
            value = value.to(device, dtype if id(x) in self.files and x.is_floating_point() else None, copy=True)
            new = nn.Parameter(value, requires_grad=False) if isinstance(x, nn.Parameter) else value
            for table, key in self.places[id(x)]:
                table[key] = new


def _files(folder: Path) -> dict[str, Path]:
    """The file of each weight by its name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {key: folder / file for key, file in json.loads(index.read_text())["weight_map"].items()}
    file = folder / "model.safetensors"
    if not file.is_file():
        return {}
    with safe_open(file, "pt") as found:
        return dict.fromkeys(found.keys(), file)


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, "pt") as found:
        value: Tensor = found.get_tensor(key)
    return value
