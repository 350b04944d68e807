"""The files in `benchmarks/` run and write what they say; how fast they are is asserted nowhere."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import set_seed

from pm_llm import ContinualSequence
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.generate import generate
from pm_llm.evaluation.intervals import mean_interval
from pm_llm.families.models import load_base, load_tokenizer
from pm_llm.presets import PRESETS
from pm_llm.report.data import difference, open_run
from pm_llm.report.tables import compare
from pm_llm.tasks.base import Example
from pm_llm.tasks.encoding import Encoder
from tests.conftest import DECODER, FAMILIES, ROOT, batch_of, features, make_model, make_peft, targets


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation(family: str, tmp_path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/evaluation.py"), "--model", f"embedded:{family}", "--rows", "24"]
    command += ["--repeats", "2", "--max-length", "150", "--out", str(tmp_path / "found.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["way"], row["rows"], row["turns"]) for row in found] == [
        (w, 24, 2) for w in ("plain", "packed", "labels")
    ]
    assert found[1]["predictions unlike the plain way's"] == 0
    assert "| packed |" in done.stdout


def test_every_file_is_in_the_readme() -> None:
    text = (ROOT / "benchmarks/README.md").read_text()
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert f"`{path.name}`" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "words", "expected"),
    [
        ("step", "--turns 1 --batch 1 --tokens 16", "| plain, running folded |"),
        ("fisher", "--turns 1 --rows 4 --width 64 --model embedded:t5", "| embedded:t5 | factored and exact |"),
        ("fold", "--shapes 7b --peft-modules 0 --repeats 1", "| 7b | 64 |"),
        ("directions", "--size 256 --turns 1", "| 256 |"),
        ("many_tasks", "--tasks 20 --modules 2 --size 64", "| ratio last / first |"),
        ("coefficient", "--seeds 0 --order sentiment,topic --train.max_steps 2", "mean absolute difference"),
        ("overhead", "--rows 16 --samples 4 --turns 1", "| this run | 16 | 4 |"),
        ("fisher_samples", "--samples 2 4 --draws 2 --train.max_steps 2", "| 4 | "),
    ],
)
def test_claims_of_the_core(file: str, words: str, expected: str, tmp_path, monkeypatch, capsys) -> None:
    """In this process: importing everything anew takes longer than most of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [file, *words.split(), "--out", "found.json"])
    runpy.run_path(str(ROOT / f"benchmarks/{file}.py"), run_name="__main__")
    assert expected in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())


