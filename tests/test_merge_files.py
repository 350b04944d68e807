"""Adapter folders that are written and merged: one rank, several at once, and what is known of their base model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import torch
from safetensors.torch import load_file

from pm_llm.adapters.adapter import Adapter
from pm_llm.algebra.lowrank import LowRank
from pm_llm.cli import main
from tests.invariants.test_closed_form import random_adapter


def test_what_is_written_has_one_rank_and_reads_back_as_it_was(tmp_path) -> None:
    """Of modules whose ranks differ; filled up with zeros, which a loaded adapter does not have."""
    factors = {f"m{r}": LowRank(torch.randn(6, r), torch.randn(r, 5)) for r in (1, 3, 5)}
    Adapter(factors, {"target_modules": ["m1", "m3", "m5"]}).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (5, 5, {}, {})
    assert {
        x.shape[0] for name, x in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in name
    } == {5}
    again = Adapter.load(tmp_path)
    for name, x in factors.items():
        assert torch.equal(again.factors[name].B, x.B)
        assert torch.equal(again.factors[name].A, x.A)
    assert all((path.stat().st_mode & 0o444) == 0o444 for path in tmp_path.iterdir())


def test_several_new_adapters_with_a_coefficient_each(tmp_path, capsys) -> None:
    adapters = [random_adapter(i) for i in range(3)]
    for i, one in enumerate(adapters):
        one.save(tmp_path / str(i))
    a, b, c = (str(tmp_path / str(i)) for i in range(3))
    out = str(tmp_path / "out")
    command = ["merge", "--running", a, "--new", b, "--new", c, "--out", out]
    assert main([*command, "--coefficient", "0.5", "-1e-1"]) == 0
    found = Adapter.load(out)
    for name, x in found.factors.items():
        whole = [one.factors[name].dense() for one in adapters]
        torch.testing.assert_close(x.dense(), whole[0] + 0.5 * whole[1] - 0.1 * whole[2], rtol=1e-4, atol=1e-5)
    shutil.rmtree(out)
    for coefficients, said in ((["1", "2", "3"], "3 coefficients are given for 2"), (["1e39"], "NaN or infinite")):
        assert main([*command, "--coefficient", *coefficients]) == 2
        assert said in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_what_is_known_of_the_base_model_is_kept_and_compared(tmp_path, capsys) -> None:
    facts = {"base_model": "Org/Base", "task_type": "CAUSAL_LM", "revision": "abc"}
    replace(random_adapter(0), **facts).save(tmp_path / "a")
    random_adapter(1).save(tmp_path / "b")
    replace(random_adapter(1), **{**facts, "base_model": "org/base/", "revision": "def"}).save(tmp_path / "c")
    for running, new in (("a", "b"), ("b", "a")):
        out = tmp_path / f"{running}{new}"
        assert (
            main(["merge", "--running", str(tmp_path / running), "--new", str(tmp_path / new), "--out", str(out)]) == 0
        )
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["task_type"]) == ("Org/Base", "CAUSAL_LM")
        assert config["revision"] == "abc"
    command = ["merge", "--running", str(tmp_path / "a"), "--new", str(tmp_path / "c"), "--out", str(tmp_path / "x")]
    assert main(command) == 2
    assert "different revisions of the base model: 'abc' and 'def'" in capsys.readouterr().err
