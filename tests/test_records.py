"""Records of runs: tables and figures that are made of them, also those in the docs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from statistics import fmean

import numpy as np
import pytest

from pm_llm.presets import PRESETS
from tests.conftest import ROOT


def test_a_table_of_records(monkeypatch, tmp_path) -> None:
    """Rows weigh the same in every run, seeds are drawn too, what cannot be compared is refused, pages are renewed."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import records

    def one(name: str, seed: int, right: list[int], key: str = "k") -> dict:
        rows = {"t": {"scorer": "exact_match", "key": f"{key}{seed}", "numbers": [[float(x)] for x in right]}}
        more = {"order": "t", "backward_transfer": -1.0, "plasticity": 50.0, "coefficients": [1.0]}
        more |= {"config": {"method": name}, "task_id": False, "seconds": [{"train": 60.0}], "state_bytes": 2**20}
        return {"name": name, "seed": seed, "rows": rows, **more}

    right, wrong = [1] * 30 + [0] * 10, [1] * 10 + [0] * 30
    scale = records.averages([one("seqlora", 0, right)])["seqlora"][0, 0] / 0.75
    runs = [one("seqlora", 0, wrong), one("joint", 0, [1] * 40), one("pm", 0, right), one("same", 0, right)]
    found = records.averages(runs)
    assert (found["pm"] == found["same"]).all()
    assert found["pm"][0] == pytest.approx([0.75 * scale])
    assert "67 %" in next(line for line in records.table(runs).splitlines() if line.startswith("| pm "))
    _, low, high = records.interval(found["pm"])
    assert 0.2 * scale < high - low < 0.32 * scale  # 1.96 * 2 * sqrt(.75 * .25 / 40) = .268
    alone = {key: value for key, value in one("pm", 0, right).items() if key != "backward_transfer"}  # of one task
    assert "| - | 50.0 | 1.00 |" in records.table([alone])
    scored_last = {key: value for key, value in alone.items() if key != "plasticity"}
    for some in ([scored_last], [one("pm", 0, right), {**scored_last, "order": "u"}]):
        assert "| - | - | 1.00 |" in records.table(some)
    assert "| - | - | - |" in records.table([one("joint", 0, right)])
    seeds = records.averages([one("pm", 0, right), one("pm", 1, wrong), one("pm", 2, right)])["pm"]
    mean, half = 1.75 / 3, 4.303 * np.std([0.75, 0.25, 0.75], ddof=1) / 3**0.5
    assert records.interval(seeds / scale) == pytest.approx((mean, mean - half, mean + half))
    many = np.arange(12.0)[None]
    assert records.interval(many)[1] < 5.5 - 2.201 * many.std(ddof=1) / 12**0.5  # t of 11 degrees of freedom
    agreeing = records.averages([one("pm", seed, right) for seed in range(3)])["pm"]
    _, low, high = records.interval(agreeing)  # Student's t alone would say that they are known exactly
    assert 0.12 * scale < high - low < 0.19 * scale  # .268 / 3 ** .5 = .155
    with pytest.raises(ValueError, match="two records"):
        records.averages([one("pm", 0, right), one("pm", 0, wrong)])
    with pytest.raises(ValueError, match="other rows"):
        records.averages([one("pm", 0, right), one("seqlora", 0, right, key="other")])
    with pytest.raises(ValueError, match="was not run"):
        records.averages([one("pm", 0, right), one("pm", 1, right), one("seqlora", 0, right)])
    records.write(tmp_path / "found.jsonl", runs)
    records.add(tmp_path / "found.jsonl", runs[-1])
    assert records.read(tmp_path / "found.jsonl") == runs
    assert records.renewed("<!-- table of found.jsonl -->\n| old |", tmp_path).count("| method") == 1
    page = "before\n<!-- table of found.jsonl -->\n| old |\n|---|\n\nafter\n"
    new = records.renewed(page, tmp_path)
    assert new == f"before\n<!-- table of found.jsonl -->\n{records.table(runs)}\n\nafter\n"
    assert records.renewed(new, tmp_path) == new

    other = [{**run, "order": "second", "rows": {"v": run["rows"]["t"]}} for run in (one("pm", 0, wrong), runs[1])]
    records.write(tmp_path / "both.jsonl", [{**run, "order": "first"} for run in (runs[2], runs[1])] + other)
    found = records.renewed("<!-- table of both.jsonl, lead of pm -->\n| old |\n", tmp_path).splitlines()
    assert found[1] == "| pm less | all | first | second | t | v |"
    values = [float(cell.split()[0]) / scale for cell in found[3].split("|")[2:-1]]
    assert values == pytest.approx([-0.5, -0.25, -0.75, -0.25, -0.75], abs=0.06)
    found = records.renewed("<!-- table of both.jsonl, lead of pm without t -->\n", tmp_path).splitlines()
    assert found[1] == "| pm less | all | v |"  # nothing is left of the first order
    found = records.lead([one(name, seed, right) for name in ("pm", "same") for seed in (0, 3)], "pm").splitlines()
    assert found[0] == "| pm less | all | seed 0 | seed 3 | t |"
    assert found[2] == "| same |" + " +0.0 (+0.0 to +0.0) |" * 4
    found = records.renewed("<!-- table of both.jsonl, tasks of pm,joint -->\n", tmp_path).splitlines()
    assert found[1] == "| task | pm | joint |"
    assert found[3:] == [f"| t | {0.75 * scale:.1f} | {scale:.1f} |", f"| v | {scale / 4:.1f} | {scale:.1f} |"]
    with pytest.raises(ValueError, match="no record of olora"):
        records.by_task(runs, ["pm", "olora"])
    with pytest.raises(ValueError, match="no record has u"):
        records.lead(runs, "pm", ["u"])
    with pytest.raises(ValueError, match="no record of olora"):
        records.lead(runs, "olora")