def test_coefficients_of_other_settings_are_not_taken_for_these(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    (tmp_path / "found.json").write_text(json.dumps({"dense 0": {"settings": {"model": "other"}, "raw": [1.0]}}))
    monkeypatch.setattr(sys, "argv", ["coefficient", "--seeds", "0", "--out", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "benchmarks/coefficient.py"), run_name="__main__")
    assert "holds runs with other settings: {'model': 'other'}" in capsys.readouterr().err


@pytest.mark.slow
def test_methods_are_run_once_and_compared(tmp_path, monkeypatch, capsys) -> None:
    """With the trunk below the first adapted layer looked up; a second call runs nothing again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    words = "--methods seqlora pm --orders sentiment,topic --train.max_steps 2 --max_test_samples 8 --out runs"
    times = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["methods", *words.split(), "--lora.layers_to_transform", "[1]"])
        runpy.run_path(str(ROOT / "benchmarks/methods.py"), run_name="__main__")
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        assert {line.split(" | ")[0] for line in lines} == {"| method", "| seqlora", "| pm"}
        times.append([path.stat().st_mtime_ns for path in sorted(tmp_path.glob("runs/*/results.json"))])
    assert times[0] == times[1]
    import records

    found = records.read(tmp_path / "runs/records.jsonl")
    assert [(r["name"], r["order"], r["seed"], r["method"]["merge"]) for r in found] == [
        ("seqlora", "sentiment,topic", 0, "replace"),
        ("pm", "sentiment,topic", 0, "optimal"),
    ]
    assert all(len(r["matrix"]) == 2 and r["versions"] and r["peak_memory_bytes"] for r in found)
    adapter = sum(file.stat().st_size for file in (tmp_path / "runs/seqlora-sentiment,topic-0/adapter").iterdir())
    assert found[0]["state_bytes"] == adapter < found[1]["state_bytes"]  # P&M keeps its quadratic too
    runs = [open_run(tmp_path / f"runs/{name}-sentiment,topic-0") for name in ("seqlora", "pm")]
    averages = records.averages(found)
    for name, run in zip(averages, runs, strict=True):
        expected = mean_interval(run.final)
        assert expected.value == pytest.approx(run.results.numbers["average_accuracy"])
        given = (expected.value, expected.low, expected.high)
        assert records.interval(averages[name]) == pytest.approx(given, abs=4)
    expected = difference(runs[1], runs[0])
    less = records.interval(averages["pm"] - averages["seqlora"])
    assert less == pytest.approx((expected.value, expected.low, expected.high), abs=4)
    assert less[0] == pytest.approx(expected.value)
    monkeypatch.setattr(sys, "argv", ["methods", *words.split(), "--train.learning_rate", "0.5"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "benchmarks/methods.py"), run_name="__main__")
    assert "other settings: lora" in capsys.readouterr().err  # [1] is not among these words, and the rate is another
    same = [*words.split(), "--lora.layers_to_transform", "[1]", "--max_train_samples", "20"]
    monkeypatch.setattr(sys, "argv", ["methods", *same])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "benchmarks/methods.py"), run_name="__main__")
    assert "other settings: max_train_samples: None -> 20" in capsys.readouterr().err
    assert "/" not in json.dumps({key: found[0][key] for key in ("model", "config", "versions")})

    keep = ["records", "--keep", "runs/pm-sentiment,topic-0", "--into", "kept.jsonl"]
    for _ in range(2):  # the second time in its place
        monkeypatch.setattr(sys, "argv", keep)
        runpy.run_path(str(ROOT / "benchmarks/records.py"), run_name="__main__")
    (kept,) = records.read(tmp_path / "kept.jsonl")
    assert kept == {**found[1], "name": "pm-sentiment,topic-0"}
    monkeypatch.setattr(sys, "argv", keep[:3])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "benchmarks/records.py"), run_name="__main__")
    assert "go together" in capsys.readouterr().err
    marked = "<!-- table of kept.jsonl, {} -->\n"
    page = marked.format("runs") + "\n" + marked.format(f"matrix of {kept['name']}")
    table, matrix = records.renewed(page, tmp_path).split("\n\n")
    assert table.endswith(compare([runs[1].results], names=[kept["name"]]))
    assert matrix == marked.format(f"matrix of {kept['name']}") + runs[1].matrix.table(kept["coefficients"]) + "\n"

    monkeypatch.setitem(PRESETS, "pm", PRESETS["pm_gaussian"])
    monkeypatch.setattr(sys, "argv", ["methods", *words.split(), "--lora.layers_to_transform", "[1]"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "benchmarks/methods.py"), run_name="__main__")
    assert "other settings: words.constrain" in capsys.readouterr().err

    words = ["flatness", "runs/pm-sentiment,topic-0", "--samples", "8", "--out", "flat.json"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / "benchmarks/flatness.py"), run_name="__main__")
    flat = json.loads((tmp_path / "flat.json").read_text())
    assert [row["task"] for row in flat] == ["sentiment", "topic"]
    first = flat[0]
    assert first["at 1/t"] == first["trained"] != first["loss before"]
    second = (first["at 1 - eps"] + first["at 1 + eps"] - 2 * first["trained"]) / 0.25
    assert first["curvature"] == pytest.approx(second)
    monkeypatch.setattr(sys, "argv", [*words, "--pairs", "pm", "pm"])
    runpy.run_path(str(ROOT / "benchmarks/flatness.py"), run_name="__main__")
    pairs = json.loads((tmp_path / "flat.json").read_text())
    assert [(row["task"], row["runs"], row["rise, difference"]) for row in pairs] == [
        ("sentiment", 1, 0),
        ("all", 1, 0),
    ]
    assert pairs[0]["curvature, pm"] == first["curvature"]
    assert pairs[0]["score, pm"] == found[1]["matrix"][0][0]
    monkeypatch.setattr(sys, "argv", [*words, "--pairs", "pm", "optimal"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "benchmarks/flatness.py"), run_name="__main__")
    assert "no two of these runs are of pm and optimal" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["flatness", "runs/seqlora-sentiment,topic-0"])
    with pytest.raises(PmLlmError, match="do not start fresh"):
        runpy.run_path(str(ROOT / "benchmarks/flatness.py"), run_name="__main__")


@pytest.mark.slow
def test_joint_trained_in_its_last_stage_alone_ends_the_same(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    words = "--methods joint --orders sentiment,topic --max_test_samples 8 --train.max_steps 3 --out runs".split()
    monkeypatch.setattr(sys, "argv", ["methods", *words, "--max_train_samples", "16"])
    runpy.run_path(str(ROOT / "benchmarks/methods.py"), run_name="__main__")
    run = open_run("runs/joint-sentiment,topic-0")
    plain = ContinualSequence(load_config(None, {**run.results.config, "output_dir": "plain"}))
    assert plain.run()["matrix"][-1] == run.results.matrix[-1]
    one, other = (load_file(f"{folder}/adapter/adapter_model.safetensors") for folder in (run.path, "plain"))
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    assert "| - | - |" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| joint"))


def test_every_variant_is_a_method_that_runs() -> None:
    """As far as a configuration tells before a model is loaded."""
    variants = yaml.safe_load((ROOT / "benchmarks/variants.yaml").read_text())
    for name, keys in variants.items():
        assert name not in PRESETS
        load_config(None, {"model": "embedded:llama", "benchmark": "embedded", "output_dir": "none", **keys}).check()


def test_the_trunk_gives_what_the_layers_give(monkeypatch) -> None:
    """The same loss and gradient, computed the first time, looked up and packed the second, and looked up row by row
    where a hook looks on; decoding looks nothing up."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import trunk

    trunk.CACHE.clear()
    rows = features("llama", 11)  # two packs
    for row in rows:
        row["input_ids"][:3] = rows[0]["input_ids"][:3]
    batch, seen, packs = batch_of("llama", rows), [], []
    pack = trunk._packed
    monkeypatch.setattr(trunk, "_packed", lambda *given: (packs.append(len(given[2])), pack(*given))[1])
    whole = make_peft("llama", random_b=True, layers_to_transform=[1])
    base = make_model("llama")
    trunk.install(base, 1, "pico")
    set_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets("llama"), init_lora_weights=False, task_type="CAUSAL_LM"
    )
    config.layers_to_transform = [1]
    cached = get_peft_model(base, config)
    found = []
    layers = cached.get_base_model().model.layers
    for model, looks_on in ((whole, False), (cached, False), (cached, False), (cached, True)):
        model.zero_grad()
        if model is cached:
            hook = layers[1].register_forward_hook(lambda _, __, out: seen.append(out.shape[0]))
            if not looks_on:
                hook.remove()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert len(trunk.CACHE) == 11
    assert (seen, packs) == ([11], [8, 3])
    for one in found[1:]:
        for x, y in zip(found[0], one, strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)
    prompt = batch["input_ids"][:1, :6]
    said = [model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False) for model in (whole, cached)]
    assert torch.equal(*said)
    assert len(trunk.CACHE) == 11


