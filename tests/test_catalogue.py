"""The table of methods, and the page on how to add one, hold."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

from pm_llm.cli import main
from pm_llm.commands.methods import choices, table
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.methods import REGISTRIES, Choice
from pm_llm.presets import PRESETS, TESTED
from tests.conftest import ROOT, pm_llm


def test_the_page_of_methods_is_what_the_command_prints(capsys) -> None:
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == f"{table()}\n{choices()}".strip()
    page = (ROOT / "docs/methods.md").read_text()
    assert printed.strip() in page, "write the output of `pm-llm methods` into docs/methods.md again"


def test_every_preset_goes_together_and_is_run() -> None:
    for name in PRESETS:
        load_config(None, {"method": name}).check()
        assert PRESETS[name].source
        assert {"LLaMA", "T5"} <= {kind for kind, presets in TESTED.items() if name in presets}
    assert all(set(presets) <= set(PRESETS) for presets in TESTED.values())


def test_every_choice_has_a_source_and_is_where_the_registry_says() -> None:
    for kind, registry in REGISTRIES.items():
        for name, place in registry.items():
            module, _, attribute = place.partition(":")
            found = getattr(importlib.import_module(module), attribute)
            assert found.__doc__, (kind, name)
            assert (sys.modules[module].__doc__ or "").partition(":")[2].strip(), (kind, name)


def test_the_worked_example_runs(tmp_path, pico_folders, monkeypatch) -> None:
    """The package of docs/extend.md, as it stands there: installed, listed, trained with; and its own test."""
    page = (ROOT / "docs/extend.md").read_text()
    file, preset, test = re.findall(r"```python\n(.*?)```", page, re.S)
    package, installed = tmp_path / "my_methods", tmp_path / "installed"
    (package / "my_methods").mkdir(parents=True)
    (package / "pyproject.toml").write_text(re.search(r"```toml\n(.*?)```", page, re.S)[1])
    for text in (file, preset):
        (package / re.match(r"# (\S+)\n", text)[1]).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(installed), str(package)], check=True, capture_output=True)
    monkeypatch.setenv("PYTHONPATH", str(installed))
    said = pm_llm("methods")
    assert "| `median` | fresh | none | median | the median of the task vectors |" in said.stdout, said.stderr
    run = ["run", "--model", pico_folders["llama"], "--method", "median", "--output_dir", tmp_path / "run"]
    keys = ["--benchmark", "embedded", "--order", "sentiment,topic", "--train.max_steps", "2"]
    keys += ["--max_test_samples", "2", "--max_length", "96", "--merge", "{name: median, scale: 0.5}"]
    ended = pm_llm(*run, *keys)
    assert ended.returncode == 0, ended.stderr
    script = f"{test}\ntest_median_of_three_is_the_middle_one()\n"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    monkeypatch.delenv("PYTHONPATH")
    assert main(["score", str(tmp_path / "run")]) == 0  # of what was said, whatever the method
    with pytest.raises(ValueError, match="unknown merge"):
        Choice.parse("median", "merge")


def test_the_page_names_the_hooks_there_are() -> None:
    from pm_llm.constraints.base import Constraint

    page = (ROOT / "docs/extend.md").read_text()
    block = page[page.index("| when | hooks |") : page.index("What a step does")]
    named = set(re.findall(r"`(\w+)`", block))
    hooks = {name for name, value in vars(Constraint).items() if callable(value) and not name.startswith("_")}
    assert named == hooks - {"fills", "load_memory", "prepare"}


def test_a_package_that_cannot_be_imported_is_told(monkeypatch, capsys) -> None:
    monkeypatch.setitem(REGISTRIES["merge"], "broken", "no_such_package:Broken")
    monkeypatch.setitem(REGISTRIES["merge"], "lacking", "pm_llm.errors:Lacking")
    for name in ("broken", "lacking"):
        with pytest.raises(PmLlmError, match=f"merge {name!r} cannot be loaded"):
            Choice(name).build("merge")
    assert main(["methods"]) == 0
    assert "- `broken`: cannot be loaded" in capsys.readouterr().out
