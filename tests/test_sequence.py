"""The whole loop on pico models: files, going on after a stop, accelerate, and the trained behaviour."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pm_llm import ContinualSequence, Merger, load_tasks
from pm_llm.adapters.adapter import Adapter
from pm_llm.cli import main
from tests.conftest import FAMILIES, ROOT, batch_of, features, make_peft, pm_llm, small_tasks
from tests.helpers.runs import TASKS, config_for
from tests.helpers.stops import stopping


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["pm", "seqlora", "inclora", "average", "slao", "task_arithmetic", "ties", "opcm"])
def test_what_presets_leave_behind(family: str, method: str, pico_folders, tmp_path) -> None:
    results = ContinualSequence(config_for(pico_folders[family], tmp_path / "run", method=method, max_rank=6)).run()
    run = tmp_path / "run"
    assert json.loads((run / "results.json").read_text()) == results
    assert [len([x for x in row if x is not None]) for row in results["matrix"]] == [1, 2, 3]
    coefficients = results["coefficients"]
    if method == "average":
        assert coefficients == pytest.approx([1, 1 / 2, 1 / 3])
    elif method == "task_arithmetic":
        assert coefficients == [0.5, 0.5, 0.5]
    elif method == "slao":
        assert coefficients == pytest.approx([1, 2**-0.5, 3**-0.5])
    elif method == "pm":
        assert coefficients[0] == 1
        assert 0 <= coefficients[2] < 1
    else:
        assert coefficients == [1, 1, 1]
    merged = Adapter.load(run / "adapter")
    assert merged.base_model == pico_folders[family]  # in every task's adapter, not the first one's alone
    assert merged.task_type == ("CAUSAL_LM" if family == "llama" else "SEQ_2_SEQ_LM")
    assert merged.rank == (4 if method in ("seqlora", "slao") else 6)
    task = Adapter.load(run / "stages/03-question/task_adapter")
    if method == "seqlora":
        for name, x in merged.factors.items():
            torch.testing.assert_close(x.dense(), task.factors[name].dense(), atol=1e-6, rtol=1e-5)
    curvature = sorted(run.glob("stages/*/curvature.safetensors"))
    remembers = method in ("pm", "ties", "dare", "opcm")
    assert [p.parent.name for p in curvature] == (["02-topic", "03-question"] if remembers else [])
    log = [json.loads(line) for line in (run / "stages/01-sentiment/log.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in log)


def test_merged_adapter_is_running_plus_coefficient_times_task(pico_folders, tmp_path) -> None:
    results = ContinualSequence(config_for(pico_folders["llama"], tmp_path / "run", max_rank=None)).run()
    folders = [tmp_path / "run/stages" / f"{i:02d}-{name}" for i, name in enumerate(TASKS, 1)]
    for t in (1, 2):
        before, after = Adapter.load(folders[t - 1] / "adapter"), Adapter.load(folders[t] / "adapter")
        new = Adapter.load(folders[t] / "task_adapter")
        for name, x in after.factors.items():
            expected = before.factors[name].dense() + results["coefficients"][t] * new.factors[name].dense()
            torch.testing.assert_close(x.dense(), expected, atol=1e-6, rtol=1e-5)


STOPS = [("pm", "train"), ("pm", "measure"), ("pm", "evaluate"), ("seqlora", "train"), ("slao", "train")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "where", "dtype"), [(*stop, "float32") for stop in STOPS] + [("pm", "train", "bfloat16")]
)
def test_going_on_after_a_stop_changes_nothing(
    family: str, method: str, where: str, dtype: str, pico_folders, tmp_path
) -> None:
    keys = {"method": method, "dtype": dtype, "train.max_steps": 4}  # training ends in the middle of an epoch
    whole = ContinualSequence(config_for(pico_folders[family], tmp_path / "whole", **keys)).run()
    stopped = ContinualSequence(config_for(pico_folders[family], tmp_path / "parts", **keys))
    with stopping(where, 2), pytest.raises(KeyboardInterrupt):
        stopped.run()
    trained = 2 if where == "evaluate" else 1
    assert len(stopped.run_dir.state()["stages"]) == trained
    Adapter.load(tmp_path / "parts/adapter")
    resumed = ContinualSequence(config_for(pico_folders[family], tmp_path / "parts", **keys)).run()
    for key in ("matrix", "coefficients", "raw_coefficients", "curvatures"):
        assert resumed[key] == whole[key]
    a, b = (load_file(tmp_path / d / "adapter/adapter_model.safetensors") for d in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_in_mapped_files_give_the_same(family: str, pico_folders, tmp_path) -> None:
    runs = {}
    for storage in ("memory", "disk"):
        config = config_for(pico_folders[family], tmp_path / storage, **{"fisher.storage": storage})
        runs[storage] = ContinualSequence(config).run()
        assert not (tmp_path / storage / "work").exists()
    assert runs["memory"]["raw_coefficients"] == runs["disk"]["raw_coefficients"]
    a, b = (load_file(tmp_path / d / "adapter/adapter_model.safetensors") for d in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_evaluate_all_fills_the_matrix(pico_folders, tmp_path) -> None:
    config = config_for(pico_folders["t5"], tmp_path / "run", **{"evaluate": "all", "train.max_steps": 1})
    assert all(x is not None for row in ContinualSequence(config).run()["matrix"] for x in row)


def test_plain_peft_loads_the_result(pico_folders, tmp_path) -> None:
    sequence = ContinualSequence(config_for(pico_folders["llama"], tmp_path / "run"))
    sequence.run()
    base = AutoModelForCausalLM.from_pretrained(pico_folders["llama"])
    model = PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).eval()
    batch = batch_of("llama", features("llama", 4))
    with torch.no_grad():
        with_it = model(**batch).logits
        torch.testing.assert_close(with_it, sequence.session.model.eval()(**batch).logits, atol=0, rtol=0)
        with model.disable_adapter():
            assert not torch.allclose(with_it, model(**batch).logits, atol=1e-4)


def test_plain_accelerate_launch_as_in_the_readme(pico_folders, tmp_path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(ROOT / "accelerate_configs/cpu.yaml"), str(ROOT / "recipes/continual.py")]
    launch += ["--config", str(ROOT / "pm_llm/embedded/quickstart.yaml"), "--model", pico_folders["llama"]]
    launch += ["--order", "sentiment", "--train.num_train_epochs", "0.1", "--max_test_samples", "2"]
    done = subprocess.run(
        [*launch, "--output_dir", str(tmp_path / "run")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "average accuracy" in done.stdout
    assert (tmp_path / "run/matrix.png").stat().st_size > 1000


# ---- the command line ----
def test_help_answers_in_under_a_second_without_torch() -> None:
    code = "import sys; from pm_llm.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 1
    for command in ("run", "merge", "evaluate", "report", "push"):
        assert command in done.stdout
        assert pm_llm(command, "--help").returncode == 0


def test_merge_of_two_folders(tmp_path, capsys) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        model = make_peft("llama", seed=seed, random_b=True, use_rslora=seed == 1)
        model.save_pretrained(tmp_path / name)
    arguments = ["--running", tmp_path / "a", "--new", tmp_path / "b", "--coefficient", "0.4", "--out", tmp_path / "c"]
    assert main(["merge", *map(str, arguments)]) == 0
    assert "rank 8, relative truncation error 0.000e+00" in capsys.readouterr().out
    a, b, c = (Adapter.load(tmp_path / name).factors for name in "abc")
    for name in a:
        torch.testing.assert_close(c[name].dense(), a[name].dense() + 0.4 * b[name].dense())
    arguments[-1] = tmp_path / "d"
    assert main(["merge", *map(str, arguments), "--max-rank", "5"]) == 0
    d = Adapter.load(tmp_path / "d")
    error = sum(float((d.factors[n].dense() - c[n].dense()).norm() ** 2) for n in c) ** 0.5
    norm = sum(float(c[n].dense().norm() ** 2) for n in c) ** 0.5
    printed = float(capsys.readouterr().out.rpartition(" ")[2])
    assert printed == pytest.approx(error / norm, rel=1e-2)
    assert printed > 0.01
    assert d.rank == 5


def test_evaluate_and_report(pico_folders, tmp_path, capsys) -> None:
    config = config_for(pico_folders["llama"], tmp_path / "run", **{"train.max_steps": 1})
    results = ContinualSequence(config).run()
    arguments = ["--model", pico_folders["llama"], "--benchmark", "embedded", "--order", ",".join(TASKS)]
    arguments += ["--max_test_samples", "4", "--max_length", "96"]
    capsys.readouterr()
    assert main(["evaluate", "--adapter", str(tmp_path / "run/adapter"), *arguments]) == 0
    lines = {line.split("\t")[0]: line.split("\t")[1:] for line in capsys.readouterr().out.strip().splitlines()}
    assert [float(lines[name][0]) for name in TASKS] == pytest.approx(results["matrix"][-1], abs=0.01)
    assert all(" to " in interval for _, interval, _ in lines.values())
    assert {name: rows for name, (_, _, rows) in lines.items()} == dict.fromkeys(TASKS, "4 rows") | {"mean": "12 rows"}
    assert main(["evaluate", *arguments]) == 0  # the base model alone
    assert main(["evaluate", "--adapter", str(tmp_path / "nothing"), *arguments]) == 2
    assert "cannot load the adapter" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), str(tmp_path / "run")]) == 0
    assert "| method | average accuracy" in capsys.readouterr().out
    assert (tmp_path / "run/report.html").is_file()


def test_the_public_names_work_together(pico_folders, tmp_path) -> None:
    config = config_for(pico_folders["llama"], tmp_path / "run")
    assert [task.name for task in load_tasks(config)] == list(TASKS)
    ContinualSequence(config, small_tasks("sentiment")).run()
    folder = Path(tmp_path / "run/adapter")
    assert Merger("sum").fold(folder, folder).rank == 8


def test_events_of_tensorboard_stay(pico_folders, tmp_path) -> None:
    keys = {"method": "seqlora", "train.extra": {"report_to": "tensorboard"}, "order": ["sentiment", "topic"]}
    ContinualSequence(config_for(pico_folders["llama"], tmp_path / "run", **keys)).run()
    found = {path.parent.name for path in (tmp_path / "run/logs").rglob("events.out.*")}
    assert found == {"01-sentiment", "02-topic"}
    again = ContinualSequence(config_for(pico_folders["llama"], tmp_path / "run", **keys)).run()  # sweeps the folder
    assert len(again["stages"]) == len(found)
    assert len(list((tmp_path / "run/logs").rglob("events.out.*"))) == 2
