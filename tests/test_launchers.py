"""The whole loop under accelerate's launchers: the same outcome as one process, also when a process is killed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pm_llm.adapters.adapter import Adapter
from pm_llm.cli import main
from tests.conftest import FAMILIES
from tests.faults.conftest import every_adapter_loads
from tests.helpers.launching import launch, launcher, rank, same_as_one_process, start

KINDS = ("ddp_cpu", "fsdp2", "zero2", "zero3")


def arguments(model: str, batch: int) -> list[str]:
    """Two tasks of four steps, a checkpoint in the middle, and fewer Fisher rows than processes."""
    keys = {"model": model, "benchmark": "embedded", "order": "sentiment,topic", "max_train_samples": 32}
    keys |= {"max_test_samples": 5, "max_length": 96, "lora.r": 4, "fisher.samples": 1, "fisher.batch_size": 2}
    keys |= {"train.max_steps": 4, "train.learning_rate": 0.01, "train.save_steps": 2, "train.logging_steps": 1}
    keys["train.per_device_train_batch_size"] = batch
    return [str(word) for key, value in keys.items() for word in (f"--{key}", value)]


@pytest.fixture(scope="module")
def deep_folder(pico_folders, tmp_path_factory) -> str:
    """A LLaMA of so many blocks that a block is little of it."""
    folder = tmp_path_factory.mktemp("deep")
    shutil.copytree(pico_folders["llama"], folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers, config.layer_types = 16, None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def one_process(pico_folders, tmp_path_factory) -> dict[str, Path]:
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp("one") / family
        assert main(["run", *arguments(pico_folders[family], 8), "--output_dir", str(found[family])]) == 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family"),
    [(kind, family) for kind in KINDS for family in FAMILIES if (kind, family) != ("fsdp2", "t5")],
)
def test_a_killed_rank_then_the_same_run(kind: str, family: str, forker, one_process, pico_folders, tmp_path) -> None:
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*launcher(kind, tmp_path), *arguments(pico_folders[family], 4), "--output_dir", str(run)]
    process = start(command, log)
    deadline = time.monotonic() + 200
    while not list(run.glob("work/02-topic/checkpoint-2")) and time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    victim = rank(1, process.pid)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    assert every_adapter_loads(run)
    ended = launch(forker, command)
    assert ended.status == 0, ended.said
    assert "topic: going on from checkpoint-2" in ended.said
    same_as_one_process(run, one_process[family])


@pytest.mark.slow
@pytest.mark.parametrize("space", ["weights", "factors"])
def test_curvature_in_every_form_is_that_of_one_process(space: str, forker, pico_folders, tmp_path) -> None:
    """Factored Fisher (or that of the factors), losses, exact curvature and the penalty, over two processes."""
    more = ["--fisher.form", "factored", "--constrain", "[perturb, curvature]", "--space", space]
    more += ["--merge", "{name: optimal, fisher_scale: measured, current: exact}", "--fisher.samples", "5"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["run", *arguments(pico_folders["llama"], 8), *more, "--output_dir", str(one)]) == 0
    command = [*launcher("ddp_cpu", tmp_path), *arguments(pico_folders["llama"], 4), *more, "--output_dir", str(two)]
    ended = launch(forker, command)
    assert ended.status == 0, ended.said
    same_as_one_process(two, one)


@pytest.mark.slow
def test_a_penalty_under_fsdp2_is_that_of_one_process(forker, pico_folders, tmp_path) -> None:
    """Two passes a step, of which the last adds it; activations are computed again."""
    more = ["--method", "pm_curvature", "--constrain", "{name: curvature, weight: 100}", "--fisher.samples", "5"]
    steps = ["--train.gradient_accumulation_steps", "2", "--train.gradient_checkpointing", "true"]
    one, two, without = tmp_path / "one", tmp_path / "two", tmp_path / "without"
    for run, weight in ((one, "100"), (without, "0")):
        changed = [*more[:3], f"{{name: curvature, weight: {weight}}}", *more[4:]]
        assert main(["run", *arguments(pico_folders["llama"], 8), *changed, "--output_dir", str(run)]) == 0
    command = [*launcher("fsdp2", tmp_path), *arguments(pico_folders["llama"], 2), *more, *steps]
    ended = launch(forker, [*command, "--output_dir", str(two)])
    assert ended.status == 0, ended.said
    same_as_one_process(two, one)
    a, b = (Adapter.load(run / "stages/02-topic/task_adapter").factors for run in (one, without))
    moved = [(a[name].dense() - b[name].dense()).norm() / a[name].dense().norm() for name in a]
    assert min(moved) > 0.1, moved


@pytest.mark.slow
def test_a_launcher_that_is_told_to_stop_leaves_a_checkpoint(pico_folders, tmp_path, capsys) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*launcher("ddp_cpu", tmp_path), *arguments(pico_folders["llama"], 4), "--output_dir", str(run)]
    command += ["--train.max_steps", "100000", "--train.save_steps", "100000"]
    process, deadline = start(command, log), time.monotonic() + 100
    while not (run / "work/01-sentiment").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)
    process.terminate()
    assert process.wait(timeout=60) != 0
    assert list(run.glob("work/01-sentiment/checkpoint-*")), log.read_text()
    assert main(["status", str(run)]) == 0
    assert re.search(r"next: train task 1 \(sentiment\) from step \d+ of 100000", capsys.readouterr().out)


@pytest.mark.slow
def test_what_is_left_when_a_rank_dies_says_so(forker, pico_folders, tmp_path) -> None:
    """A lost connection, also where files are being written."""
    command = [
        *launcher("ddp_cpu", tmp_path, "tests/helpers/lost_peer_script.py"),
        "run",
        *arguments(pico_folders["llama"], 4),
    ]
    ended = launch(forker, [*command, "--output_dir", str(tmp_path / "run")])
    assert ended.status != 0
    assert "pm-llm: error: the connection to another process was lost" in ended.said
    assert "cannot write" not in ended.said
    assert "Traceback" not in ended.said.split("pm-llm: error")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--method", "pm_curvature", "--fisher.samples", "3", "--evaluation.mode", "labels"],
        ["--method", "pm", "--space", "factors"],
        ["--method", "inflora", "--fisher.samples", "3", "--evaluate", "all"],
        ["--method", "pm", "--constrain", "[perturb, {name: anchor, weight: 0.5}]"],
    ],
    ids=["pm_curvature", "factors", "inflora", "anchor"],
)
def test_fsdp2_measures_where_the_model_lies(more: list[str], forker, deep_folder, tmp_path) -> None:
    """Training, Fisher, losses, scores by generation and by likelihood are one process's, and no process ever holds
    the base model's parameters."""
    one, two, file = tmp_path / "one", tmp_path / "two", tmp_path / "held"
    assert main(["run", *arguments(deep_folder, 8), *more, "--output_dir", str(one)]) == 0
    command = [*launcher("fsdp2", tmp_path, "tests/helpers/held_script.py"), str(file), *arguments(deep_folder, 4)]
    ended = launch(forker, [*command, *more, "--output_dir", str(two)])
    assert ended.status == 0, ended.said
    same_as_one_process(two, one)
    for number in range(2):
        most, whole = map(int, file.with_suffix(f".{number}").read_text().split())
        assert whole / 2 < most < 0.8 * whole


