"""Intervals, the page and its figures, and the commands that read predictions."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pm_llm.cli import main
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.intervals import interval, mean_interval, paired_difference, score_lines
from pm_llm.evaluation.matrix import Matrix
from pm_llm.evaluation.predictions import Predictions, read_predictions
from pm_llm.report.card import write_card
from pm_llm.report.changes import wrong_answers
from pm_llm.report.data import difference, open_run
from pm_llm.report.figures import kept
from pm_llm.report.page import write_report
from pm_llm.report.tables import comparison, describe
from pm_llm.run.folder import RunDir
from pm_llm.sequence import ContinualSequence
from pm_llm.system.files import jsonl
from tests.helpers.runs import TASKS, config_for


def predictions(hits: list[bool], task: str = "a") -> Predictions:
    n = len(hits)
    answers = ["x" if hit else "y" for hit in hits]
    return Predictions(task, "exact_match", answers, [["x"] for _ in hits], [None] * n, [f"row {i}" for i in range(n)])


def test_interval_of_a_share_is_the_binomial_one() -> None:
    found = interval(predictions([True] * 30 + [False] * 70), resamples=4000)
    error = 1.96 * 100 * (0.3 * 0.7 / 100) ** 0.5
    assert found.value == pytest.approx(30)
    assert found.low == pytest.approx(30 - error, abs=1)
    assert found.high == pytest.approx(30 + error, abs=1)
    assert interval(predictions([True] * 10)) == interval(predictions([True] * 10))
    assert (interval(predictions([True] * 10)).low, interval(predictions([True] * 10)).high) == (100, 100)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [interval(predictions(list(rng.random(80) < 0.4)), resamples=400) for _ in range(200)]
    assert 0.90 <= np.mean([x.low <= 40 <= x.high for x in found]) <= 0.99


def test_paired_differences_are_narrower_where_rows_agree() -> None:
    hard = [i % 2 == 0 for i in range(100)]
    better = [hit or i % 10 == 1 for i, hit in enumerate(hard)]
    paired = paired_difference([predictions(better)], [predictions(hard)])
    assert paired.value == pytest.approx(10)
    assert paired.low > 0
    apart = interval(predictions(better)).high - interval(predictions(better)).low
    assert paired.high - paired.low < apart / 1.5
    same = paired_difference([predictions(hard)], [predictions(hard)])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(PmLlmError, match="not scored on the same rows"):
        paired_difference([predictions(hard)], [predictions(hard[:-1])])
    # as many rows with the same answers, but others
    for other in (replace(predictions(hard), keys=[f"other {i}" for i in range(100)]), predictions(hard, "b")):
        with pytest.raises(PmLlmError, match="not scored on the same rows"):
            paired_difference([other], [predictions(hard)])
    with pytest.raises(PmLlmError, match="do not say which rows"):
        paired_difference([replace(predictions(hard), keys=())], [predictions(hard)])


def test_mean_of_tasks_counts_each_task_alike() -> None:
    small, large = predictions([True] * 4, "a"), predictions([False] * 400, "b")
    assert mean_interval([small, large]).value == pytest.approx(50)
    assert score_lines([small, large])[-1].startswith("mean\t50.00\t")
    assert score_lines([small, large], tasks=["a"])[-1].startswith("mean\t100.00\t")  # b is a probe


@pytest.fixture(scope="module")
def runs(pico_folders, tmp_path_factory) -> dict[str, Path]:
    """Three finished runs, one of them with everything measured and a coefficient a module."""
    root = tmp_path_factory.mktemp("runs")
    merge = {"name": "optimal", "granularity": "module"}
    common = {"evaluate": "all", "max_test_samples": 6, "max_rank": 5}
    for method, options in (("pm", {"merge": merge}), ("seqlora", {}), ("average", {"evaluate": "diagonal+final"})):
        config = config_for(pico_folders["llama"], root / method, method=method, **{**common, **options})
        ContinualSequence(config).run()
    return {method: root / method for method in ("pm", "seqlora", "average")}


class Page(HTMLParser):
    """Checks that tags are closed in order and gathers what the page asks for and shows."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asked: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attributes) -> None:
        for key, value in attributes:
            if key in ("src", "href", "xlink:href") and not value.startswith(("#", "data:")):
                self.asked.append(value)
            if key == "id":
                self.ids.append(value)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def test_the_page(runs, tmp_path, capsys) -> None:
    paths = [str(runs[name]) for name in ("pm", "seqlora", "average")]
    assert main(["report", *paths, "--out", str(tmp_path / "out"), "--joint", "99"]) == 0
    said = capsys.readouterr().out
    assert "gap closed" in said
    html = (tmp_path / "out/report.html").read_text()
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.asked == []  # self-contained
    assert "url(http" not in html
    assert len(page.ids) == len(set(page.ids))  # one picture's clip path must not be another's
    assert html.count("<svg") == len(list((tmp_path / "out/figures").glob("*.svg")))
    for word in ("Methods", "Accuracy over the sequence", "Merge coefficients", "Curvature", "Truncation error"):
        assert word in page.text
    assert page.text.index("What was kept, what was lost") < page.text.index("Methods")  # that first
    for word in (
        "Accuracy matrix",
        "Training loss",
        "Coefficients of the modules",
        "Time and memory",
        "(untrained)",
        "pm_llm 0",
    ):
        assert word in page.text
    names = {p.name for p in (tmp_path / "out/figures").iterdir()}
    assert {"accuracy.png", "accuracy.svg", "matrix-1.png", "matrix-3.svg", "modules-1.png", "costs-2.svg"} <= names
    results = json.loads((runs["pm"] / "results.json").read_text())
    assert f"{results['average_accuracy']:.1f} (" in page.text
    assert set(results["seconds"][0]) == {"prepare", "train", "fisher", "merge", "evaluate"}
    assert all(x > 10**7 for x in results["peak_memory_bytes"])
    assert results["untrained"].keys() == set(TASKS)


