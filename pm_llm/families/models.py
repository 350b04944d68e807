"""The base model, its tokenizer and its family; the first LoRA adapter on it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.pytorch_utils import Conv1D

from pm_llm.errors import PmLlmError, check_pattern, first_line, unknown_name
from pm_llm.families.base import Family, family_for
from pm_llm.families.shared_out import load_shared_out
from pm_llm.sections import LoraSection
from pm_llm.system.processes import process_state
from pm_llm.system.sharing_out import called_through, is_asked

EMBEDDED = Path(__file__).parent.parent / "embedded"


@dataclass(frozen=True)
class Base:
    """A loaded base model, its tokenizer and its family."""

    model: Any
    tokenizer: Any
    family: Family


def resolve(name: str) -> str:
    """`embedded:llama` and `embedded:t5` are the folders that come with the package; all else is as given."""
    prefix, _, which = name.partition(":")
    if prefix != "embedded":
        return name
    if not (EMBEDDED / which).is_dir():
        raise unknown_name("model", name, [f"embedded:{p.name}" for p in EMBEDDED.iterdir() if p.is_dir()])
    return str(EMBEDDED / which)


def load_tokenizer(name: str) -> tuple[Any, Family]:
    """A model's tokenizer, and its family.

    Raises:
        PmLlmError: If there is no such model, it cannot generate, or its answers could not end.
    """
    path = resolve(name)
    with _told(name):
        kind = family_for(AutoConfig.from_pretrained(path, trust_remote_code=False))
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise PmLlmError(f"the tokenizer of {name!r} has no end-of-sequence token, so answers could not end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer, kind


def context_of(name: str) -> int | None:
    """How many tokens a model was made for, if it says so."""
    with _told(name):
        found = AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
    return getattr(found, "max_position_embeddings", None)


def load_base(
    name: str, dtype: str = "float32", load_in_4bit: bool = False, attn_implementation: str | None = None
) -> Base:
    """Load model and tokenizer onto this process's device.

    Args:
        name: Hub id, folder, or `embedded:...`.
        dtype: Of weights and compute; in 4 bits, of compute and of what stays unquantised.
        load_in_4bit: Quantise linear layers to NF4 with double quantisation (QLoRA, arXiv 2305.14314).
        attn_implementation: As transformers names them; None: the model's own.

    Raises:
        PmLlmError: If there is no such model, it cannot generate or has no such attention, or bitsandbytes is missing.
    """
    tokenizer, kind = load_tokenizer(name)
    with _told(name):
        try:
            model = _weights(name, kind, getattr(torch, dtype), load_in_4bit, attn_implementation)
        except (ValueError, ImportError) as error:
            if attn_implementation is None:
                raise
            raise PmLlmError(f"attn_implementation is {attn_implementation!r}: {first_line(error)}.") from error
    if Path(resolve(name)).is_dir():  # an adapter's configuration names its base: found from any folder
        model.name_or_path = str(Path(resolve(name)).resolve())
    size = int(model.get_input_embeddings().num_embeddings)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        number = getattr(tokenizer, token)
        if number is not None and number >= size:
            raise PmLlmError(
                f"the tokenizer's {token} is {number}, and the model {name!r} knows tokens up to {size - 1} only. "
                "Give the tokenizer a token that the model has, or the model that tokenizer's embedding."
            )
    _agree(model, tokenizer)
    return Base(model, tokenizer, kind)


def _weights(name: str, kind: Family, dtype: torch.dtype, load_in_4bit: bool, attention: str | None) -> Any:
    """The model, where it is to be: on this process's device, or shared out over all of them."""
    auto, path, device = kind.auto_class(), resolve(name), process_state().device
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if is_asked():
        if kind.task_type != "CAUSAL_LM" or load_in_4bit:
            what = "a model in 4 bits" if load_in_4bit else "an encoder-decoder, whose two halves have one embedding"
            raise PmLlmError(f"FSDP2 cannot share out {what}. Use accelerate_configs/ddp.yaml, or zero3.yaml.")
        return load_shared_out(auto, path, dtype, **options)
    if device.type != "cpu":  # straight to it: no process needs the whole in the host's memory
        options["device_map"] = {"": device}
    if load_in_4bit:
        options |= {"quantization_config": _nf4(dtype), "device_map": {"": device}}
    model = auto.from_pretrained(path, dtype=dtype, trust_remote_code=False, **options)
    if load_in_4bit:
        _keep_packing(model)
    return model


