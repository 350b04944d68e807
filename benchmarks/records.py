"""Records of runs, one JSON line each, and the table they give: what `methods.py` writes and the docs show.

    python benchmarks/records.py docs/results/FILE.jsonl        # print its table
    python benchmarks/records.py docs/results/FILE.jsonl --lead pm_curvature [--without TASK ...]    # its lead, paired
    python benchmarks/records.py --keep RUN [RUN ...] --into FILE.jsonl         # records of runs made otherwise
    python benchmarks/records.py --write docs/results.md        # renew a page: tables at their markers, figures

Intervals are of 95 %. With one seed: percentile bootstrap over the test rows, drawn anew within each task and the same
for all methods and orders; they say nothing of other seeds. With several: Student's t over the seeds' means (of all
orders), whose spread holds that of their test rows too where these were drawn by seed; but never narrower than the
rows alone allow, since few seeds may agree by chance. Differences are paired.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Sequence, Set
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from common import plain

DRAWS = 2000
WIDE = 8  # tasks that have a column each
# 97.5 % points of Student's t, for 1, 2, ... degrees of freedom; the last serves for more, and is a little wide there
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MARKER = re.compile(
    r"<!-- table of ([^\s,]+)(?:, (lead of|runs|matrix of|tasks of) ?(\S+)?(?: without (.*))?)? -->\n(?:\|.*(?:\n|$))*"
)
PATHS = ("model", "data_dir", "output_dir")  # of the configuration; of no use elsewhere
RESULTS = (
    *("method", "versions", "tasks", "stages", "lower_is_better", "untrained", "matrix", "coefficients"),
    *("raw_coefficients", "truncation_errors"),
    *("ranks", "curvatures", "curvature_errors", "losses", "constraint_reports", "seconds", "peak_memory_bytes"),
    *("average_accuracy", "average_over_time", "backward_transfer", "forgetting", "plasticity"),
)


def record(name: str, order: str, seed: int, run: Any) -> dict[str, Any]:
    """What is kept of a finished run (a :class:`pm_llm.report.data.Run`); `rows` are each test row's numbers."""
    results = run.results.plain()
    config = {key: value for key, value in results["config"].items() if key not in PATHS}
    if config["method"] == "joint":  # of which `methods.py` trains the last stage alone to its end
        results = {key: results[key] for key in results if key not in ("backward_transfer", "plasticity", "losses")}
        results |= {"matrix": results["matrix"][-1:], "seconds": results["seconds"][-1:]}
    return {
        **{"name": name, "order": order, "seed": seed, "model": Path(results["config"]["model"]).name},
        "task_id": run.results.facts.knows_task,
        "config": config,
        **{key: results[key] for key in RESULTS if key in results},
        "state_bytes": state_bytes(run.path),
        "rows": scored(run.final),
    }


def scored(predictions: Sequence[Any]) -> dict[str, Any]:
    """Each task's test rows (:class:`pm_llm.evaluation.predictions.Predictions`): the scorer, which rows, numbers."""
    return {
        one.task: {
            "scorer": one.scorer,
            "key": hashlib.sha256("".join(one.keys).encode()).hexdigest()[:16],
            "numbers": [[int(x) if float(x).is_integer() else x for x in row] for row in one.numbers.tolist()],
        }
        for one in predictions
    }