def test_tables_and_figures_in_the_docs_are_what_their_records_give(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import plot
    import records

    for path in (ROOT / "docs/results.md", ROOT / "benchmarks/README.md"):
        page = path.read_text()
        assert records.MARKER.search(page)
        assert records.renewed(page, path.parent) == page
    figures = list(plot.shown(ROOT / "docs/results.md"))
    assert figures
    for data, figure in figures:  # how it is drawn depends on matplotlib's version
        assert plot.source(data) in figure.read_text()


@pytest.mark.parametrize("name", ["standard-orders", "long-order"])
def test_the_final_tables_hold_every_preset_without_old_rows(name: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import records

    runs = {(x["name"], x["order"], x["seed"]) for x in records.read(ROOT / f"docs/results/{name}.jsonl")}
    presets = PRESETS.keys() - {"replay", "per_task"}  # old rows are trained on, not one adapter; joint is the bound
    orders = {"standard-orders": ("order1", "order2", "order3"), "long-order": ("order4",)}[name]
    assert runs >= {(preset, order, seed) for preset in presets for order in orders for seed in (0, 1, 2)}


@pytest.mark.parametrize("path", ["README.md", "docs/choosing.md", "docs/results.md"])
def test_numbers_in_the_text_are_in_a_table(path: str) -> None:
    """Those with one decimal, by digits: that none is left over from older runs, not that it is the right one."""
    number, tables = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])"), set()
    for line in (ROOT / "docs/results.md").read_text().splitlines():
        if line.startswith("|"):
            tables |= {f"{float(x):.1f}" for x in number.findall(line)}
    text = (ROOT / path).read_text()
    if path == "docs/results.md":
        text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    found = {x for x in number.findall(text) if re.fullmatch(r"\d+\.\d", x)}
    assert found
    assert not found - tables, f"in {path}, but in no table of docs/results.md: {sorted(found - tables)}"