@pytest.mark.slow
def test_fsdp2_of_weights_of_other_names(forker, deep_folder, tmp_path) -> None:
    """A checkpoint whose names transformers changes as it reads it is loaded whole, and shared out then."""
    model, one, two = tmp_path / "model", tmp_path / "one", tmp_path / "two"
    shutil.copytree(deep_folder, model)
    tensors = {key.removeprefix("model."): x for key, x in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert main(["run", *arguments(str(model), 8), "--output_dir", str(one)]) == 0
    ended = launch(forker, [*launcher("fsdp2", tmp_path), *arguments(str(model), 4), "--output_dir", str(two)])
    assert ended.status == 0, ended.said
    same_as_one_process(two, one)


@pytest.mark.slow
def test_fsdp2_of_an_encoder_decoder_is_refused(forker, pico_folders, tmp_path) -> None:
    command = [*launcher("fsdp2", tmp_path), *arguments(pico_folders["t5"], 4), "--output_dir", str(tmp_path / "run")]
    ended = launch(forker, command)
    assert ended.status != 0
    assert "pm-llm: error: FSDP2 cannot share out an encoder-decoder" in ended.said
    assert "zero3.yaml" in ended.said


@pytest.mark.slow
def test_fsdp2_of_what_works_on_the_base_weights_is_refused(forker, pico_folders, tmp_path) -> None:
    command = [*launcher("fsdp2", tmp_path), *arguments(pico_folders["llama"], 4), "--method", "osft"]
    ended = launch(forker, [*command, "--output_dir", str(tmp_path / "run")])
    assert ended.status != 0
    assert "pm-llm: error: Osft needs the base model's whole weights in every process. Use ddp.yaml" in ended.said


@pytest.mark.slow
def test_two_machines(one_process, pico_folders, tmp_path) -> None:
    """Two launchers that find each other on loopback, a process each, with a folder that both see."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run, processes = tmp_path / "run", []
    for machine in (0, 1):
        (tmp_path / str(machine)).mkdir()
        changes = {"num_machines": 2, "machine_rank": machine, "main_process_ip": "127.0.0.1"}
        command = launcher("ddp_cpu", tmp_path / str(machine), **changes, main_process_port=port)
        command += [*arguments(pico_folders["llama"], 4), "--output_dir", str(run)]
        processes.append(start(command, tmp_path / f"log{machine}"))
    for machine, process in enumerate(processes):
        assert process.wait(timeout=240) == 0, (tmp_path / f"log{machine}").read_text()
    assert "[2/2] topic" in (tmp_path / "log0").read_text()
    assert "[2/2] topic" not in (tmp_path / "log1").read_text()  # one process speaks
    same_as_one_process(run, one_process["llama"])


@pytest.mark.slow
def test_a_penalty_on_an_adapter_that_the_forward_does_not_reach(forker, tmp_path) -> None:
    """DDP looks for unused parameters, and would mark such an adapter ready twice."""
    command = [*launcher("ddp_cpu", tmp_path, "tests/helpers/unreached_script.py"), str(tmp_path / "out")]
    ended = launch(forker, command)
    assert ended.status == 0, ended.said
    assert "both steps were made" in ended.said
