"""Stored adapters made small: each module gets the rank and the bits that its share of a budget is best spent on.

In the manner of GraftLLM, which prunes, truncates and quantises a task vector module by module. A compressed adapter
is a folder with `compressed.safetensors` and PEFT's configuration; :func:`expand` makes an ordinary one of it again.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pm_llm.adapters.adapter import Adapter, place_of, task_type_of
from pm_llm.adapters.untrusted import WEIGHTS_FILE, by_name
from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError, first_line
from pm_llm.system.files import new_folder

FILE = "compressed.safetensors"
BITS = (2, 4, 8)


@dataclass(frozen=True)
class Damage:
    """What compression did: `ranks` and `bits` of each module, relative Frobenius `errors`, and the bytes of
    the files of weights."""

    ranks: dict[str, int]
    bits: dict[str, int]
    errors: dict[str, float]
    error: float
    before: int
    after: int


def compress(adapter: str | Path, out: str | Path, budget: float) -> Damage:
    """Write the adapter folder `adapter` in at most `budget` times the bytes of its file of weights.

    Each module is cut by its SVD, `B A = U S V'`, to a rank, and `U sqrt(S)`, `V sqrt(S)` are quantised column by
    column to 2, 4 or 8 bits (symmetric, round to nearest, one float32 scale a column). Which rank and bits is chosen
    greedily over all modules: the next step is always the one that takes away most squared error for a byte.

    Args:
        adapter: A LoRA adapter folder.
        out: The folder to write; must not exist.
        budget: Share of the bytes that the weights have now, above 0, at most 1.

    Raises:
        PmLlmError: If the adapter cannot be read, `out` exists, or the budget does not allow one rank in two bits.
    """
    if not 0 < budget <= 1:
        raise PmLlmError(f"--budget is {budget}; it must be a share above 0, at most 1.")
    whole = Adapter.load(adapter)
    whole.check_finite("given")
    before = (Path(adapter) / WEIGHTS_FILE).stat().st_size
    kept = _spend(whole.factors, int(budget * before))
    tensors: dict[str, Tensor] = {}
    for name, (u, v, bits) in kept.items():
        rounded = [quantised(side, bits) for side in (u, v)]
        tensors[f"{name}.codes"] = torch.cat([packed(codes, bits) for codes, _ in rounded])
        tensors[f"{name}.scales"] = torch.cat([scales for _, scales in rounded])
    forms = {name: [len(u), len(v), u.shape[1], bits] for name, (u, v, bits) in kept.items()}
    with new_folder(out) as folder:
        whole.peft_config().save_pretrained(str(folder))
        save_file(tensors, folder / FILE, metadata={"forms": json.dumps(forms)})
        factors, after = _read(folder / FILE), (folder / FILE).stat().st_size
    lost = {name: _distance(x, factors[name]) for name, x in whole.factors.items()}
    sizes = {name: _distance(x, LowRank(x.B[:, :0], x.A[:0])) for name, x in whole.factors.items()}
    return Damage(
        {name: u.shape[1] for name, (u, _, _) in kept.items()},
        {name: bits for name, (_, _, bits) in kept.items()},
        {name: (lost[name] / sizes[name]) ** 0.5 if sizes[name] > 0 else 0.0 for name in lost},
        (sum(lost.values()) / max(sum(sizes.values()), 1e-300)) ** 0.5,
        before,
        after,
    )


def expand(compressed: str | Path, out: str | Path, dtype: str | None = None) -> None:
    """Write a compressed adapter as an ordinary PEFT adapter folder `out`, its weights in `dtype` (None: float32).

    Raises:
        PmLlmError: If there is none, it is damaged, or `out` exists.
    """
    folder = Path(compressed)
    if not (folder / FILE).is_file():
        raise PmLlmError(f"{folder} holds no {FILE}: it is no compressed adapter.")
    try:
        config, factors = LoraConfig.from_pretrained(str(folder)), _read(folder / FILE)
        config = by_name(config, list(factors))
        base, task_type = config.base_model_name_or_path, task_type_of(config)
        adapter = Adapter(factors, place_of(config), base, task_type, config.revision)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise PmLlmError(f"{folder} is damaged: {first_line(error)}. Compress the adapter again.") from error
    with new_folder(out) as scratch:
        adapter.save(scratch, dtype)


def _spend(factors: Mapping[str, LowRank], budget: int) -> dict[str, tuple[Tensor, Tensor, int]]:
    """For each module its factors (d, rank), and the bits they are to be quantised to."""
    # a file's header has 190 bytes for a module, three times its name, and its own
    sides = {name: _sides(x) for name, x in factors.items()}
    options = {name: _options(*two, 190 + 3 * len(name)) for name, two in sides.items()}
    budget -= 256
    at = dict.fromkeys(options, 0)
    spent = sum(steps[0][0] for steps in options.values())
    if spent > budget:
        raise PmLlmError(
            f"the budget of {budget} bytes is below {spent}, which one rank in two bits takes everywhere."
        )

    def steps(name: str) -> list[tuple[float, int, str, int]]:
        """What could be done next with a module: (squared error for a byte, bytes, its name, the option)."""
        size, error, _, _ = options[name][at[name]]
        later = list(enumerate(options[name]))[at[name] + 1 :]
        found = [((other[1] - error) / (other[0] - size), other[0] - size, name, i) for i, other in later]
        return [step for step in found if step[1] <= budget - spent]

    heap = [min(found) for name in options if (found := steps(name))]
    heapq.heapify(heap)
    while heap:
        _, cost, name, i = heapq.heappop(heap)
        if spent + cost <= budget:
            spent, at[name] = spent + cost, i
        if found := steps(name):  # also where that step did not fit any more: a smaller one may
            heapq.heappush(heap, min(found))
    chosen = {name: options[name][i][2:] for name, i in at.items()}
    return {
        name: (sides[name][0][:, :rank].float(), sides[name][1][:, :rank].float(), bits)
        for name, (rank, bits) in chosen.items()
    }


def _sides(x: LowRank) -> tuple[Tensor, Tensor]:
    """`U sqrt(S)` and `V sqrt(S)`, each (d, rank), in double precision."""
    q_b, r_b = torch.linalg.qr(x.B.double())
    q_a, r_a = torch.linalg.qr(x.A.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return (q_b @ u) * s.sqrt(), (q_a @ vh.T) * s.sqrt()


def _options(left: Tensor, right: Tensor, header: int) -> list[tuple[int, float, int, int]]:
    """(bytes, squared error, rank, bits) of every rank and number of bits that nothing smaller is better than.

    With a and b the rounded sides cut to a rank, `|U S V' - a b'|^2 = sum S^2 - 2 <U'a, V'b> + <a'a, b'b>`; of all
    ranks at once, these are running sums over two matrices.
    """
    found = []
    total = ((left.T @ left) * (right.T @ right)).sum()
    for bits in BITS:
        a, b = (dequantised(*quantised(side.float(), bits)).double() for side in (left, right))
        mixed = ((left.T @ a) * (right.T @ b)).sum(0).cumsum(0)
        own = ((a.T @ a) * (b.T @ b)).cumsum(0).cumsum(1).diagonal()
        for rank, error in enumerate((total - 2 * mixed + own).tolist(), 1):
            size = header + sum((rank * len(side) * bits + 7) // 8 + 4 * rank for side in (left, right))
            found.append((size, error, rank, bits))
    best: list[tuple[int, float, int, int]] = []
    for option in sorted(found, key=lambda one: one[:2]):
        if not best or option[1] < best[-1][1]:
            best.append(option)
    return best


def quantised(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers from -L to L, L = 2^(bits - 1) - 1, and the scale of each column of `x` (d, rank)."""
    top = 2 ** (bits - 1) - 1
    scales = x.abs().amax(dim=0).clamp(min=1e-30) / top
    return (x / scales).round().clamp(-top, top).to(torch.int8), scales


