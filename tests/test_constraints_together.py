"""Constraints with their options, with each other, and with starts, merges and launchers."""

from __future__ import annotations

import pytest
import torch

from pm_llm.config import load_config
from pm_llm.constraints.base import Context
from pm_llm.constraints.ewc import Ewc
from pm_llm.constraints.gaussian import Gaussian
from pm_llm.constraints.gradient_subspace import GradientSubspace
from pm_llm.constraints.lori import Lori
from pm_llm.constraints.migu import Migu
from pm_llm.constraints.null_space import NullSpace
from pm_llm.constraints.refresh import Refresh
from pm_llm.constraints.replay import Replay
from pm_llm.constraints.slow import Slow
from pm_llm.constraints.sparse import Sparse
from pm_llm.errors import PmLlmError
from pm_llm.system.coerce import read_yaml
from pm_llm.system.sharding import launched
from pm_llm.system.sharing_out import take_over
from pm_llm.training.launchers import refuse_sharding
from tests.conftest import FAMILIES, make_peft
from tests.helpers.contexts import context_for
from tests.helpers.step_script import make_trainer, one_step, weights


@pytest.mark.parametrize(
    ("constrain", "expected"),
    [
        ({"name": "ewc", "weight": -1}, "from 0"),
        ({"name": "ewc", "gamma": 2}, "from 0 to 1"),
        ({"name": "l2", "weight": "much"}, "a finite number"),
        ({"name": "gaussian", "epsilon": -0.1}, "from 0"),
        ({"name": "migu", "threshold": 1.5}, "from 0 to 1"),
        ({"name": "align", "every": 0}, "whole number from 1"),
        ({"name": "align", "reset": "mine"}, "running or zero"),
        ({"name": "slow", "rates": {"(": 0.1}}, "not a regular expression"),
        ({"name": "slow", "rates": []}, "a mapping"),
        ({"name": "lori", "keep": 0}, "above 0 to 1"),
        ({"name": "replay", "share": 2}, "to 1"),
        ({"name": "replay", "buffer": "all"}, "task or reservoir"),
        ({"name": "perturb", "scales": "wide"}, "symmetric or cover"),
        ({"name": "null_space", "share": 3}, "from 0 to 1"),
        ({"name": "gradient_subspace", "size": 1.5}, "a whole number"),
    ],
)
def test_options_out_of_range(constrain: dict, expected: str) -> None:
    continues = constrain["name"] in ("ewc", "l2", "align")
    keys = {"method": "seqlora" if continues else "inclora", "constrain": constrain}
    with pytest.raises(PmLlmError, match=expected):
        load_config(None, keys).check()


@pytest.mark.parametrize(
    ("start", "constrain", "expected"),
    [
        ("fresh", "ewc", "needs a start that continues"),
        ("alone", "ewc", "needs a start that continues"),
        ("orthogonal", "l2", "needs a start that continues"),
        ("fresh", "align", "needs a start that continues"),
        ("continue", "orthogonal", "needs a start that is fresh"),
        ("continue", "null_space", "needs a start that is fresh"),
        ("continue", "gradient_subspace", "needs a start that is fresh"),
        ("continue", "lori", "needs a start that is fresh"),
        ("continue", "perturb", "needs a start that is fresh"),
        ("fresh", "curvature", "needs merge optimal"),
        ("fresh", ["null_space", "refresh"], "null_space leaves A as it is, and refresh moves it"),
        ("fresh", ["refresh", "lori"], "lori leaves A as it is, and refresh moves it"),
        ("fresh", ["lori", "gradient_subspace"], "lori leaves A as it is, and gradient_subspace moves it"),
    ],
)
def test_company_that_means_nothing_is_refused(start: str, constrain: str | list[str], expected: str) -> None:
    keys = {"method": "seqlora", "start": start, "constrain": constrain}
    with pytest.raises(PmLlmError, match=expected):
        load_config(None, keys).check()


def test_constraints_compose(tmp_path) -> None:
    """A penalty, noise, a mask and a rate in one step; each still does what it does alone."""
    migu, slow = Migu(), Slow({"lora_A": 0.0})
    migu.prepare(Context(2))
    both = [Sparse(weight=0.01), Gaussian(0.1), migu, slow]
    found = one_step(make_trainer("llama", str(tmp_path), 16, 1, both))[1]
    for name, change in found.items():
        if "lora_A" in name:
            assert not change.any()
        else:
            assert 0 < float((change.abs().sum(1) == 0).float().mean()) < 1


