"""Every benchmark in its upstream layout: prompts, and from start to finish on a pico model, also on real rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError
from pm_llm.sequence import ContinualSequence
from pm_llm.tasks.benchmarks.standard_cl import CATEGORY
from pm_llm.tasks.benchmarks.superni import TASKS as SUPERNI
from pm_llm.tasks.benchmarks.trace import SCORER
from pm_llm.tasks.loading import BENCHMARKS, load_benchmark, load_tasks
from tests.conftest import SHARED
from tests.helpers.runs import config_for

REAL = {"standard_cl": "olora_subset", "long_sequence": "olora_subset", "superni": "superni", "trace": "trace_500"}


def dump(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders in the upstream layouts, with made-up rows."""
    root = tmp_path_factory.mktemp("benchmarks")
    for name, category in CATEGORY.items():
        place = root / "olora" / "CL_Benchmark" / category / name
        dump(place / "labels.json", ["Good", "Bad"])
        for split, n in (("train", 6), ("dev", 2), ("test", 3)):
            dump(place / f"{split}.json", [{"sentence": f"s {i}", "label": ["Good", "Bad"][i % 2]} for i in range(n)])
    for name in SUPERNI:
        for split, n in (("train", 6), ("dev", 2), ("test", 3)):
            plain = name.startswith(("task363", "task1687", "task875"))
            rows = [
                {"id": f"{split}{i}", "input": f"i {i}", "output": "POS" if plain else ["a b", "c"]} for i in range(n)
            ]
            dump(root / "superni" / "SuperNI" / name / f"{split}.json", {"Definition": ["Do it."], "Instances": rows})
    for name in SCORER:
        for split, n in (("train", 6), ("eval", 2), ("test", 3)):
            dump(root / "trace" / name / f"{split}.json", [{"prompt": f"p {i}", "answer": "A"} for i in range(n)])
    return {"standard_cl": root / "olora", "long_sequence": root / "olora", "superni": root / "superni"} | {
        "trace": root / "trace"
    }


def test_orders_are_those_of_the_shared_file() -> None:
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared is not here")
    upstream = json.loads((SHARED / "data/orders.json").read_text())
    assert upstream["superni_sapt"] == load_benchmark("superni").ORDERS
    assert upstream["long_sequence"] == load_benchmark("long_sequence").ORDERS
    trace = load_benchmark("trace").ORDERS
    assert trace["default"] == upstream["trace"]["default"]
    assert trace["alternate"] == upstream["trace"]["alternate_in_scripts"]
    standard = load_benchmark("standard_cl").ORDERS
    assert {name: standard[name] for name in upstream["standard_cl"]} == upstream["standard_cl"]


def test_superni_prompt_and_answers(folders) -> None:
    config = RunConfig(benchmark="superni", order=[SUPERNI[0], SUPERNI[3]], data_dir=str(folders["superni"]))
    quoref, sst2 = load_tasks(config)
    row = quoref.train[1]
    assert row.prompt == "Definition: Do it.\n\nNow complete the following example -\nInput: i 1\nOutput: "
    assert (row.completion, row.references, row.id) == ("a b", ["a b", "c"], "train1")
    assert row.place.endswith("train.json:14 (row 2)")
    assert (sst2.train[0].references, sst2.scorer) == (["POS"], "rougeL")
    assert [len(x) for x in (sst2.train, sst2.validation, sst2.test)] == [6, 2, 3]


def test_trace_scorers_and_source(folders) -> None:
    tasks = {task.name: task for task in load_tasks(RunConfig(benchmark="trace", data_dir=str(folders["trace"])))}
    assert {name: task.scorer for name, task in tasks.items()} == SCORER
    assert tasks["20Minuten"].test[0].source == "p 0"
    assert tasks["FOMC"].labels == ("A", "B", "C")


@pytest.mark.parametrize("benchmark", [name for name in BENCHMARKS if name != "embedded"])
def test_from_start_to_finish(benchmark: str, folders, pico_folders, tmp_path) -> None:
    config = config_for(
        pico_folders["llama" if benchmark != "superni" else "t5"],
        tmp_path / "run",
        benchmark=benchmark,
        order=None,
        data_dir=str(folders[benchmark]),
        max_new_tokens=4,
        **{"train.max_steps": 1, "fisher.samples": 2, "lora.r": 2, "max_length": 128},
    )
    results = ContinualSequence(config).run()
    names = next(iter(load_benchmark(benchmark).ORDERS.values()))
    assert results["tasks"] == names
    assert [sum(x is not None for x in row) for row in results["matrix"]] == list(range(1, len(names) + 1))
    assert 0 <= results["average_accuracy"] <= 100


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "order", "rows"),
    [
        ("standard_cl", "order1", {}),
        ("long_sequence", "order4", {}),
        ("long_sequence", "order5", {}),
        ("long_sequence", "order6", {}),
        # six training rows of task511 have an empty answer
        ("superni", "order1", {"bad_rows": "drop"}),
        ("superni", "order2", {"bad_rows": "drop"}),
        # MeetingBank has no train.json there
        ("trace", ",".join(name for name in SCORER if name != "MeetingBank"), {}),
    ],
)
def test_from_start_to_finish_on_real_rows(benchmark: str, order: str, rows, pico_folders, tmp_path) -> None:
    config = config_for(
        pico_folders["llama"],
        tmp_path / "run",
        benchmark=benchmark,
        order=order,
        data_dir=str(SHARED / "data" / REAL[benchmark]),
        evaluate="diagonal+final",
        max_new_tokens=8,
        max_train_samples=8,
        **{
            "train.max_steps": 1,
            "fisher.samples": 2,
            "lora.r": 2,
            "max_length": 1024 if benchmark == "superni" else 384,
        },
        **rows,
    )
    results = ContinualSequence(config).run()
    assert len(results["stages"]) == {"standard_cl": 4, "trace": 7}.get(benchmark, 15)
    last = results["matrix"][-1]
    assert all(x is not None for x in last)
    assert {"average_accuracy", "backward_transfer", "plasticity"} <= results.keys()
    assert "forgetting" not in results  # it was not measured


@pytest.mark.shared
def test_what_is_wrong_with_the_real_rows_is_told(tmp_path) -> None:
    with pytest.raises(PmLlmError) as error:
        load_tasks(RunConfig(benchmark="superni", data_dir=str(SHARED / "data/superni")))
    lines = str(error.value).splitlines()
    assert lines[0].startswith("6 things are wrong")
    assert all("task511" in line and "answer (completion or label) is empty" in line for line in lines[1:])
    with pytest.raises(PmLlmError, match=r"MeetingBank/train.json: is missing"):
        load_tasks(RunConfig(benchmark="trace", data_dir=str(SHARED / "data/trace_500")))


def test_superni_from_nowhere() -> None:
    with pytest.raises(PmLlmError, match="--data-dir"):
        load_tasks(RunConfig(benchmark="superni"))
    with pytest.raises(PmLlmError, match=r"task 'C-STANCE'.*From the Hub come FOMC, ScienceQA"):
        load_tasks(RunConfig(benchmark="trace"))