def test_wrong_answers_are_shown_with_their_prompts(runs) -> None:
    run = open_run(runs["seqlora"])
    rows = wrong_answers(run)
    assert rows
    for place, prompt, said, right in rows:
        name, _, number = place.partition(", ")
        (line,) = [one for one in run.predictions[len(TASKS) - 1][name].lines() if one["row"] == int(number)]
        assert (line["prompt"], line["prediction"], line["references"][0]) == (prompt, said, right)
        assert said != right


def test_what_was_kept_is_drawn_for_tasks_that_were_scored_again(runs) -> None:
    run = open_run(runs["seqlora"])
    (axes,) = kept([run]).axes
    rings, dots = (list(line.get_xdata()) for line in axes.lines)
    last = len(run.matrix.stages) - 1
    assert rings == [run.matrix.get(i, j) for j, i in run.matrix.learned(last).items()]
    assert dots == [run.matrix.get(last, j) for j in run.matrix.learned(last)]


def test_intervals_and_differences_of_runs(runs) -> None:
    pm, seqlora, average = (open_run(runs[name]) for name in ("pm", "seqlora", "average"))
    for at, found in pm.intervals.items():
        assert found.low <= found.value <= found.high
        assert found.value == pytest.approx(pm.matrix.get(*at))
    assert sorted(pm.averages) == [0, 1, 2]
    assert sorted(average.averages) == [0, 2]  # after the second task the first was not scored
    assert difference(pm, seqlora).value == pytest.approx(
        pm.results.numbers["average_accuracy"] - seqlora.results.numbers["average_accuracy"]
    )


def test_a_run_with_a_missing_or_altered_prediction(runs, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["pm"], run, symlinks=True)
    file = run / "stages/03-question/predictions/03-question.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    assert main(["report", str(run)]) == 2
    assert re.search(r"03-question\.jsonl has \d+ bytes instead of", capsys.readouterr().err)
    assert main(["score", str(file)]) == 2
    assert "1 of 6 predictions of task 'question' are missing (row 5)" in capsys.readouterr().err
    altered = [
        json.dumps({**json.loads(line), "prediction": json.loads(line)["references"][0]}) + "\n" for line in lines
    ]
    file.write_text("".join(altered))
    assert main(["report", str(run)]) == 2
    assert "03-question.jsonl has " in capsys.readouterr().err
    RunDir(run).record([file])  # as if it had been written so
    assert main(["report", str(run)]) == 2
    assert re.search(r"predictions after stage 3 give 100\.000 on '\w+'", capsys.readouterr().err)


