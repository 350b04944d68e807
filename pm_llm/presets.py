"""The table of presets: the methods of the field in three words."""

from __future__ import annotations

import warnings
from typing import Any

from pm_llm.errors import first_line, unknown_name
from pm_llm.methods import Choice, Method, found


def _preset(
    start: str | Choice, constrain: str | Choice | None, merge: str | Choice, source: str, task_id: bool = False
) -> Method:
    constraints = (Choice.parse(constrain, "constrain"),) if constrain is not None else ()
    return Method(Choice.parse(start, "start"), constraints, Choice.parse(merge, "merge"), source, task_id)


PRESETS: dict[str, Method] = {
    "pm": _preset("fresh", "perturb", "optimal", "P&M, arXiv 2505.22389"),
    # what differs from `pm`, and why: pm_llm/constraints/curvature.py
    "pm_curvature": _preset(
        "fresh",
        Choice("curvature", {"weight": 0.3}),
        Choice("optimal", {"form": "kronecker", "fisher_scale": "measured"}),
        "P&M's quadratic as a penalty, of a Kronecker Fisher",
    ),
    "pm_gaussian": _preset("fresh", "gaussian", "optimal", "P&M's ablation, arXiv 2505.22389"),
    "seqlora": _preset("continue", None, "replace", "plain sequential fine-tuning"),
    "inclora": _preset("fresh", None, "sum", "IncLoRA, in arXiv 2310.14152"),
    "pissa": _preset(Choice("subspace", {"init": "pissa"}), None, "sum", "PiSSA, arXiv 2404.02948, added up"),
    "average": _preset("fresh", None, "average", "M_t = M_{t-1} + Delta_t / t"),
    "ema": _preset("continue", None, Choice("exponential", {"space": "factors"}), "exponential average of the models"),
    "ewc": _preset("continue", "ewc", "replace", "EWC, arXiv 1612.00796"),
    "online_ewc": _preset("continue", Choice("ewc", {"online": True}), "replace", "online EWC, arXiv 1805.06370"),
    "l2": _preset("continue", "l2", "replace", "in arXiv 1612.00796"),
    "olora": _preset("fresh", "orthogonal", "sum", "O-LoRA, arXiv 2310.14152"),
    "nlora": _preset("fresh", "sparse", "sum", "N-LoRA, arXiv 2410.10179"),
    "migu": _preset("continue", "migu", "replace", "MIGU, arXiv 2406.17245"),
    "pam": _preset("continue", "align", "pam", "PAM, arXiv 2506.03189"),
    "inflora": _preset("fresh", "null_space", "sum", "InfLoRA, arXiv 2404.00228"),
    "coso": _preset("fresh", "gradient_subspace", "sum", "in the manner of CoSO, arXiv 2505.11816"),
    "refresh": _preset("continue", "refresh", "replace", "refresh learning, arXiv 2403.13249"),
    "slca": _preset("continue", "slow", "replace", "SLCA, arXiv 2303.05118"),
    "lori": _preset("fresh", "lori", "sum", "LoRI, arXiv 2504.07448"),
    "osft": _preset("fresh", "osft", "sum", "OSFT, arXiv 2504.07097"),
    "slao": _preset("orthogonal", None, "slao", "SLAO"),
    "coma": _preset("continue", None, Choice("constant", {"space": "factors"}), "CoMA, arXiv 2312.08977"),
    "cofima": _preset("continue", None, "cofima", "CoFiMA, arXiv 2312.08977"),
    "task_arithmetic": _preset("fresh", None, Choice("task_arithmetic", {"scale": 0.5}), "arXiv 2212.04089"),
    "ties": _preset("fresh", None, "ties", "TIES, arXiv 2306.01708"),
    "dare": _preset("fresh", None, "dare", "DARE, arXiv 2311.03099"),
    "magmax": _preset("last", None, "magmax", "MagMax, arXiv 2407.06322"),
    "opcm": _preset("last", None, "opcm", "OPCM, arXiv 2501.09522"),
    "ps_lora": _preset("fresh", None, "max", "the merge of PS-LoRA, arXiv 2512.08960"),
    "frank_wolfe": _preset("alone", None, "frank_wolfe", "FW-Merging, arXiv 2503.12649"),
    "replay": _preset("continue", "replay", "replace", "experience replay, for reference"),
    "joint": _preset("alone", Choice("replay", {"share": 1.0, "longer": True}), "replace", "bound: all rows so far"),
    "per_task": _preset("alone", None, "replace", "bound: a model of its own for each task", task_id=True),
}


def method_of(preset: str, start: Any = None, constrain: Any = None, merge: Any = None) -> Method:
    """A preset with any of its three words replaced. Raises PmLlmError where there is no such preset or word."""
    if preset not in PRESETS:
        raise unknown_name("method", preset, PRESETS)
    return PRESETS[preset].replaced(start, constrain, merge)


# on what the tests run each preset; they take their parameters from here, and the table of methods its last columns
TESTED: dict[str, tuple[str, ...]] = {
    "LLaMA": tuple(PRESETS),
    "T5": tuple(PRESETS),
    "4-bit": (
        "pm",
        "pm_curvature",
        "seqlora",
        "ewc",
        "olora",
        "migu",
        "inflora",
        "coso",
        "cofima",
        "frank_wolfe",
        "ties",
    ),
    "DDP": (
        "pm",
        "pm_curvature",
        "ewc",
        "olora",
        "migu",
        "inflora",
        "coso",
        "refresh",
        "osft",
        "cofima",
        "frank_wolfe",
        "joint",
    ),
}


for _one in found("pm_llm.presets"):  # of other packages; the project's own names stay its own
    try:
        PRESETS.setdefault(_one.name, _one.load())
    except Exception as error:  # whatever another package's code raises
        warnings.warn(f"the preset {_one.name!r} of {_one.value} cannot be loaded: {first_line(error)}", stacklevel=1)
