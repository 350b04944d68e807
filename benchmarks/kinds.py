"""What later tasks of other kinds leave of tool calling: tool chats, then prose instructions, then raw text.

    python benchmarks/kinds.py --model DIR --data DATA [--ways seqlora pm ...] [--seed 1] --out FILE.json

The model (an instruct model whose chat template takes tools) is first trained on chats that end in a tool call, which
this script makes up; then on summaries of dialogues (SuperNI's samsum), as chats; then on raw text (TRACE's
MeetingBank). Measured before and after each task: right tool calls on held-back requests (name and arguments), ROUGE-L
of the summaries, perplexity of the text, and all calls to tools of the list, right or wrong. DATA holds `superni` and
`trace_500`. What is in the file already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from common import show, superni_chats, write_rows

PLACES = "Oslo,Lima,Cairo,Quito,Kyoto,Perth,Turin,Accra,Delhi,Malmo,Porto,Basel,Ghent,Davao,Sofia,Tunis".split(",")
NAMES = "Ada,Ben,Cleo,Dev,Eli,Fay,Gus,Hana,Ivo,Jun,Kim,Lea".split(",")
THINGS = "milk,bread,a lamp,two chairs,paint,a kettle,rice,stamps,a clock,socks".split(",")
# name, description, arguments with what they are drawn from, ways to ask
TOOLS: list[tuple[str, str, dict[str, list[str]], list[str]]] = [
    (
        "get_forecast",
        "Weather of a place on a day.",
        {"place": PLACES, "day": ["today", "tomorrow", "on Sunday", "on Friday"]},
        ["What will the weather be like in {place} {day}?", "Do I need an umbrella {day} in {place}?"],
    ),
    (
        "send_note",
        "Send somebody a short note.",
        {"to": NAMES, "text": ["I am late", "call me", "lunch is ready", "the key is under the mat"]},
        ["Tell {to}: {text}.", "Please let {to} know that {text}.", "Write to {to} that {text}."],
    ),
    (
        "convert_money",
        "Convert an amount between currencies.",
        {"amount": ["5", "12", "40", "99", "250"], "source": ["EUR", "USD", "JPY"], "target": ["GBP", "CHF", "SEK"]},
        ["How much is {amount} {source} in {target}?", "Change {amount} {source} into {target} for me."],
    ),
    (
        "add_to_list",
        "Put a thing on a list.",
        {"thing": THINGS, "list": ["shopping", "holiday", "office"]},
        ["Put {thing} on the {list} list.", "We need {thing}, note it on my {list} list."],
    ),
    (
        "book_table",
        "Book a table in a restaurant.",
        {"place": PLACES, "people": ["2", "3", "4", "6"], "hour": ["18:00", "19:30", "20:15"]},
        ["Book a table for {people} in {place} at {hour}.", "We are {people}: dinner in {place}, {hour} please."],
    ),
]
KEYS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_length": 320,
    "max_new_tokens": 48,
    "evaluate": "all",
    "evaluation.batch_size": 24,
    "fisher.samples": 16,
    "fisher.max_new_tokens": 32,
    "lora.target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "lora.layers_to_transform": [18, 19, 20, 21, 22, 23],
    "train.per_device_train_batch_size": 2,
    "train.learning_rate": 2e-3,
    "train.max_steps": 16,
    "train.packing": True,
}
ANCHORED = [{"name": "curvature", "weight": 0.3}, {"name": "anchor", "weight": 0.1}]
WAYS: dict[str, dict[str, Any]] = {
    "seqlora": {"method": "seqlora"},
    "pm": {"method": "pm"},
    "pm_curvature": {"method": "pm_curvature"},
    "pm_curvature, task 0": {"method": "pm_curvature", "general": "general.jsonl", "general.samples": 48},
    "pm_curvature, anchor": {"method": "pm_curvature", "constrain": ANCHORED},
}
TRAIN, TEST = 120, 24


def schema(name: str, about: str, arguments: dict[str, list[str]]) -> dict[str, Any]:
    """A tool as templates take it."""
    properties = {key: {"type": "string"} for key in arguments}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def tool_chats(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests, each with two tools of which one fits, and its call."""
    rng, rows, seen = random.Random(seed), [], set()
    while len(rows) < count:
        chosen = rng.sample(TOOLS, 2)
        name, _, arguments, ways = rng.choice(chosen)
        said = {key: rng.choice(some) for key, some in arguments.items()}
        asked = rng.choice(ways).format(**said)
        if asked in seen:
            continue
        seen.add(asked)
        call = {"type": "function", "function": {"name": name, "arguments": said}}
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        rows.append({"messages": turns, "tools": [schema(*tool[:3]) for tool in chosen]})
    return rows


