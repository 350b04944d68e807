"""Adapter folders from adapter folders, and from two models: `pm-llm merge`, `pm-llm vector`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from pm_llm.adapters.adapter import DTYPES, Adapter, check_dtype
from pm_llm.adapters.live import TASK, lora_layers
from pm_llm.adapters.untrusted import WEIGHTS_FILE
from pm_llm.errors import PmLlmError
from pm_llm.families.models import add_task_adapter, load_base
from pm_llm.merges.merger import FoldReport, Merger
from pm_llm.merges.transfer import left_out, task_vector
from pm_llm.sections import LoraSection
from pm_llm.system.files import new_folder
from pm_llm.system.mapped import mapped_files


def merge_folders(
    running: str | Path,
    new: Sequence[str | Path],
    coefficients: Sequence[float],
    max_rank: int | None,
    out: str | Path,
    dtype: str | None = None,
) -> FoldReport:
    """Write `running + sum_i coefficient_i * new_i` as an adapter folder `out`, truncated to `max_rank` if given.

    Args:
        running: An adapter folder.
        new: The folders of those that are added to it.
        coefficients: One for all of them, or one each.
        max_rank: Of the result.
        out: The folder to write; must not exist.
        dtype: Of its weights; by default that of the inputs, where they have one, else float32.

    Raises:
        PmLlmError: If an input is no foldable adapter, they do not belong together, or `out` exists or cannot be
            written. Then `out` is not there.
    """
    if len(coefficients) not in (1, len(new)):
        raise PmLlmError(
            f"{len(coefficients)} coefficients are given for {len(new)} adapters. Give one for all, or one each."
        )
    check_dtype(dtype)
    merged: str | Path | Adapter = running
    with new_folder(out) as scratch:
        for i, one in enumerate(new):
            last = i == len(new) - 1  # what is before is exact: the result is cut once
            merger = Merger(
                "constant",
                max_rank if last else None,
                zeros=mapped_files(scratch),  # module by module, from mapped files: memory holds a few of them
                coefficient=coefficients[i % len(coefficients)],
            )
            merged = merger.fold(merged, one)
        merged.save(scratch, dtype or _common_dtype([running, *new]))  # type: ignore[union-attr]
    return merger.report


def _common_dtype(folders: Sequence[str | Path]) -> str | None:
    """The type that all weights of all adapters have, if it is one; None: float32 then."""
    found = {x.dtype for folder in folders for x in load_file(Path(folder) / WEIGHTS_FILE).values()}
    (only,) = found if len(found) == 1 else {torch.float32}
    name = str(only).removeprefix("torch.")
    return name if name in DTYPES else None


def write_task_vector(
    base: str, tuned: str, rank: int, targets: list[str] | None, out: str | Path
) -> tuple[float, list[str], float]:
    """Write `tuned - base`, two models, as an adapter folder `out` of the base; return its relative error, the names
    of what else changed, and the share of the squared change that it has (:func:`pm_llm.merges.transfer.left_out`).

    Args:
        base: Hub id or folder.
        tuned: The same.
        rank: Of the adapter.
        targets: As `lora.target_modules`.
        out: The folder; must not exist.

    Raises:
        PmLlmError: If a model cannot be loaded, they do not fit together, or `out` exists or cannot be written.
    """
    if rank < 1:
        raise PmLlmError(f"--rank is {rank}; it must be at least 1.")
    with new_folder(out) as scratch:
        one, other = load_base(base), load_base(tuned)
        model = add_task_adapter(one.model, LoraSection(r=1, target_modules=targets), one.family, TASK)
        place = Adapter.from_model(model, TASK)
        found, error = task_vector(model.get_base_model(), other.model, lora_layers(model), rank)
        names, share = left_out(model.get_base_model(), other.model, lora_layers(model))
        place.replace_factors(found).save(scratch)
    return error, names, share