def test_what_compares_factors_refuses_what_changes_them() -> None:
    for keys in (
        {"method": "ewc", "max_rank": 4},
        {"method": "l2", "merge": "average"},
        {"method": "ema", "max_rank": 4},
    ):
        with pytest.raises(PmLlmError, match=r"max_rank is 4|a merge of the factors"):
            load_config(None, keys).check()
    assert load_config(None, {"method": "seqlora", "start": "last", "constrain": "ewc"}).check()
    assert load_config(None, {"method": "cofima", "constrain": ["ewc", "align"]}).check()


def test_options_are_read_as_yaml_writes_them() -> None:
    given = read_yaml("{method: nlora, constrain: {name: sparse, weight: 1e-5}}")
    (choice,) = load_config(None, given).parsed_method().constrain
    assert choice.build("constrain").weight == 1e-5
    with pytest.raises(PmLlmError, match="online is 'false'; it must be true or false"):
        load_config(None, {"method": "ewc", "constrain": {"name": "ewc", "online": "false"}}).check()


def test_refresh_leaves_the_log_as_it_is(tmp_path) -> None:
    logs = []
    for constraint in ((), Refresh(rate=0.0)):
        trainer = make_trainer("llama", str(tmp_path), 16, 1, constraint)
        trainer.train()
        logs.append(next(log for log in trainer.state.log_history if "num_tokens" in log))
    assert logs[0]["num_tokens"] == logs[1]["num_tokens"]
    assert logs[0]["mean_token_accuracy"] == logs[1]["mean_token_accuracy"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_two_that_touch_the_update_compose(family: str, tmp_path) -> None:
    """In both orders, two steps of a second task: no one falls over what another did."""
    makers = [Migu, NullSpace, GradientSubspace, Lori, lambda: Slow({"lora_B": 0.5}), lambda: Refresh(rate=1e-3)]
    for i, one in enumerate(makers):
        for other in makers[i + 1 :]:
            for pair_of in ([one(), other()], [other(), one()]):
                trainer = make_trainer(family, str(tmp_path), 16, 1, pair_of, max_steps=2, model=make_peft(family))
                context, _ = context_for(family, 1)
                for constraint in pair_of:
                    constraint.prepare(Context(2, live=trainer.live, model=trainer.model, chosen=context.chosen))
                trainer.train()
                assert all(torch.isfinite(x).all() for x in weights(trainer.model).values())


def test_a_mask_holds_at_a_slow_rate_too(tmp_path) -> None:
    """LoRI sets entries to zero after the rate was applied, in whichever order they are named."""
    for names in ((0, 1), (1, 0)):
        lori = Lori(keep=0.1, calibration=0.3)
        both = [lori, Slow({"lora_B": 0.5})]
        trainer = make_trainer("llama", str(tmp_path), 16, 1, [both[i] for i in names], max_steps=4)
        lori.prepare(Context(1))
        trainer.train()
        b = torch.cat([x.flatten() for name, x in weights(trainer.model).items() if "lora_B" in name])
        assert int((b != 0).sum()) <= round(0.1 * b.numel())


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            {
                "ewc": "ddp.yaml or fsdp2.yaml or zero2.yaml",
                "migu": "ddp.yaml or fsdp2.yaml",
                "null_space": "ddp.yaml or fsdp2.yaml",
                "gaussian": "ddp.yaml or fsdp2.yaml or zero2.yaml",
            },
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
            {"migu": "ddp.yaml or fsdp2.yaml", "null_space": "ddp.yaml or fsdp2.yaml"},
        ),
        ({}, {}),
    ],
)
def test_what_a_launcher_cannot_do_is_refused_at_once(environment: dict, refused: dict, monkeypatch) -> None:
    """With every launcher that can."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    tried = {"ewc": Ewc(), "migu": Migu(), "null_space": NullSpace(), "gaussian": Gaussian(), "replay": Replay()}
    for name, constraint in tried.items():
        if name in refused:
            with pytest.raises(PmLlmError) as error:
                refuse_sharding([constraint], *launched())
            assert str(error.value).endswith(f"Use {refused[name]}.")
        else:
            refuse_sharding([constraint], *launched())


def test_the_first_version_of_fsdp_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(PmLlmError, match=r"Use fsdp2.yaml, or set fsdp_version to 2"):
        take_over()
