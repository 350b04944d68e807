"""Every command and every piece of code in the README and in pages of the docs, run as it stands there.

The names it uses (a model and a dataset on the Hub, the user's files) are folders and files of those names here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict

from tests.conftest import ROOT, features, make_model, make_peft, tokenizer

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)


def blocks_of(page: str) -> list[tuple[str, str]]:
    return re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)


LIFE, PYTHON, SERVING = blocks_of("life.md"), blocks_of("python.md"), blocks_of("serving.md")


def commands(blocks: list[tuple[str, str]] = BLOCKS) -> list[str]:
    lines = [line for kind, text in blocks if kind == "bash" for line in text.splitlines()]
    found = [line.partition(" #")[0].strip() for line in lines]
    return [command for command in found if command]


def test_make_commands_are_what_ci_runs() -> None:
    ci = (ROOT / ".ci/run").read_text()
    inline = re.findall(r"`(make [^`]+)`", README)
    for command in [c for c in commands() if c.startswith("make")] + inline:
        assert command in ci.splitlines(), command


@pytest.fixture
def place(tmp_path) -> Path:
    """A working folder in which the README's names exist."""
    cwd = tmp_path
    base = cwd / "HuggingFaceTB/SmolLM2-135M-Instruct"
    make_model("llama").save_pretrained(base)
    tokenizer("llama").save_pretrained(base)
    rows = [{"prompt": f"is {i} even ?", "completion": "yes" if i % 2 == 0 else "no"} for i in range(20)]
    for name in ("support", "billing", "phones", "taxes", "yesterday"):
        Dataset.from_list(rows).to_json(str(cwd / f"{name}.jsonl"))
    Dataset.from_list([{"prompt": row["prompt"]} for row in rows]).to_json(str(cwd / "general.jsonl"))
    make_peft("llama", random_b=True).save_pretrained(cwd / "yesterday")
    (cwd / "legal").mkdir()
    law = Dataset.from_list([{"question": r["prompt"], "answer": r["completion"]} for r in rows])
    law.to_csv(str(cwd / "legal/train.csv"))
    law.to_csv(str(cwd / "legal/test.csv"))
    both = DatasetDict(train=Dataset.from_list(rows[:15]), validation=Dataset.from_list(rows[15:]))
    both.save_to_disk(str(cwd / "my-org/medical"))
    (recipe,) = [text for kind, text in BLOCKS if kind == "yaml"]
    (cwd / "my.yaml").write_text(recipe)
    for name in ("recipes", "accelerate_configs"):
        (cwd / name).symlink_to(ROOT / name)
    (cwd / "A").symlink_to("runs/mine/stages/01-support/adapter")
    (cwd / "B").symlink_to("runs/mine/stages/02-law/task_adapter")
    return cwd


def do(forker, place: Path, command: list[str]) -> None:
    if command[:2] == ["pm-llm", "push"]:  # the model is a folder here
        command += ["--base-model", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    ended = forker(*command[1:], cwd=place)
    assert ended.status == 0, f"{command}\n{ended.said}"


@pytest.mark.slow
def test_commands_of_a_life(place: Path, forker, monkeypatch) -> None:
    """Every command and piece of code of docs/life.md, in its order."""
    do(forker, place, shlex.split("pm-llm run --config my.yaml"))
    (code,) = [text for kind, text in LIFE if kind == "python"]
    lines = [shlex.split(c) for c in commands(LIFE)]
    (added,) = [i for i, line in enumerate(lines) if line[1] == "add" and "--train.learning_rate" in line]
    for line in lines[: added + 1]:
        do(forker, place, line)
    monkeypatch.chdir(place)
    exec(code, {})
    for line in lines[added + 1 :]:
        do(forker, place, line)
    results = json.loads((place / "runs/mine/results.json").read_text())
    assert results["stages"] == ["support", "law", "medical", "billing", "calls", "taxes"]
    (section,) = [yaml.safe_load(text) for kind, text in LIFE if kind == "yaml"]
    used = json.loads((place / "runs/after/state.json").read_text())["config"]["adapter"]
    assert {key: used[key] for key in section["adapter"]} == section["adapter"]


@pytest.mark.slow
def test_commands_and_code(place: Path, forker, monkeypatch) -> None:
    """The first `pm-llm` and what is launched otherwise as typed; later ones in forks, which import nothing anew."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = [shlex.split(c) for c in commands() if not c.startswith("make")]
    assert len(run) >= 7
    for i, command in enumerate(run):
        if i and command[0] == "pm-llm":
            do(forker, place, command)
        else:
            done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for folder in ("mine", "mine-seqlora"):
        assert json.loads((place / f"runs/{folder}/results.json").read_text())["tasks"] == [
            "support",
            "law",
            "medical",
        ]
    without_code = re.sub(r"```python\n.*?```", "", README, flags=re.S)
    listed = set(re.findall(r"^    (\w[\w./-]*?)(?:,| |/ )", without_code, re.M))
    for name in listed:
        assert (place / "runs/mine" / name).exists(), name

    monkeypatch.chdir(place)
    (use,) = [text for kind, text in BLOCKS if kind == "python"]
    names: dict = {}
    exec(use, names)
    assert names["model"].active_adapters == ["default"]
    for command in map(shlex.split, commands(SERVING)):
        do(forker, place, command)


def test_a_run_in_python(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(next(text for kind, text in PYTHON if kind == "python"), names)
    assert names["results"]["stages"] == ["even", "large"]


def test_a_loop_of_ones_own(tmp_path, monkeypatch) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig

    monkeypatch.chdir(tmp_path)
    make_model("llama").save_pretrained("base")
    tokenizer("llama").save_pretrained("base")
    names = {
        "base": "base",
        "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "args": SFTConfig(output_dir="out", max_steps=2, bf16=False, use_cpu=True, report_to="none", max_length=None),
        "first": Dataset.from_list(features("llama")),
        "second": Dataset.from_list([{"prompt": f"is {i} even ?", "completion": " yes"} for i in range(20)]),
        "tokenizer": tokenizer("llama"),
        "get_peft_model": get_peft_model,
        "AutoModelForCausalLM": AutoModelForCausalLM,
    }
    page = (ROOT / "docs/python.md").read_text()
    for imported in re.findall(r"`(from pm_llm[^`]* import [^`]+)`", page):
        exec(imported, names)
    exec([text for kind, text in PYTHON if kind == "python"][1], names)
    assert (tmp_path / "merged/adapter_model.safetensors").is_file()
    assert 0 < names["merger"].report.coefficient <= 1


@pytest.mark.slow
def test_the_tutorial(tmp_path) -> None:
    """The notebook, in a fresh kernel: its tables have the heads that its page shows, and it shows what it is for."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs/tutorial.ipynb", as_version=4)
    shown = [re.findall(r"^\| after .*$", output["text"], re.M) for output in outputs(notebook)]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [re.findall(r"^\| after .*$", output["text"], re.M) for output in outputs(notebook)] == shown
    plain, cured = re.findall(r"average accuracy: ([\d.]+)", outputs(notebook)[0]["text"])
    assert float(cured) > float(plain) + 15