def test_scores_again_without_the_model(runs, capsys) -> None:
    results = json.loads((runs["pm"] / "results.json").read_text())
    assert main(["score", str(runs["pm"])]) == 0
    lines = {line.split("\t")[0]: line.split("\t")[1] for line in capsys.readouterr().out.strip().splitlines()}
    for j, name in enumerate(TASKS):
        assert float(lines[name]) == pytest.approx(results["matrix"][-1][j], abs=0.01)
    file = runs["pm"] / "stages/01-sentiment/predictions/01-sentiment.jsonl"
    assert main(["score", str(file), "--scorer", "token_f1"]) == 0
    assert "sentiment\t" in capsys.readouterr().out
    assert main(["score", str(file), "--scorer", "tokenf1"]) == 2
    assert "Did you mean 'token_f1'" in capsys.readouterr().err
    assert main(["score", str(runs["pm"] / "config.yaml")]) == 2
    assert main(["score", str(file), "--scorer", "perplexity"]) == 2


def test_characters_that_end_lines_elsewhere_survive(tmp_path) -> None:
    said = "a\u2028b\x85c\u2029d\re"
    found = Predictions("a", "exact_match", [said], [[said]], [said], ["k"])
    (tmp_path / "p.jsonl").write_bytes(jsonl(found.lines()))
    (again,) = read_predictions(tmp_path / "p.jsonl").values()
    assert (list(again.predictions), again.references, again.sources) == ([said], [[said]], [said])


def line(**changes) -> dict:
    return {"task": "a", "scorer": "exact_match", "row": 0, "of": 1, "prediction": "x", "references": ["x"], **changes}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "it holds none"),
        ([line(references=[])], "no list of references"),
        ([line(references=[1])], "these predictions are something else"),
        ([line(scorer=5)], "unknown scorer '5'"),
        ([line(scorer="perplexity")], "these predictions are something else"),
        ([line(), line(row=1)], "do not belong to one evaluation"),
        ([line(of=2), line(row=1, of=2, scorer="bleu")], "do not belong to one evaluation"),
        ([{"task": "a"}], "'row' is missing"),
        ([[1]], "cannot be read as predictions"),
    ],
)
def test_predictions_that_cannot_be(lines, said: str, tmp_path, capsys) -> None:
    (tmp_path / "p.jsonl").write_bytes(jsonl(lines))
    assert main(["score", str(tmp_path / "p.jsonl")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["state.json", "results.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 100_000])
def test_folders_that_are_no_whole_run(name: str, text: str, runs, tmp_path, capsys) -> None:
    shutil.copytree(runs["pm"], tmp_path / "run", symlinks=True)
    (tmp_path / "run" / name).write_text(text)
    assert main(["report", str(tmp_path / "run")]) == 2
    assert name in capsys.readouterr().err


def test_gap_closed_of_several_runs(runs) -> None:
    pm, seqlora = (RunDir.open(runs[name]).results() for name in ("pm", "seqlora"))
    final = seqlora.numbers["average_accuracy"]
    other = replace(seqlora, numbers={"average_accuracy": final + 10})
    header, rows = comparison([pm, seqlora, other], joint=90.0)
    base = final + 5  # the mean of the two seeds
    assert rows[0][header.index("gap closed")] == f"{(pm.numbers['average_accuracy'] - base) / (90 - base):.2f}"
    assert "gap closed" not in comparison([pm, seqlora], joint=final)[0]
    assert "gap closed" not in comparison([pm], joint=90.0)[0]


def test_a_page_does_not_go_into_another_runs_folder(runs, tmp_path, capsys) -> None:
    for name in ("pm", "seqlora"):
        shutil.copytree(runs[name], tmp_path / name, symlinks=True)
    assert main(["report", str(tmp_path / "pm"), "--out", str(tmp_path / "seqlora")]) == 2
    assert "seqlora is the folder of a run" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "pm"), "--out", str(tmp_path / "pm")]) == 0  # as without --out
    for name in ("pm", "seqlora"):
        assert RunDir.open(tmp_path / name).damaged() == {}