def write_tasks(data: Path, out: Path, seed: int) -> list[dict[str, Any]]:
    """The three tasks, as entries of `tasks`; and prompts of other SuperNI tasks beside them."""
    chats = tool_chats(TRAIN + TEST, seed)
    superni = data / "superni" / "SuperNI"

    prose = superni / "task1572_samsum_summary"
    meetings = json.loads((data / "trace_500" / "MeetingBank" / "test.json").read_text())
    pieces = [
        row["prompt"][i : i + 700] for row in meetings for i in range(100, 2900, 700) if len(row["prompt"]) > i + 200
    ]
    texts = [{"text": piece} for piece in pieces[: TRAIN + TEST]]
    others = [x for x in sorted(superni.iterdir()) if x != prose]
    write_rows(
        out / "general.jsonl",
        [{"messages": row["messages"][:1]} for x in others for row in superni_chats(x, "train", 8)],
    )
    return [
        {
            "name": "tools",
            "scorer": "tool_call",
            "data": write_rows(out / "tools.jsonl", chats[:TRAIN]),
            "test_data": write_rows(out / "tools-test.jsonl", chats[TRAIN:]),
        },
        {
            "name": "prose",
            "scorer": "rougeL",
            "data": write_rows(out / "prose.jsonl", superni_chats(prose, "train", TRAIN)),
            "test_data": write_rows(out / "prose-test.jsonl", superni_chats(prose, "test", TEST // 3)),
        },
        {
            "name": "text",
            "data": write_rows(out / "text.jsonl", texts[:TRAIN]),
            "test_data": write_rows(out / "text-test.jsonl", texts[TRAIN : TRAIN + TEST // 3]),
        },
    ]


def valid_calls(run: Any, columns: dict[str, list[dict[str, Any]]], stage: int) -> float:
    """Share, in percent, of answers that call one tool of the row's with the arguments it wants, right or not."""
    from pm_llm.evaluation.predictions import read_predictions
    from pm_llm.evaluation.scorers import calls_in

    (path,) = [p for p in run.run_dir.predictions(stage) if "tools" in Path(p).stem]
    said = read_predictions(path)["tools"].predictions
    fine = 0
    for answer, row in zip(said, columns["tools"], strict=True):
        wanted = {x["function"]["name"]: set(x["function"]["parameters"]["required"]) for x in row["tools"]}
        calls = calls_in(answer)
        fine += len(calls) == 1 and wanted.get(calls[0][0]) == set(calls[0][1])
    return 100 * fine / len(said)


def measure(way: str, model: str, data: Path, seed: int) -> dict[str, Any]:
    """One run."""
    from pm_llm import ContinualSequence
    from pm_llm.config import load_config

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        tasks = write_tasks(data, out, seed)
        keys = {**KEYS, **WAYS[way], "model": model, "seed": seed, "tasks": tasks, "output_dir": str(out / "run")}
        if "general" in keys:
            keys["general"] = str(out / keys["general"])
        run = ContinualSequence(load_config(None, keys))
        results = run.run()
        rows = {"tools": [json.loads(line) for line in (out / "tools-test.jsonl").read_text().splitlines()]}
        valid = [valid_calls(run, rows, stage) for stage in (-1, 0, 1, 2)]
        seconds = [round(sum(stage.values())) for stage in results["seconds"]]
        return {
            "before": results["untrained"],
            "matrix": results["matrix"],
            "valid calls": valid,
            "coefficients": results["coefficients"],
            "seconds": seconds,
        }


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A line a way: right tool calls after each task, calls that are valid, and the other two at the end."""
    lines = []
    for way, run in found.items():
        tools = [run["before"]["tools"], *(row[0] for row in run["matrix"])]
        lines.append(
            {
                "method": way,
                "right calls: base, tools, prose, text": " ".join(f"{x:.0f}" for x in tools),
                "valid calls": " ".join(f"{x:.0f}" for x in run["valid calls"]),
                "ROUGE-L: base, end": f"{run['before']['prose']:.1f} {run['matrix'][-1][1]:.1f}",
                "perplexity: base, end": f"{run['before']['text']:.1f} {run['matrix'][-1][2]:.1f}",
                "coefficients": " ".join(f"{x:.2f}" for x in run["coefficients"]),
            }
        )
    return lines


def main() -> None:
    """Measure what is missing, show, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    for way in given.ways:
        found = json.loads(given.out.read_text()) if given.out.is_file() else {}
        if way not in found:
            made = measure(way, given.model, given.data, given.seed)
            found = json.loads(given.out.read_text()) if given.out.is_file() else {}
            given.out.write_text(json.dumps({**found, way: made}, indent=1) + "\n")
    found = json.loads(given.out.read_text())
    show(table({way: found[way] for way in WAYS if way in found}), None)


if __name__ == "__main__":
    main()
