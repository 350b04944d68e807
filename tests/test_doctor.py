"""`pm-llm doctor`: what would not work is said, with what to install; secrets are not."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections import namedtuple

import pytest
from safetensors.torch import load_file

from pm_llm import ContinualSequence
from pm_llm.adapters.adapter import Adapter
from pm_llm.cli import main
from pm_llm.commands._examine import expected_bytes
from pm_llm.config import load_config
from pm_llm.fisher.measure import sum_fisher
from pm_llm.system.files import size_of
from tests.conftest import FAMILIES, make_peft
from tests.helpers.forks import Forker
from tests.helpers.hub import environment
from tests.helpers.hub_server import TOKEN, HubServer
from tests.helpers.runs import config_for

TASKS = ["--benchmark", "embedded", "--order", "sentiment,topic"]
ORDER = {"benchmark": "embedded", "order": "sentiment,topic"}


def test_a_machine_that_will_do(pico_folders, tmp_path, capsys) -> None:
    arguments = ["doctor", "--model", pico_folders["llama"], *TASKS, "--output_dir", str(tmp_path / "run")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    for package in ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "evaluate", "huggingface_hub"):
        assert f"{package}: {importlib.metadata.version(package)}" in said
    assert "bfloat16: works on" in said
    assert "needed for 2 tasks" in said
    assert "a run can begin" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_room_it_asks_for_is_what_a_run_takes(family: str, pico_folders, tmp_path) -> None:
    config = config_for(pico_folders[family], tmp_path / "run")
    need, _, tasks = expected_bytes(config)
    assert tasks == 3
    ContinualSequence(config).run()
    tensors = [*(tmp_path / "run").rglob("stages/*/*adapter/*.safetensors"), *(tmp_path / "run").rglob("curv*")]
    used = sum(path.stat().st_size for path in tensors)
    assert 0.7 * used < need < 4 * used  # at its end a run has one copy of the curvature and no checkpoint


@pytest.mark.parametrize("method", ["ties", "ewc", "inflora"])
def test_the_room_it_asks_for_has_what_a_method_remembers(method: str, pico_folders, tmp_path) -> None:
    """Old adapters in the last stage, a constraint's memory in every one."""
    keys = {"max_rank": 12, "benchmark": "embedded", "order": "sentiment,topic,intent"}
    config, plain = (
        load_config(None, {**config_for(pico_folders["llama"], tmp_path / "run").plain(), **keys, "method": name})
        for name in (method, "inclora")
    )
    ContinualSequence(config).run()
    files = [*(tmp_path / "run").rglob("memory.safetensors"), *(tmp_path / "run").rglob("curv*")]
    remembered = sum(x.nbytes for path in files for x in load_file(path).values())
    assert remembered <= expected_bytes(config)[0] - expected_bytes(plain)[0] < 4 * remembered


@pytest.mark.parametrize(
    ("words", "rank"),
    [
        ({"method": "ties"}, 32),
        ({"method": "magmax", "repeat": 3}, 32),
        ({"method": "opcm", "repeat": 3}, 32),
        ({"method": "frank_wolfe", "start": "fresh", "repeat": 2}, 32),
        ({"method": "opcm"}, 10),
        ({"method": "frank_wolfe", "start": "fresh"}, 14),
        ({"method": "frank_wolfe"}, 6),
        ({"method": "inclora"}, 6),
    ],
)
def test_the_room_it_asks_for_is_enough_whatever_the_merge_does_to_the_rank(words, rank, pico_folders, tmp_path):
    """Entry by entry a merge is of full rank after the first task already."""
    keys = {"max_rank": None, "benchmark": "embedded", "order": "sentiment,topic,intent", "lora.r": 2, **words}
    keys |= {"train.max_steps": 1, "lora.target_modules": ["q_proj"]}
    config = load_config(None, {**config_for(pico_folders["llama"], tmp_path / "run").plain(), **keys})
    ContinualSequence(config).run()
    ranks = [
        kept.rank
        for path in (tmp_path / "run").glob("stages/*/adapter")
        for kept in Adapter.load(path).factors.values()
    ]
    memory = [x for path in (tmp_path / "run").rglob("memory.safetensors") for x in load_file(path).values()]
    written = [*(tmp_path / "run").rglob("stages/*/*adapter/*.safetensors")]
    assert max(ranks) == rank
    assert sum(path.stat().st_size for path in written) + sum(x.nbytes for x in memory) < expected_bytes(config)[0]


