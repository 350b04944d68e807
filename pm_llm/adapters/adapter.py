"""PEFT LoRA adapters as low-rank matrices: reading, writing, activating. The only place that knows PEFT's files.

An adapter in memory is a mapping from module name to :class:`~pm_llm.algebra.lowrank.LowRank`, with the LoRA scaling
folded into the factors. What cannot be folded exactly (DoRA, biases, saved modules ...) is refused by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from pm_llm.adapters.live import check_fit, remove
from pm_llm.adapters.untrusted import PREFIX, WEIGHTS_FILE, by_name, check_files, module_of
from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError
from pm_llm.system.files import readable
from pm_llm.system.host import to_host
from pm_llm.system.sharding import gathered, whole

# fields of LoraConfig that say which modules are adapted; they travel unchanged from adapter to adapter
_PLACE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out")
# fields that change nothing about the weights once the scaling is folded in
_HARMLESS = {
    *_PLACE,
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_type"),
    *("peft_version", "runtime_config", "megatron_core", "loftq_config", "eva_config", "ensure_weight_tying"),
}
# initialisations that leave the base weights as they are
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")


DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: str | None) -> None:
    """Raise PmLlmError unless weights can be written in it; None: nothing was asked for."""
    if dtype is not None and dtype not in DTYPES:
        raise PmLlmError(f"--dtype is {dtype!r}; it must be {', '.join(DTYPES)}.")


class _Scaled(Mapping[str, LowRank]):
    """Low-rank updates made when they are asked for, so that few of a mapped file's modules are in memory at once."""

    def __init__(self, pairs: dict[str, tuple[Tensor, Tensor, float]]) -> None:
        self._pairs = pairs  # B, A, scaling

    def __getitem__(self, name: str) -> LowRank:
        b, a, scaling = self._pairs[name]
        return lowrank.trimmed(LowRank(b.float() if scaling == 1 else b.float() * scaling, a.float()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: `factors` maps a module's name in the base model to its low-rank update; of one read from a
    folder they are read, and scaled, when they are asked for.

    `place` holds the fields of the PEFT configuration that say where the adapter sits (target modules and the like),
    `base_model` the name or path of the model it belongs to, at `revision`, `task_type` PEFT's task type.
    """

    factors: Mapping[str, LowRank]
    place: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    task_type: str | None = None
    revision: str | None = None

    @property
    def rank(self) -> int:
        """The largest rank over the modules."""
        return max(x.rank for x in self.factors.values())

    def check_finite(self, which: str) -> None:
        """Raise PmLlmError if a weight is NaN or infinite: merged, it would spoil the running adapter for good."""
        for name, x in self.factors.items():
            if not (torch.isfinite(x.A).all() and torch.isfinite(x.B).all()):
                raise PmLlmError(
                    f"the {which} adapter has weights that are NaN or infinite in {name}; nothing was merged. "
                    "The training that made it diverged: lower its learning rate."
                )

    def replace_factors(self, factors: Mapping[str, LowRank]) -> Adapter:
        """The same adapter with other matrices."""
        return dataclasses.replace(self, factors=factors)

    def beside(self, other: Adapter) -> Adapter:
        """The same adapter, which knows what the other one does of the base model."""
        facts = {key: getattr(self, key) or getattr(other, key) for key in ("base_model", "task_type", "revision")}
        return dataclasses.replace(self, **facts)

    def of_one_rank(self) -> Adapter:
        """The same adapter with one rank everywhere, filled up with zeros, as other programs want it: of mixed ranks
        llama.cpp scales all modules as the first, and SGLang refuses them."""
        rank, pad = self.rank, torch.nn.functional.pad
        filled = {
            name: x if x.rank == rank else LowRank(pad(x.B, (0, rank - x.rank)), pad(x.A, (0, 0, 0, rank - x.rank)))
            for name, x in self.factors.items()
        }
        return self.replace_factors(filled)

    # ---- PEFT's configuration ----
    def peft_config(self) -> LoraConfig:
        """A plain LoRA configuration with scaling 1 everywhere: `lora_alpha = r`, no rsLoRA.

        Modules whose rank is not the commonest one are named in `rank_pattern` and `alpha_pattern`.
        """
        common = Counter(x.rank for x in self.factors.values()).most_common(1)[0][0]
        other = {name: x.rank for name, x in self.factors.items() if x.rank != common}
        return LoraConfig(
            r=common,
            lora_alpha=common,
            rank_pattern=dict(other),
            alpha_pattern=dict(other),
            base_model_name_or_path=self.base_model,
            task_type=self.task_type,
            revision=self.revision,
            inference_mode=True,
            **self.place,
        )

    def peft_state(self) -> dict[str, Tensor]:
        """Tensors under the names PEFT writes to `adapter_model.safetensors`."""
        state: dict[str, Tensor] = {}
        for name, x in self.factors.items():
            state[f"{PREFIX}{name}.lora_A.weight"] = x.A.detach().cpu().contiguous()
            state[f"{PREFIX}{name}.lora_B.weight"] = x.B.detach().cpu().contiguous()
        return state

    # ---- disk ----
    def save(self, folder: str | Path, dtype: str | None = None) -> None:
        """Write an ordinary PEFT adapter folder (config and safetensors), of one rank over all modules.

        Args:
            folder: The folder.
            dtype: Of the weights, a name in `DTYPES`; None: as they are, float32 but for a file's own.
        """
        folder, one = Path(folder), self.of_one_rank()
        folder.mkdir(parents=True, exist_ok=True)
        state = one.peft_state()
        check_dtype(dtype)
        if dtype is not None:
            state = {name: x.to(getattr(torch, dtype)) for name, x in state.items()}
            if not all(bool(torch.isfinite(x).all()) for x in state.values()):
                raise PmLlmError(f"--dtype {dtype} cannot hold weights of this adapter. Use bfloat16 or float32.")
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        one.peft_config().save_pretrained(str(folder))
        readable(folder, WEIGHTS_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """Read an adapter folder; its tensors stay in the file, which is mapped into memory.

        So do not write into that file while the adapter is in use (replacing it by another of its name is safe).

        Raises:
            PmLlmError: If it is missing, damaged, or not a LoRA that folds exactly.
        """
        folder = Path(folder)
        kind = check_files(folder)["peft_type"]
        if kind != "LORA":
            raise PmLlmError(f"{folder} holds an adapter of type {kind}; only LORA can be merged here.")
        state = load_file(folder / WEIGHTS_FILE)
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except Exception as error:  # whatever PEFT makes of values that are none
            raise PmLlmError(f"{folder}: PEFT cannot read its configuration: {error}") from error
        return cls.from_state(state, config, where=str(folder))

    @classmethod
    def from_state(cls, state: dict[str, Tensor], config: PeftConfig, where: str = "the adapter") -> Adapter:
        """From a PEFT state dict (as `get_peft_model_state_dict` gives it) and its configuration."""
        if not isinstance(config, LoraConfig):
            raise PmLlmError(f"{where}: a {type(config).__name__} is not a LoraConfig; only LoRA can be merged here.")
        _refuse_what_cannot_fold(config, where)
        sides: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            module, _, tail = module_of(key, where).partition(".lora_")
            if key.endswith(".base_layer.weight"):
                continue  # PEFT writes an adapted output layer's own weights beside its adapter
            if tail not in ("A.weight", "B.weight") or tensor.ndim != 2:
                raise PmLlmError(
                    f"{where}: tensor {key!r} {tuple(tensor.shape)} is not a LoRA factor of a linear layer, "
                    "so it cannot be folded exactly. Adapt linear layers only."
                )
            sides.setdefault(module, {})[tail[0]] = tensor
        if not sides:
            raise PmLlmError(f"{where} holds no LoRA weights.")
        config, pairs = by_name(config, list(sides)), {}
        for module, pair in sides.items():
            if len(pair) != 2:
                raise PmLlmError(f"{where}: module {module} has only one of its two LoRA factors.")
            if pair["A"].shape[0] != pair["B"].shape[1]:
                raise PmLlmError(
                    f"{where}: module {module} has factors B {tuple(pair['B'].shape)} and A {tuple(pair['A'].shape)}, "
                    "which are not of one matrix. The file is damaged."
                )
            pairs[module] = (pair["B"], pair["A"], _scaling(config, module, rank=pair["A"].shape[0]))
        base, revision = config.base_model_name_or_path, config.revision
        return cls(_Scaled(pairs), place_of(config), base, task_type_of(config), revision)

    # ---- a live model ----
    @classmethod
    def from_model(cls, model: PeftModel, name: str) -> Adapter:
        """The adapter `name` of a live PeftModel, copied to CPU in float32; of a sharded one, by all processes."""
        with gathered(p for key, p in model.named_parameters() if f".{name}." in key):
            state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            state = to_host({k: whole(x.detach()).to(torch.float32, copy=True) for k, x in state.items()})
        return cls.from_state(state, model.peft_config[name], where=f"adapter {name!r}")

    def attach(
        self, model: PeftModel, name: str, dropout: float = 0.0, scaling: dict[str, float] | None = None
    ) -> None:
        """Put this adapter into `model` under `name`, replacing one of that name. Call :func:`set_active` afterwards.

        Args:
            model: The model.
            name: The adapter's name there.
            dropout: LoRA dropout, if it is to be trained.
            scaling: LoRA scaling per module, if it is to be trained (default 1). The update stays the same (B is
                divided by it), but the step of an optimizer such as Adam counts `scaling` times.

        Raises:
            PmLlmError: If the model has other modules of these names than the adapter.
            RuntimeError: If their shapes differ.
        """
        remove(model, name)
        config = self.peft_config()
        config.lora_dropout = dropout
        state = self
        if scaling is not None:
            config.alpha_pattern = {module: scaling[module] * x.rank for module, x in self.factors.items()}
            state = self.replace_factors({module: x.scale(1 / scaling[module]) for module, x in self.factors.items()})
        model.add_adapter(name, config)
        result: Any = set_peft_model_state_dict(model, state.peft_state(), adapter_name=name)
        check_fit([key for key in result.missing_keys if f".{name}." in key], result.unexpected_keys)


def check_rank(layers: Mapping[str, Any], adapter: str, what: str, outputs: bool = False) -> None:
    """Check that an adapter's rank is at most the number of each layer's inputs (with `outputs` also of its outputs).

    Raises:
        PmLlmError: If it is larger: `what` cannot have more directions than that.
    """
    for name, layer in layers.items():
        if layer.r[adapter] > (min(layer.in_features, layer.out_features) if outputs else layer.in_features):
            raise PmLlmError(
                f"{what} cannot give {name}, {layer.out_features} by {layer.in_features}, the rank "
                f"{layer.r[adapter]}. Lower lora.r, or set lora.rank_pattern for this module."
            )


def block_of(module: str) -> str:
    """The block that a module stands in, its name up to the first number (`model.layers.3`); "" outside of blocks."""
    found = re.match(r".*?\.\d+(?=\.)", module)
    return found.group() if found else ""


def check_same_place(running: Adapter, new: Adapter) -> None:
    """Raise PmLlmError unless both adapters belong to the same base model and adapt the same modules."""
    if running.revision and new.revision and running.revision != new.revision:
        raise PmLlmError(
            f"the adapters belong to different revisions of the base model: {running.revision!r} and "
            f"{new.revision!r}. Only adapters of one can be merged."
        )
    if running.base_model and new.base_model and _spelt(running.base_model) != _spelt(new.base_model):
        raise PmLlmError(
            f"the adapters belong to different base models: {running.base_model!r} and {new.base_model!r}. "
            "Only adapters of one base model can be merged."
        )
    only_running, only_new = set(running.factors) - set(new.factors), set(new.factors) - set(running.factors)
    if only_running or only_new:
        raise PmLlmError(
            f"the adapters have different target modules: {len(only_running)} only in the running one "
            f"(e.g. {min(only_running, default='-')}), {len(only_new)} only in the new one "
            f"(e.g. {min(only_new, default='-')}). Train both with the same target_modules."
        )
    for name, x in running.factors.items():
        if x.shape != new.factors[name].shape:
            raise PmLlmError(
                f"module {name} has shape {x.shape} in one adapter and {new.factors[name].shape} in other."
            )


def same_base(one: str, other: str) -> bool:
    """Whether two names may stand for one base model: an id and a folder may; two folders if their files are alike."""
    here = [Path(name) if Path(name).is_dir() else None for name in (one, other)]
    if here[0] is not None and here[1] is not None:
        files = [{p.name: p.stat().st_size for p in folder.glob("*.safetensors")} for folder in here if folder]
        return _spelt(one) == _spelt(other) or files[0] == files[1]
    return (here[0] is None) != (here[1] is None) or _spelt(one) == _spelt(other)


def _spelt(base: str) -> str:
    """A base model's name, however it is written: folders in full, ids in small letters."""
    return str(Path(base).resolve()) if Path(base).exists() else base.rstrip("/").lower()


def _scaling(config: Any, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA, after PEFT's rank and alpha patterns."""
    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(list(pattern), module), config.lora_alpha)
    found: float = alpha / rank**0.5 if config.use_rslora else alpha / rank
    return found


def place_of(config: PeftConfig) -> dict[str, Any]:
    """The fields that say where an adapter sits, as :class:`Adapter` keeps them."""
    values = {name: getattr(config, name) for name in _PLACE}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def task_type_of(config: PeftConfig) -> str | None:
    """PEFT's task type as a plain word."""
    return getattr(config.task_type, "value", config.task_type)


def _refuse_what_cannot_fold(config: LoraConfig, where: str) -> None:
    """Anything but its default outside the known-harmless fields changes the weights in a way B A does not hold."""
    default = LoraConfig()
    found = [
        f.name
        for f in dataclasses.fields(config)
        if f.name not in _HARMLESS and getattr(config, f.name) not in (getattr(default, f.name), [], {}, set())
    ]
    if config.init_lora_weights not in _PLAIN_INIT:
        found.append(f"init_lora_weights={config.init_lora_weights!r} (it changes the base weights)")
    if found:
        raise PmLlmError(
            f"{where} uses {', '.join(found)}, which cannot be folded exactly into a low-rank sum. "
            "Train a plain LoRA or rsLoRA adapter on linear layers."
        )
