"""An adapter as a GGUF file, as llama.cpp loads it (`--lora FILE`).

llama.cpp adds `alpha / r * B A x` to the output of the tensor whose name stands before `.lora_a` and `.lora_b`, with
one alpha for the file and r that of each pair. Adapters here have their scaling inside, so alpha is the one rank that
all modules are filled up to. Of the LLaMA kind llama.cpp pairs a rotary dimension with its neighbour where
transformers pairs it with that half a head away; its rows of q and k are in that order, and so are the rows of B.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pm_llm.adapters.adapter import Adapter, check_dtype
from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError

# transformers' model type -> llama.cpp's architecture, and whether rows of q and k are in its own rotary order
KINDS = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
}


def write_gguf(adapter: Adapter, config: Any, out: Path, dtype: str = "float32") -> None:
    """Write an adapter for llama.cpp.

    Args:
        adapter: The adapter.
        config: Its base model's configuration (transformers').
        out: The file.
        dtype: Of the weights: float32, float16 or bfloat16.

    Raises:
        PmLlmError: If the gguf package is missing, or llama.cpp's names of such a model are not known here.
    """
    gguf = _gguf()
    check_dtype(dtype)
    kind, names = _kind(config), _names(adapter, config)
    one = adapter.of_one_rank()
    writer = gguf.GGUFWriter(str(out), kind)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(one.rank))
    quantised = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    for module, x in one.factors.items():
        for side, tensor in (("a", x.A), ("b", _ordered(x.B, module, config))):
            packed = gguf.quants.quantize(tensor.float().numpy(), getattr(gguf.GGMLQuantizationType, quantised))
            raw = getattr(gguf.GGMLQuantizationType, quantised) if dtype == "bfloat16" else None
            writer.add_tensor(f"{names[module]}.lora_{side}", packed, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, adapter: Adapter, config: Any) -> Adapter:
    """The adapter in a file of :func:`write_gguf`, by llama.cpp's rule of scale, names and rows.

    Args:
        path: The file.
        adapter: One of the same modules.
        config: The base model's configuration.

    Raises:
        PmLlmError: If a tensor is missing, or one is there that llama.cpp would not find.
    """
    gguf = _gguf()
    reader = gguf.GGUFReader(str(path))
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].parts[-1][0])
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    found = {}
    for module, name in _names(adapter, config).items():
        try:
            a, b = (tensors.pop(f"{name}.lora_{side}") for side in "ab")
        except KeyError as error:
            raise PmLlmError(f"{path} lacks {error}.") from error
        b = b[torch.argsort(_ordered(torch.arange(len(b)), module, config))]
        found[module] = LowRank(b * (alpha / len(a)), a)
    if tensors:
        raise PmLlmError(f"{path} holds {min(tensors)}, which is of no module of the adapter.")
    return adapter.replace_factors(found)


def _gguf() -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise PmLlmError('a GGUF file needs the gguf package: pip install "pm_llm[gguf]"')
    import gguf

    return gguf


def _kind(config: Any) -> str:
    if config.model_type not in KINDS:
        raise PmLlmError(
            f"how llama.cpp names the tensors of a {config.model_type!r} model is not known here. Known: "
            f"{', '.join(KINDS)}. Export the adapter, and use llama.cpp's convert_lora_to_gguf.py."
        )
    return KINDS[config.model_type][0]


def _names(adapter: Adapter, config: Any) -> dict[str, str]:
    """Module -> the name of its tensor in the base's GGUF file."""
    gguf, kind = _gguf(), _kind(config)
    (arch,) = (one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    names = {module: known.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in adapter.factors}
    unknown = [module for module, name in names.items() if name is None]
    if unknown:
        raise PmLlmError(f"llama.cpp's {kind} has no tensor for {unknown[0]}. Leave it out of target_modules.")
    return names


def _ordered(rows: Tensor, module: str, config: Any) -> Tensor:
    """The rows of a module's output in llama.cpp's order."""
    last = module.rpartition(".")[2]
    if not KINDS[config.model_type][1] or last not in ("q_proj", "k_proj"):
        return rows
    heads = config.num_attention_heads
    heads = heads if last == "q_proj" else getattr(config, "num_key_value_heads", None) or heads
    halves: Tensor = rows.unflatten(0, (heads, 2, -1))  # (heads, half, place in the half, ...)
    return halves.transpose(1, 2).flatten(0, 2)
