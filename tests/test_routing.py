"""Routing among task adapters, as an alternative to merging."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pm_llm import ContinualSequence
from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import lora_layers
from pm_llm.algebra.lowrank import LowRank
from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.answering import evaluate_adapter
from pm_llm.evaluation.routing import arrow, route
from tests.conftest import FAMILIES, ROOT, make_model, make_peft


def rows(path: Path, words: str, count: int = 16) -> str:
    """A task whose prompts have words of their own."""
    names = words.split()
    found = [
        {"prompt": " ".join(names[(i + k) % len(names)] for k in range(6)), "completion": names[i % 2]}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, found)) + "\n")
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_prompt_is_answered_by_the_adapter_it_was_sent_to(family: str, tmp_path, capsys, monkeypatch) -> None:
    tasks = [
        rows(tmp_path / "colour.jsonl", "red green blue yellow"),
        rows(tmp_path / "number.jsonl", "one two six ten"),
    ]
    keys = {"model": f"embedded:{family}", "tasks": [{"data": t, "test_size": 0.5} for t in tasks]}
    keys |= {"method": "per_task", "max_length": 96, "train.max_steps": 8, "train.learning_rate": 1e-2}
    keys |= {"evaluate": "final", "output_dir": str(tmp_path / "run")}
    config = load_config(None, keys)
    ContinualSequence(config).run()
    found = route(str(tmp_path / "run"))
    assert sum(found.right) / 2 > 0.7
    folders = sorted((tmp_path / "run/stages").glob("*/task_adapter"))
    alone = [evaluate_adapter(str(folder), config) for folder in folders]
    for task, (said, sent) in enumerate(zip(found.predictions, found.sent, strict=True)):
        assert said.keys == alone[0][task].keys
        assert list(said.predictions) == [alone[place][task].predictions[i] for i, place in enumerate(sent)]
        assert found.right[task] == sum(place == task for place in sent) / len(sent)
    assert found.kept_bytes > sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    capsys.readouterr()
    assert main(["route", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "routed right" in out
    assert "kept: " in out

    mixed = route(str(tmp_path / "run"), "arrow")
    assert [said.keys for said in mixed.predictions] == [said.keys for said in found.predictions]
    assert (mixed.right, mixed.kept_bytes < found.kept_bytes) == ([], True)
    assert main(["route", str(tmp_path / "run"), "--router", "arrow"]) == 0
    assert "routed right" not in capsys.readouterr().out
    assert main(["route", str(tmp_path / "run"), "--router", "best"]) == 2
    assert "nearest or arrow" in capsys.readouterr().err

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    out = tmp_path / "routing.json"
    monkeypatch.setattr(sys, "argv", ["routing", str(tmp_path / "run"), "--out", str(out)])
    runpy.run_path(str(ROOT / "benchmarks/routing.py"), run_name="__main__")
    for row, routed in zip(json.loads(out.read_text()), (found, mixed), strict=True):
        average = sum(one.score() for one in routed.predictions) / 2
        assert row["final average"].startswith(f"{average:.1f} (")
        assert row["sent right"] == (f"{50 * sum(routed.right):.1f} %" if routed.right else "-")


@pytest.mark.parametrize(("family", "where"), [("llama", {"layers_to_transform": [1]}), ("t5", {})])
def test_arrow_mixes_by_the_leading_directions(family: str, where: dict, tmp_path) -> None:
    """A module's output by the formula, also with adapters of one layer only, which PEFT's function cannot take."""
    folders = [tmp_path / str(i) for i in range(4)]
    for seed, folder in enumerate(folders):
        adapter = Adapter.from_model(make_peft(family, **where), "default")
        torch.manual_seed(seed)
        drawn = {name: LowRank(torch.randn_like(x.B), torch.randn_like(x.A)) for name, x in adapter.factors.items()}
        for update in drawn.values():
            update.A[0] *= 10  # PEFT finds the leading direction in 15 steps, if it leads by much
        adapter.replace_factors(drawn).save(folder)
    base = make_model(family)
    model = arrow(SimpleNamespace(model=base), folders)
    layers = lora_layers(model)
    assert all(".1." in name for name in layers) == bool(where)
    layer = next(iter(layers.values()))
    x = torch.randn(1, 5, layer.in_features)
    updates = [layer.get_delta_weight(f"task_{i}").detach() for i in range(4)]
    leading = torch.stack([torch.linalg.svd(w)[2][0] for w in updates])
    sizes = (x @ leading.T).abs()
    weights = sizes.masked_fill(sizes == sizes.amin(-1, keepdim=True), float("-inf")).softmax(-1)  # of the best three
    expected = layer.base_layer(x) + sum(weights[..., i : i + 1] * (x @ w.T) for i, w in enumerate(updates))
    torch.testing.assert_close(layer(x), expected, atol=1e-3, rtol=1e-3)
    assert layer.lora_arrow["arrow_router"].task_adapter_names == [f"task_{i}" for i in range(4)]


def test_arrow_refuses_ranks_that_differ(tmp_path) -> None:
    for i, rank in enumerate((2, 4)):
        Adapter.from_model(make_peft("llama", r=rank), "default").save(tmp_path / str(i))
    with pytest.raises(PmLlmError, match=r"one rank, these have \[2, 4\]"):
        arrow(SimpleNamespace(model=make_model("llama")), [tmp_path / "0", tmp_path / "1"])


def test_adapters_that_build_on_each_other_are_refused(tmp_path, capsys, pico_folders) -> None:
    keys = {"model": pico_folders["llama"], "benchmark": "embedded", "order": "sentiment,topic", "method": "inclora"}
    keys |= {"max_train_samples": 8, "max_test_samples": 2, "max_length": 96, "train.max_steps": 1}
    ContinualSequence(load_config(None, {**keys, "evaluate": "final", "output_dir": str(tmp_path / "run")})).run()
    assert main(["route", str(tmp_path / "run")]) == 2
    assert "build on each other" in capsys.readouterr().err