def state_bytes(path: Path) -> int:
    """What a run must keep to go on with another task: the adapter, the merge's memory (with old adapters, where it
    needs them) and the constraints', and the last task adapter where it is needed."""
    from pm_llm.config import Method
    from pm_llm.run.folder import RunDir
    from pm_llm.run.reading import ADAPTER, CURVATURE, MEMORY, STAGES, TASK_ADAPTER

    run = RunDir.open(path)
    state, words = run.state(), run.results().method
    method = Method().replaced(words["start"], words["constrain"], words["merge"])
    stages = [run.path / STAGES / stage.folder for stage in state["stages"]]
    kept = [run.path / ADAPTER, stages[-1] / CURVATURE, stages[-1] / MEMORY]
    if method.start.name == "alone" and method.merge.name == "replace" and not method.constrain:
        kept = [stage / TASK_ADAPTER for stage in stages]  # a model of its own for each task
    elif method.start.build("start").begins == "last":
        kept.append(stages[-1] / TASK_ADAPTER)
    files = [file for place in kept for file in ([place] if place.is_file() else place.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """The inverse of :func:`read`."""
    path.write_text("".join(json.dumps(one, separators=(",", ":")) + "\n" for one in records))


def add(path: Path, one: dict[str, Any]) -> None:
    """Put a record into a file, in place of one of the same name, order and seed. Processes take turns."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        before = read(path) if path.exists() else []
        others = [other for other in before if _key(other) != _key(one)]
        write(path.with_suffix(".tmp"), [*others, one])
        path.with_suffix(".tmp").replace(path)
    finally:
        os.close(folder)


def _key(one: dict[str, Any]) -> tuple[str, str, int]:
    return one["name"], one["order"], one["seed"]


def averages(records: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Each name's final average over its orders, (1 + DRAWS, seeds): as it is, then of each draw of rows.

    Raises:
        ValueError: If runs were scored on different rows, one is there twice, or a name lacks a run that another has.
    """
    from pm_llm.evaluation.scorers import scorer_named

    runs = {_key(one): one for one in records}
    if len(runs) < len(records):
        raise ValueError("two records are of one name, order and seed. Give one file only, or other ones.")
    names, orders, seeds = (list(dict.fromkeys(key[i] for key in runs)) for i in range(3))
    times: dict[str, np.ndarray] = {}  # a set of rows -> how often each of them is drawn
    keys: dict[tuple[str, int], str] = {}
    for (_, _, seed), one in runs.items():
        for task, rows in one["rows"].items():
            key, n = rows["key"], len(rows["numbers"])
            if keys.setdefault((task, seed), key) != key:
                raise ValueError(f"{one['name']} was scored on other rows of {task} than those before it.")
            if key not in times:
                draws = np.random.default_rng([len(times), n]).multinomial(n, np.full(n, 1 / n), size=DRAWS)
                times[key] = np.concatenate([np.ones((1, n)), draws])

    def average(one: dict[str, Any]) -> np.ndarray:
        parts = [(scorer_named(r["scorer"]), times[r["key"]], np.array(r["numbers"])) for r in one["rows"].values()]
        return np.mean([scorer.total(drawn @ numbers, len(numbers)) for scorer, drawn, numbers in parts], axis=0)

    found = {}
    for name in names:
        missing = [(o, s) for o in orders for s in seeds if (name, o, s) not in runs]
        if missing:
            raise ValueError(f"{name} was not run for {missing}.")
        by_seed = [np.mean([average(runs[name, o, s]) for o in orders], axis=0) for s in seeds]
        found[name] = np.stack(by_seed, axis=1)
    return found


def interval(found: np.ndarray) -> tuple[float, float, float]:
    """The mean of what :func:`averages` gives, or of a difference of two such, with its interval."""
    by_seed = found[0]
    mean = float(by_seed.mean())
    low, high = map(float, np.quantile(found[1:].mean(axis=1), [0.025, 0.975])) if len(found) > 1 else (mean, mean)
    if len(by_seed) > 1:
        half = float(T[min(len(by_seed) - 1, len(T)) - 1] * by_seed.std(ddof=1) / len(by_seed) ** 0.5)
        low, high = min(low, mean - half), max(high, mean + half)
    return mean, low, high


def table(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a line a name, the best first; differences are to seqlora, the gap to joint. Coefficients are
    of the first order and seed, all else is the mean over orders and seeds."""
    found = averages(records)
    means = {name: float(x[0].mean()) for name, x in found.items()}
    gap = means["joint"] - means["seqlora"] if {"joint", "seqlora"} <= set(means) else 0.0
    header = ["method", "final average", "less seqlora", "gap closed", "backward transfer", "plasticity"]
    header += ["coefficients", "minutes", "state, MiB"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * 5 + "---|---:|---:|"]
    for name in sorted(found, key=lambda name: -means[name]):
        runs = [one for one in records if one["name"] == name]
        less = found[name] - found["seqlora"] if "seqlora" in found and name != "seqlora" else None
        bound = is_bound(runs[0])
        seconds = [sum(sum(stage.values()) for stage in one["seconds"]) for one in runs]
        cells = [
            name,
            _shown(found[name], ""),
            "-" if less is None else _shown(less, "+"),
            "-" if less is None or not gap else f"{100 * float(less[0].mean()) / gap:.0f} %",
            "-" if bound else _mean(runs, "backward_transfer", "+.1f"),
            "-" if bound else _mean(runs, "plasticity", ".1f"),
            "-" if bound else ", ".join(f"{c:.2f}" for c in runs[0]["coefficients"]),
            f"{fmean(seconds) / 60:.1f}",
            f"{fmean(one['state_bytes'] for one in runs) / 2**20:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def lead(records: Sequence[dict[str, Any]], name: str, without: Sequence[str] = ()) -> str:
    """A Markdown table: how far `name` is ahead of each other one, in all, in each order, with each seed (intervals
    over its rows) and on each of a few tasks; as if the tasks `without` had not been scored.

    Raises:
        ValueError: If there is no record of that name, or no such task.
    """
    if missing := set(without) - {task for one in records for task in one["rows"]}:
        raise ValueError(f"no record has {', '.join(sorted(missing))}.")
    records = _on(records, {task for one in records for task in one["rows"]} - set(without))
    orders = list(dict.fromkeys(one["order"] for one in records))
    seeds = list(dict.fromkeys(one["seed"] for one in records))
    tasks = list(dict.fromkeys(task for one in records for task in one["rows"]))
    parts = {"all": list(records)}
    parts |= {order: [one for one in records if one["order"] == order] for order in orders if len(orders) > 1}
    parts |= {f"seed {seed}": [one for one in records if one["seed"] == seed] for seed in seeds if len(seeds) > 1}
    for task in tasks if len(tasks) <= WIDE else ():
        parts[task] = _on(records, {task})
    found = {part: averages(some) for part, some in parts.items()}
    if name not in found["all"]:
        raise ValueError(f"there is no record of {name}; there are {', '.join(found['all'])}.")
    lines = [f"| {name} less | " + " | ".join(parts) + " |", "|---|" + "---:|" * len(parts)]
    for other in sorted(found["all"], key=lambda other: -float(found["all"][other][0].mean())):
        if other != name:
            cells = [_shown(one[name] - one[other], "+") for one in found.values()]
            lines.append(f"| {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_task(records: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """A Markdown table: the final score of each task (a row each) after each of `names`, averaged over its runs.

    Raises:
        ValueError: If there is no record of a name.
    """
    if missing := set(names) - {one["name"] for one in records}:
        raise ValueError(f"there is no record of {', '.join(sorted(missing))}.")
    tasks = list(dict.fromkeys(task for one in records for task in one["rows"]))
    records = [one for one in records if one["name"] in names]
    lines = ["| task | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for task in tasks:
        found = averages(_on(records, {task}))
        lines.append(f"| {task} | " + " | ".join(f"{found[name][0].mean():.1f}" for name in names) + " |")
    return "\n".join(lines)


def _on(records: Sequence[dict[str, Any]], tasks: Set[str]) -> list[dict[str, Any]]:
    """The records as if only `tasks` had been scored; without those that have none of them."""
    cut = [{**one, "rows": {task: rows for task, rows in one["rows"].items() if task in tasks}} for one in records]
    return [one for one in cut if one["rows"]]


def is_bound(one: dict[str, Any]) -> bool:
    """Whether a run is of no sequence of one model, which could forget: a model a task, or `joint`."""
    return one["task_id"] or one["config"]["method"] == "joint"


def _mean(runs: Sequence[dict[str, Any]], key: str, form: str) -> str:
    """Over runs; of one task there is no backward transfer, nor where tasks were scored at the end alone."""
    return format(fmean(one[key] for one in runs), form) if all(key in one for one in runs) else "-"


def _results(one: dict[str, Any]) -> Any:
    """A record as results, with what the comparison of runs looks at besides."""
    from pm_llm.run.record import Results

    rows = [one["rows"][task] for task in one["tasks"]]
    more = {"scorers": [x["scorer"] for x in rows], "test_rows": [len(x["numbers"]) for x in rows]}
    return Results.of({**one, "config": {**one["config"], "model": one["model"]}, **more})


def _shown(found: np.ndarray, sign: str) -> str:
    value, low, high = interval(found)
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def renewed(text: str, folder: Path) -> str:
    """A page with the table of each marked file, a path relative to `folder`: of records (JSONL; with `, lead of NAME`
    or `, lead of NAME without TASK ...` that of :func:`lead`, with `, runs` that of `pm-llm report`, with `, matrix
    of NAME` that run's, with `, tasks of NAME,NAME ...` that of :func:`by_task`), or of plain rows."""
    from pm_llm.evaluation.matrix import Matrix
    from pm_llm.report.tables import compare
    from pm_llm.run.record import Results

    def made(match: re.Match[str]) -> str:
        path, (kind, name, without) = folder / match[1], match.groups()[1:]
        if path.suffix != ".jsonl":
            found = plain(json.loads(path.read_text()))
        elif kind == "lead of":
            found = lead(read(path), name, (without or "").split())
        elif kind == "tasks of":
            found = by_task(read(path), name.split(","))
        elif kind == "runs":
            records = read(path)
            found = compare([_results(one) for one in records], names=[one["name"] for one in records])
        elif kind == "matrix of":
            (one,) = (one for one in read(path) if one["name"] == name)
            found = Matrix.from_results(Results.of(one)).table(one["coefficients"])
        else:
            found = table(read(path))
        return f"{match[0].partition(chr(10))[0]}\n{found}\n"

    return MARKER.sub(made, text)


def main() -> None:
    """Print a file's table, or renew a page's tables and figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("records", type=Path, nargs="*", metavar="RECORDS.jsonl")
    parser.add_argument("--lead", metavar="NAME", help="how far this method is ahead of the others")
    parser.add_argument("--without", nargs="+", default=(), metavar="TASK", help="tasks that do not count for it")
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="renew the tables and figures of this page")
    parser.add_argument("--keep", type=Path, nargs="+", metavar="RUN", help="finished runs, named by their folders")
    parser.add_argument("--into", type=Path, metavar="FILE.jsonl", help="where their records go")
    given = parser.parse_args()
    if bool(given.keep) != bool(given.into):
        parser.error("--keep RUN ... and --into FILE.jsonl go together.")
    if given.without and not given.lead:
        parser.error("--without TASK ... goes with --lead NAME.")
    if given.write:
        import plot

        given.write.write_text(renewed(given.write.read_text(), given.write.parent))
        plot.redraw(given.write)
    elif given.keep:
        from pm_llm.report.data import open_run

        for path in given.keep:
            run = open_run(path)
            config = run.results.config
            add(given.into, record(path.name, str(config["order"] or "given"), config["seed"], run))
    else:
        found = [one for path in given.records for one in read(path)]
        print(lead(found, given.lead, given.without) if given.lead else table(found))


if __name__ == "__main__":
    main()