def dequantised(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of :func:`quantised`, but for rounding."""
    return codes.float() * scales


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes, `8 / bits` to each."""
    per = 8 // bits
    flat = (codes.flatten().to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % per)]).view(-1, per)
    return sum((flat[:, i] << (bits * i) for i in range(1, per)), start=flat[:, 0].clone())


def unpacked(data: Tensor, shape: tuple[int, int], bits: int) -> Tensor:
    """The inverse of :func:`packed`."""
    parts = [(data >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    flat = torch.stack(parts, dim=1).flatten()[: shape[0] * shape[1]]
    found: Tensor = (flat.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8).view(shape)
    return found


def _read(file: Path) -> dict[str, LowRank]:
    tensors, found = load_file(file), {}
    with safe_open(file, framework="pt") as opened:
        forms = json.loads(opened.metadata()["forms"])
    for name, (d_out, d_in, rank, bits) in forms.items():
        codes, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"].split(rank)
        sides = codes.split([-(-d_out * rank * bits // 8), -(-d_in * rank * bits // 8)])
        u, v = (
            dequantised(unpacked(side, (d, rank), bits), scale)
            for side, d, scale in zip(sides, (d_out, d_in), scales, strict=True)
        )
        found[name] = LowRank(u, v.T.contiguous())
    return found


def _distance(x: LowRank, y: LowRank) -> float:
    """The squared Frobenius norm of x - y, by way of the factors."""
    a, b = torch.cat([x.B, -y.B], 1).double(), torch.cat([x.A, y.A], 0).double()
    return max(0.0, float(((a.T @ a) * (b @ b.T)).sum()))