def test_checked_guesses_are_what_the_model_generates(monkeypatch) -> None:
    """Whatever is guessed: right answers, wrong ones, answers that end at once or not within the limit."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import guesses

    tokenizer, _ = load_tokenizer("embedded:llama")
    model = load_base("embedded:llama", "float32", False).model
    set_seed(0)
    config = LoraConfig(r=4, lora_alpha=256, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    answers = ["joy", "sad news", "a b c d e f g"]
    rows = [Example("a film about rain " * (i % 4 + 1) + str(i), answers[i % 3]) for i in range(12)]
    encoder = Encoder(tokenizer, DECODER, 96, 4)
    expected = generate(adapted, encoder, rows, 4)
    assert len(set(expected)) > 1
    assert guesses.generate(adapted, encoder, rows, 4) == expected
    ids = adapted.generate(input_ids=torch.tensor([encoder.prompt(rows[0])]), max_new_tokens=1, do_sample=False)
    end = int(ids[0, -1])  # from now on what ends an answer
    adapted.generation_config.eos_token_id = [tokenizer.pad_token_id, end]
    ended = generate(adapted, encoder, rows, 4)
    assert guesses.generate(adapted, encoder, rows, 4) == ended
    assert ended != expected


@pytest.mark.slow
def test_curvature_memory(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/curvature_memory.py"), "--modules", "2", "--size", "64"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "found.json")], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    expected = ["memory", "memory, blocks given back", "disk", "disk, blocks given back"]
    assert [row["sums in"] for row in found] == expected
    assert "| disk |" in done.stdout