def test_a_figure_of_records(monkeypatch, tmp_path) -> None:
    """A dot at each final average, a ring where the method has a plasticity; drawn from the file that it names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import plot
    import records

    data = ROOT / "docs/results/long-order.jsonl"
    found = records.read(data)
    averages = {name: float(x[0].mean()) for name, x in records.averages(found).items()}
    axes = plot.draw(found).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == sorted(averages, key=lambda name: averages[name])
    points = {tuple(xy) for line in axes.lines if line.get_marker() == "o" for xy in line.get_xydata()}
    assert {(averages[name], y) for y, name in enumerate(names)} < points
    learnt = {name: fmean(one["plasticity"] for one in found if one["name"] == name) for name in {*names} - {"joint"}}
    rings = {(value, names.index(name)) for name, value in learnt.items()}
    assert len(points) == len(averages) + len(rings)
    assert rings < points

    kinds = {name: plot._kind({"task_id": False, "method": PRESETS[name].plain()}) for name in PRESETS}
    assert {kinds[name] for name in ("ties", "frank_wolfe", "replay", "joint")} == {"keeps rows or adapters"}
    assert kinds["pm"] == kinds["pm_curvature"] == "merged in closed form"
    assert kinds["seqlora"] == kinds["opcm"] == "others"

    (tmp_path / "one.jsonl").write_bytes(data.read_bytes())
    (tmp_path / "page.md").write_text("![what it shows](one.svg)\n")
    monkeypatch.setattr(sys, "argv", ["records", "--write", str(tmp_path / "page.md")])
    records.main()
    drawn = (tmp_path / "one.svg").read_text()
    assert plot.source(tmp_path / "one.jsonl") in drawn
    assert "pm_curvature" in drawn


def test_pairs_of_runs_are_compared_task_by_task(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import flatness

    def row(run: str, task: str, curvature: float, rise: float) -> dict:
        values = {"curvature": curvature, "trained": 1.0, "at 1 - eps": 1.0 + rise, "score": 100 * rise}
        return {"run": run, "task": task, **values}

    rows = [row("pm-a-0", "a", 1.0, 0.5), row("pm-a-1", "a", 2.0, 0.5), row("pm-b-0", "b", 4.0, 0.25)]
    rows += [row("optimal-a-0", "a", 3.0, 1.0), row("optimal-a-1", "a", 3.0, 1.0), row("optimal-b-0", "b", 4.5, 0.5)]
    rows += [row("pm-own-a-0", "a", 9.0, 9.0), row("optimal-c-0", "c", 9.0, 9.0)]  # without another to go with
    first, second, both = flatness.compared(rows, "pm", "optimal")
    assert first == {
        **{"task": "a", "runs": 2},
        **{"curvature, pm": 1.5, "curvature, optimal": 3.0, "curvature, difference": -1.5},
        **{"rise, pm": 0.5, "rise, optimal": 1.0, "rise, difference": -0.5},
        **{"score, pm": 50.0, "score, optimal": 100.0, "score, difference": -50.0},
    }
    assert (second["curvature, difference"], second["rise, difference"]) == (-0.5, -0.25)
    # -1.5 and -0.5: mean -1, standard error 0.5, 12.706 of them for one degree of freedom
    assert both["curvature, difference"] == "-1 (-7.353 to 5.353)"
    assert (both["runs"], both["curvature, pm"]) == (3, 2.75)


def test_records_of_several_processes_at_once(tmp_path) -> None:
    """As of one `methods.py` a core, with one folder."""
    file = tmp_path / "records.jsonl"
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import records\n"
        "for i in range(150):\n    records.add(Path(sys.argv[2]), dict(name=sys.argv[3], order='o', seed=i))"
    )
    words = [sys.executable, "-c", code, str(ROOT / "benchmarks"), str(file)]
    both = [subprocess.Popen([*words, name]) for name in ("a", "b")]
    assert [one.wait(60) for one in both] == [0, 0]
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted((one["name"], one["seed"]) for one in found) == [(n, i) for n in "ab" for i in range(150)]