@pytest.mark.parametrize("form", ["dense", "factored", "kronecker"])
def test_the_memory_it_asks_for_is_that_of_the_sums(form: str, pico_folders, tmp_path, capsys, monkeypatch) -> None:
    keys = ["--model", pico_folders["llama"], *TASKS, "--method", "pm", "--fisher.form", form]
    keys += ["--output_dir", str(tmp_path / "run")]
    assert main(["doctor", *keys]) == 0
    need, sums, _ = expected_bytes(
        load_config(None, {"model": pico_folders["llama"], "method": "pm", "fisher.form": form, **ORDER})
    )
    model = make_peft("llama")
    blank = sum_fisher(model, [], form).modules.values()
    copies = 5 if form == "dense" else 1  # with S and m, before and after
    assert sums == copies * sum(4 * x.numel() for tensors in blank for x in tensors.values())
    assert f"{size_of(sums)} of" in capsys.readouterr().out
    monkeypatch.setattr(os, "sysconf", lambda name: sums if name == "SC_PHYS_PAGES" else 1)
    assert main(["doctor", *keys]) == 0
    assert ("Use --fisher.storage disk" if form == "dense" else "Use a merge with") in capsys.readouterr().out
    assert main(["doctor", *keys, "--fisher.storage", "disk"]) == 0
    said = capsys.readouterr().out
    assert ("sums of the Fisher" in said) == (form != "dense")  # the others' are where the model is
    assert f"about {size_of(need + sums if form == 'dense' else need)} needed" in said


def test_a_model_or_a_task_that_is_not_there(pico_folders, tmp_path, capsys) -> None:
    folder = ["--output_dir", str(tmp_path / "run")]
    assert main(["doctor", "--model", str(tmp_path / "no-model"), *TASKS, *folder]) == 1
    assert "no-model" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILURE"))
    assert main(["doctor", "--model", pico_folders["llama"], "--tasks", "suport.jsonl", *folder]) == 1
    said = capsys.readouterr().out
    assert "FAILURE  model and tasks: suport.jsonl: does not exist" in said
    assert "1 thing will not work" in said
    assert main(["doctor", *folder]) == 0
    assert "there are no tasks to tell what is needed" in capsys.readouterr().out


def test_a_full_disk_and_a_missing_package(pico_folders, tmp_path, capsys, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "bitsandbytes":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "peft" else installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    arguments = ["doctor", "--model", pico_folders["llama"], *TASKS, "--load_in_4bit", "true"]
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 1
    lines = capsys.readouterr().out.splitlines()
    failures = {line.split()[1].rstrip(":"): line for line in lines if line.startswith("FAILURE")}
    assert set(failures) >= {"disk", "bitsandbytes", "peft"}
    assert 'pip install "pm_llm[qlora]"' in failures["bitsandbytes"]
    assert "0.0.1 is not >=" in failures["peft"]
    assert "Make room" in failures["disk"]
    assert "will not work" in lines[-1]


def test_the_token_is_never_shown(pico_folders, tmp_path) -> None:
    words = ["doctor", "--model", pico_folders["llama"], *TASKS]
    hub = HubServer()
    with Forker(tmp_path, environment(hub, tmp_path)) as forker:
        with hub:
            done = forker(*words)
            assert done.status == 0, done.said
            assert f"logged in as user at {hub.url}" in done.said
            assert TOKEN not in done.said
            done = forker(*words, env={"HF_TOKEN": TOKEN[:-1]})
            assert "does not take the token" in done.said
            assert TOKEN[:-1] not in done.said
        done = forker(*words)
    assert "does not take the token" in done.said


def test_bad_input_is_one_line(capsys) -> None:
    assert main(["doctor", "--lora.r", "0"]) == 2
    assert "lora.r is 0" in capsys.readouterr().err
