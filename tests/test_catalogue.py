"""The table of methods, and the page on how to add one, hold."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

from pm_llm import ContinualSequence, methods
from pm_llm.cli import main
from pm_llm.commands.methods import choices, table
from pm_llm.config import load_config
from pm_llm.methods import REGISTRIES, Choice
from pm_llm.presets import PRESETS, TESTED
from tests.conftest import ROOT, small_tasks
from tests.test_presets import KEYS


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


def test_the_worked_example_runs(tmp_path, monkeypatch, pico_folders) -> None:
    """File, line and test of docs/extend.md, as they stand there, and a run with it."""
    file, line, test = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extend.md").read_text(), re.S)
    path = re.match(r"# (\S+)\n", file)[1]
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text(file)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_pm_llm.py").write_text(f"{line}\nimport sys, pm_llm.cli\nsys.exit(pm_llm.cli.main())\n")
    said = subprocess.run([sys.executable, "my_pm_llm.py", "methods"], cwd=tmp_path, capture_output=True, text=True)
    assert "| `median` | fresh | none | median | the median of the task vectors |" in said.stdout, said.stderr
    try:
        exec(line, {})
        names: dict = {}
        exec(test, names)
        names["test_median_of_three_is_the_middle_one"]()
        assert load_config(None, {"method": "median", "merge": {"name": "median", "scale": 0.5}}).check()
        keys = {**KEYS, "model": pico_folders["llama"], "method": "median", "output_dir": str(tmp_path / "run")}
        assert ContinualSequence(load_config(None, keys), small_tasks("sentiment", "topic", train=8, test=2)).run()
    finally:
        methods.MERGES.pop("median", None)
        PRESETS.pop("median", None)
    assert main(["score", str(tmp_path / "run")]) == 0  # of what was said, whatever the method
    with pytest.raises(ValueError, match="unknown merge"):
        Choice.parse("median", "merge")


def test_the_page_names_the_hooks_there_are() -> None:
    from pm_llm.constraints.base import Constraint

    page = (ROOT / "docs/extend.md").read_text()
    block = page[page.index("| when | hooks |") : page.index("What a step does")]
    named = set(re.findall(r"`(\w+)`", block))
    hooks = {name for name, value in vars(Constraint).items() if callable(value) and not name.startswith("_")}
    assert named == hooks - {"fills", "load_memory", "load_state", "prepare"}
