"""On a device that is not the CPU: what test_presets does not show of it, and how often Python waits for it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from pm_llm.adapters.adapter import Adapter
from pm_llm.cli import main
from tests.helpers.forks import Forker
from tests.helpers.launching import same_as_one_process
from tests.helpers.presets import sequence
from tests.test_launchers import arguments

TWIN = "tests/helpers/twin_cli.py"
# presets whose constraints do something around a step
BUSY = ("pm", "pm_curvature", "pm_gaussian", "ewc", "olora", "migu", "pam", "refresh", "slca", "lori", "osft")


def reads(forker: Forker, folder: Path, model: str, *presets: str, **keys: object) -> dict[str, Counter[str]]:
    """By preset the project's reads of the device; what libraries read by themselves is left out."""
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]
    ended = forker("tests/helpers/twin_script.py", "twin", folder, model, *presets, "--", *words, what="script")
    assert ended.status == 0, ended.said
    found = json.loads(ended.said.splitlines()[-1])
    return {p: Counter({line: n for line, n in one.items() if not line.startswith("of ")}) for p, one in found.items()}


def test_no_step_waits_for_the_device(forker, pico_folders, tmp_path) -> None:
    """Twice the steps, and as many reads: of the project's only log lines look at the device, and `coso` (not here),
    which decomposes its sketch of gradients there."""
    still = {"train.logging_steps": 100, "train.save_steps": 100}
    few, many = (
        reads(forker, tmp_path / str(n), pico_folders["llama"], *BUSY, **still, **{"train.max_steps": n})
        for n in (3, 6)
    )
    assert few == many


def test_anchor_looks_once_at_where_answers_are(forker, pico_folders, tmp_path) -> None:
    """Six times a pass, however deep the model is: the logits it compares are those of answers."""
    anchored = {"constrain": {"name": "anchor", "weight": 0.5}, "train.logging_steps": 100, "train.save_steps": 100}
    few, many = (
        reads(forker, tmp_path / str(n), pico_folders["llama"], "inclora", **anchored, **{"train.max_steps": n})
        for n in (3, 6)
    )
    assert 0 < (many["inclora"] - few["inclora"]).total() <= 2 * 3 * 6


@pytest.mark.parametrize("preset", ["pm", "pm_curvature"])
def test_fisher_and_merge_wait_as_often_for_any_number_of_modules(preset: str, forker, pico_folders, tmp_path) -> None:
    """But for the copy of base weights into which the running adapter is folded, which is one a module."""
    few, many = (
        reads(forker, tmp_path / str(len(names)), pico_folders["llama"], preset, **{"lora.target_modules": names})
        for names in (["q_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    )
    for one in (few, many):
        for line in [line for line in one[preset] if line.startswith("adapters/in_base.py")]:
            del one[preset][line]
    assert few == many


def test_a_killed_run_goes_on_and_is_scored(forker, pico_folders, tmp_path) -> None:
    run, one = tmp_path / "run", tmp_path / "one"
    given = arguments(pico_folders["llama"], 8)
    assert main(["run", *given, "--output_dir", str(one)]) == 0
    checkpoint = str(run / "work/02-topic/checkpoint-2")
    killed = forker(TWIN, "run", *given, "--output_dir", run, what="script", kill=120, when=checkpoint)
    assert killed.status == -9
    ended = forker(TWIN, "run", *given, "--output_dir", run, what="script")
    assert ended.status == 0, ended.said
    assert "going on from checkpoint-2" in ended.said
    same_as_one_process(run, one)
    files = [tmp_path / f"{i}.jsonl" for i in range(2)]
    words = ["evaluate", "--adapter", str(one / "adapter"), *given, "--predictions"]
    assert main([*words, str(files[0])]) == 0
    ended = forker(TWIN, *words, files[1], what="script")
    assert ended.status == 0, ended.said
    assert files[0].read_text() == files[1].read_text()


def test_routing(forker, pico_folders, tmp_path, capsys) -> None:
    """By the nearest prototype; PEFT's Arrow draws numbers on the device, which the second one cannot."""
    given = [*arguments(pico_folders["llama"], 8), "--method", "per_task"]
    assert main(["run", *given, "--output_dir", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["route", str(tmp_path)]) == 0
    ended = forker(TWIN, "route", tmp_path, what="script")
    assert ended.status == 0, ended.said
    assert capsys.readouterr().out in ended.said


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_bfloat16(family: str, forker, pico_folders, tmp_path) -> None:
    """Weights and autocast in bfloat16: the same to its rounding, which Adam's first steps make large."""
    whole = sequence("pm_curvature", pico_folders[family], tmp_path / "whole", dtype="bfloat16").run()
    ended = forker(
        *("tests/helpers/twin_script.py", "twin", tmp_path / "twin", pico_folders[family], "pm_curvature"),
        *("--", "dtype=bfloat16"),
        what="script",
    )
    assert ended.status == 0, ended.said
    found = json.loads((tmp_path / "twin/pm_curvature/results.json").read_text())
    assert found["raw_coefficients"] == pytest.approx(whole["raw_coefficients"], rel=0.05)
    one, other = (Adapter.load(tmp_path / x / "adapter").factors for x in ("whole", "twin/pm_curvature"))
    for name in one:
        assert (one[name].dense() - other[name].dense()).norm() <= 0.2 * one[name].dense().norm(), name


def test_rows_of_every_kind(forker, pico_folders, tmp_path) -> None:
    kinds = ("text", "preference")
    reads(forker, tmp_path / "twin", pico_folders["llama"], *(f"pm:{kind}" for kind in kinds))
    for kind in kinds:
        whole = sequence("pm", pico_folders["llama"], tmp_path / kind, kind).run()
        found = json.loads((tmp_path / f"twin/pm:{kind}/results.json").read_text())
        assert found["raw_coefficients"] == pytest.approx(whole["raw_coefficients"], rel=1e-4)
        assert found["matrix"][-1] == pytest.approx(whole["matrix"][-1], rel=1e-4)