def _agree(model: Any, tokenizer: Any) -> None:
    """The model's special tokens are the tokenizer's, and its answers greedy."""
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):  # as the Trainer would, with a notice
        setattr(model.config, token, getattr(tokenizer, token))
    # plain greedy decoding: no penalties or forced tokens that the model may ship; its own end tokens still end
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends] if ends else [])}),
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )


def empty_base(name: str) -> tuple[Any, Family]:
    """A model of the right shapes without weights, and its family. Raises as `load_base`."""
    with _told(name):
        config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
    kind = family_for(config)
    with torch.device("meta"):
        return kind.auto_class().from_config(config), kind


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PmLlmError('load_in_4bit needs bitsandbytes: pip install "pm_llm[qlora]"')
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _keep_packing(model: Any) -> None:
    """Leave 4-bit weights as they were quantised.

    On CPUs with AVX512-BF16 bitsandbytes repacks a layer in place when it is first evaluated, rounding its scales to
    bfloat16: training after an evaluation would go on from other base weights than training before it.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What the libraries say of a model that is not there, in one line."""
    try:
        yield
    except PmLlmError:
        raise
    except Exception as error:  # whatever the libraries make of files that are cut, missing, or of other programs
        kind = "" if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: "
        raise PmLlmError(
            f"cannot load the model {name!r}: {kind}{first_line(error)}. Check its files, and that what they need is "
            "installed."
        ) from error


def lora_config(lora: LoraSection, targets: list[str] | str, kind: Family) -> LoraConfig:
    """PEFT's configuration of a task's adapter."""
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        layers_to_transform=lora.layers_to_transform,
        use_rslora=lora.use_rslora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        task_type=kind.task_type,
    )


def add_task_adapter(model: Any, lora: LoraSection, kind: Family, name: str) -> PeftModel:
    """A fresh adapter (B = 0) under `name`: on a base model, or next to the others of a PeftModel.

    Raises:
        PmLlmError: If `target_modules` matches nothing, is no pattern, or one next to `layers_to_transform`.
    """
    targets = _targets(model, lora, kind)
    config = lora_config(lora, targets, kind)
    try:
        if not isinstance(model, PeftModel):
            made = get_peft_model(model, config, adapter_name=name)
            called_through(made)
            return made
        # PEFT notes the base model's name in the first adapter only
        config.base_model_name_or_path = str(model.get_base_model().name_or_path)
        model.add_adapter(name, config)
        return model
    except ValueError as error:
        if "is not supported" in str(error):  # a module that is not linear, printed in many lines
            raise PmLlmError(
                f"lora.target_modules {targets!r}: {first_line(error)} ... is no linear layer."
            ) from error
        if "not found" not in str(error) and "No modules were targeted" not in str(error):
            raise
        raise PmLlmError(
            f"lora.target_modules {targets!r} (layers {lora.layers_to_transform or 'all'}) match nothing in this "
            f"model. Its linear modules: {', '.join(_linear_names(model))}."
        ) from error


def _targets(model: Any, lora: LoraSection, kind: Family) -> list[str] | str:
    """The names of the modules to adapt, or a pattern (or `all-linear`), as PEFT takes them. Raises PmLlmError on what
    it does not take."""
    given = lora.target_modules or kind.targets(model)
    if not isinstance(given, str) and len(given) > 1:
        return given
    (word,) = [given] if isinstance(given, str) else given  # a list of one is as a flag gives it
    if re.fullmatch(r"[\w.]+", word):  # to PEFT a string is a pattern for whole names
        return [word]
    check_pattern("lora.target_modules", word)
    if lora.layers_to_transform is None:
        return word
    if word.lower() == "all-linear":
        return _linear_names(model)  # PEFT takes layers next to names only
    raise PmLlmError(
        f"lora.layers_to_transform {lora.layers_to_transform} does not go together with a pattern as "
        f"lora.target_modules ({word!r}). Write the layers into the pattern, or list the modules' names."
    )


def _linear_names(model: Any) -> list[str]:
    """What `all-linear` stands for: the last names of the base model's linear layers, but for its output layer."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    linear = {n: m for n, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and ".lora_" not in n}
    head = base.get_output_embeddings()
    return sorted({n.removesuffix(".base_layer").rpartition(".")[2] for n, m in linear.items() if m is not head})