def test_a_gap_that_cannot_be_had_is_told(runs, tmp_path, capsys) -> None:
    for words, said in (
        (["pm", "average"], "a run of seqlora"),
        (["pm"], "a run of seqlora"),
        (["pm", "seqlora"], None),
    ):
        assert main(["report", *(str(runs[w]) for w in words), "--joint", "99", "--out", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        assert ("no gap closed" in out) == (said is not None)
        assert said is None or said in out


@pytest.mark.parametrize(
    "change",
    [
        {"stages": ["topic"]},
        {"test_rows": [3, 4, 4]},
        {"evaluation": {"mode": "labels"}},
        {"evaluation": {"split": "validation"}},
        {"model": "another"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_scored_otherwise_is_not_compared(change: dict, runs) -> None:
    pm, seqlora = (open_run(runs[name]) for name in ("pm", "seqlora"))
    key, value = next(iter(change.items()))
    if hasattr(seqlora.results, key):
        other = replace(seqlora.results, **{key: value})
    else:
        config = seqlora.results.config
        value = {**config[key], **value} if isinstance(value, dict) else value
        other = replace(seqlora.results, config={**config, key: value})
    header, rows = comparison([pm.results, seqlora.results, other], joint=90.0)
    base = seqlora.results.numbers["average_accuracy"]
    gap = f"{(pm.results.numbers['average_accuracy'] - base) / (90 - base):.2f}"
    assert [row[header.index("gap closed")] for row in rows] == [gap, "0.00", "-"]  # 90 is of the first's kind
    joint = replace(other, numbers={"average_accuracy": 90.0}, config={**other.config, "method": "joint"})
    header, rows = comparison([pm.results, seqlora.results, other, joint], joint=90.0)
    assert [row[header.index("gap closed")] for row in rows] == [gap, "0.00", "0.00", "1.00"]
    assert "gap closed" not in comparison([pm.results, other], joint=90.0)[0]
    if "mode" in change.get("evaluation", {}):  # of another split the rows are others
        assert difference(pm, seqlora) is not None
        assert difference(pm, replace(seqlora, results=other)) is None


def test_how_a_run_was_scored_is_said_wherever_its_numbers_are(runs, tmp_path) -> None:
    run = open_run(runs["pm"])
    evaluation = {**run.results.config["evaluation"], "mode": "labels", "split": "validation"}
    config = {**run.results.config, "evaluation": evaluation}
    results = replace(run.results, config=config, lower_is_better=True)
    card = write_card(results, "user/name", "gpt2", 4, None, tmp_path / "README.md")
    page = write_report([replace(run, results=results)], tmp_path).read_text()
    for said in (card, page, describe(results)):
        assert "answers chosen among the labels" in said
        assert "lower is better" in said
        assert "validation rows" in said
    assert "test rows" not in card.lower()
    name = "exact_match after the last task (validation rows; answers chosen among the labels; lower is better)"
    assert name in re.sub(r"\s+", " ", card)
    plain = write_card(run.results, "user/name", "gpt2", 4, None, tmp_path / "README.md")
    assert "Test rows per task" in plain
    assert "exact_match after the last task (" not in plain


def test_evaluate_keeps_its_predictions(runs, pico_folders, tmp_path, capsys) -> None:
    arguments = ["evaluate", "--model", pico_folders["llama"], "--benchmark", "embedded", "--order", "topic"]
    arguments += ["--max_test_samples", "6", "--max_length", "96", "--adapter", str(runs["pm"] / "adapter")]
    assert main([*arguments, "--predictions", str(tmp_path / "no/p.jsonl")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main([*arguments, "--predictions", str(tmp_path)]) == 2
    assert main([*arguments, "--predictions", str(tmp_path / "p.jsonl")]) == 0
    (found,) = read_predictions(tmp_path / "p.jsonl").values()
    last = read_predictions(runs["pm"] / "stages/03-question/predictions/02-topic.jsonl")["topic"]
    assert found.predictions == last.predictions


def test_check_tells_what_a_run_would_train_on(pico_folders, tmp_path, capsys) -> None:
    rows = [
        {"prompt": f"is {i} even ?" + " long" * (i % 7) * 10, "completion": "yes" if i % 4 else "no"}
        for i in range(40)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    arguments = ["tasks", "check", *files, "--model", pico_folders["llama"], "--max_length", "40"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "sequence: a, b" in said
    assert "train: 36 rows" in said
    assert re.search(r"'yes' 7\d%, 'no' 2\d%", said)
    assert re.search(r"prompt tokens min \d+ 50% \d+ 90% \d+ 99% \d+ max \d+, answer tokens", said)
    cut = float(re.search(r"([\d.]+)% of prompts are shortened to 37 tokens", said)[1])
    assert 50 < cut < 95
    assert said.count("example ") == 6
    assert "[[ yes</s>]]" in said
    shared = re.findall(r"(\w+/\w+) and (\w+/\w+): (\d+)", said)
    assert sum(int(n) for a, b, n in shared if a[0] != b[0]) == 10
    assert main(["tasks", "check", "--benchmark", "embedded", "--order", "topic", "--model", "embedded:t5"]) == 0
    assert "topic: scorer exact_match, 4 labels" in capsys.readouterr().out
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}\n')
    assert main(arguments) == 2
    assert f"{tmp_path / 'b.jsonl'}:1: " in capsys.readouterr().err


def test_a_model_for_each_task_is_judged_task_by_task(tmp_path, capsys) -> None:
    """Its last adapter on all tasks says nothing of it; seqlora with another merge is no baseline."""
    common = {"evaluate": "seen", "order": ["topic", "sentiment"], "train.max_steps": 10, "max_test_samples": 8}
    words = {"per_task": {}, "seqlora": {}, "other": {"method": "seqlora", "merge": "average"}}
    words["others"] = {"method": "per_task", "start": "continue", "merge": "average"}  # a sequence like any other
    for name, options in words.items():
        keys = {"method": name, **common, **options}
        ContinualSequence(config_for("embedded:llama", tmp_path / name, **keys)).run()
    runs = {name: open_run(tmp_path / name) for name in words}
    results = {name: run.results for name, run in runs.items()}
    own = results["per_task"]
    diagonal, final = [row[i] for i, row in enumerate(own.matrix)], own.numbers["average_accuracy"]
    assert own.matrix[-1][:-1] != diagonal[:-1]  # the last one knows less of the others
    assert final == pytest.approx(sum(diagonal) / len(diagonal))
    assert "backward_transfer" not in own.numbers
    assert mean_interval(runs["per_task"].final).value == pytest.approx(final)
    assert runs["per_task"].averages[len(diagonal) - 1].value == pytest.approx(final)
    assert "average accuracy, each task by its own adapter: " in describe(own)
    header, rows = comparison(list(results.values()), joint=90.0)
    low = results["seqlora"].numbers["average_accuracy"]
    gaps = [f"{(one.numbers['average_accuracy'] - low) / (90 - low):.2f}" for one in results.values()]
    assert [row[header.index("gap closed")] for row in rows] == gaps
    assert [row[header.index("backward transfer")] == "-" for row in rows] == [True, False, False, False]
    assert write_report(list(runs.values()), tmp_path / "report")
    capsys.readouterr()
    assert main(["score", str(tmp_path / "per_task")]) == 0
    assert "mean" not in capsys.readouterr().out  # of the last adapter on all tasks


def test_a_task_that_recurs_is_known_by_its_last_stage() -> None:
    matrix = Matrix.from_rows(["a", "b"], [[25, None], [0, 50], [75, 0], [0, 100]], ["a", "b", "a", "b"])
    assert matrix.with_task_known() == {"average_accuracy": 87.5, "plasticity": 62.5}


def test_a_model_for_each_task_that_was_not_scored_as_such(pico_folders, tmp_path) -> None:
    config = config_for(pico_folders["llama"], tmp_path / "run", method="per_task", evaluate="final")
    assert "average_accuracy" not in ContinualSequence(config).run()
    with pytest.raises(PmLlmError, match="not scored after their own stages"):
        open_run(tmp_path / "run").final  # noqa: B018
    assert main(["report", str(tmp_path / "run")]) == 0