def outputs(notebook) -> list:
    found = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output for output in found if output.get("name") == "stdout" and "| after" in output["text"]]


def test_errors_of_the_troubleshooting_page_are_ours() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    source = " ".join(path.read_text() for path in (ROOT / "pm_llm").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a text over several lines
    for told in re.findall(r"^\*\*(.*?)\*\*", page, re.M):
        for text in re.findall(r"`([^`]+)`", told):
            if text.startswith("ImportError"):
                continue  # Python's own
            parts = [part.strip(" '") for part in re.split(r"\.\.\.|'x'", text) if part.strip(" .'")]
            assert all(part in source for part in parts), (text, parts)


@pytest.mark.slow
def test_commands_of_the_assistant_recipe(tmp_path, forker) -> None:
    """In their order, on a small model with a chat template, a few steps and two skills."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    model = tmp_path / "chat"
    shutil.copytree(ROOT / "pm_llm/embedded/llama", model)
    template = "{% for m in messages %}{{ m.role }} : {{ m.content }}{{ eos_token }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}assistant : {% endif %}")
    text = (ROOT / "recipes/assistant/README.md").read_text()
    lines = [shlex.split(c) for c in commands(re.findall(r"```(\w+)\n(.*?)```", text, re.S))]
    assert [line[1] for line in lines[1:]] == ["run", "report", "gate"]
    made = subprocess.run(
        [sys.executable, *lines[0][1:], "--rows", "40"], cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    keys = f"--model {model} --train.max_steps 3 --general.skills [facts,text] --gate.action warn --dtype float32"
    do(forker, tmp_path, [*lines[1], *shlex.split(keys), "--lora.layers_to_transform", "null"])
    do(forker, tmp_path, lines[2])
    assert forker(*lines[3][1:], cwd=tmp_path).status in (0, 3, 4)
    found = json.loads((tmp_path / "runs/assistant/results.json").read_text())
    assert found["stages"] == ["tickets", "orders", "replies"]
    assert set(found["untrained"]) >= {"general.facts", "general.text", "tickets"}


@pytest.mark.slow
def test_commands_of_the_finance_recipe(tmp_path, forker) -> None:
    """In their order; each run trains a few steps."""
    for name in ("recipes", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = (ROOT / "recipes/finance/README.md").read_text()
    lines = [shlex.split(c) for c in commands(re.findall(r"```(\w+)\n(.*?)```", text, re.S))]
    assert [line[1] for line in lines[1:]] == ["run", "export", "vector", "run", "run"]
    made = subprocess.run(
        [sys.executable, *lines[0][1:], "--rows", "40"], cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    for line in lines[1:]:
        do(forker, tmp_path, [*line, *(["--train.max_steps", "3"] if line[1] == "run" else [])])
    found = json.loads((tmp_path / "runs/finance/transferred/results.json").read_text())
    assert found["scorers"] == ["perplexity", "exact_match"]
    assert found["method"]["merge"]["name"] == "transfer"
