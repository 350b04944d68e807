"""`pm-llm init`: a configuration for one's own tasks, made after a look at model and rows."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pm_llm.errors import PmLlmError

if TYPE_CHECKING:
    from pm_llm.commands._propose import Choice

MODEL, FOLDER, FILE = "HuggingFaceTB/SmolLM2-135M-Instruct", "runs/mine", "my.yaml"


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "init",
        help="write a configuration for your own tasks",
        description="Look at model and rows, and write a commented configuration with values that fit them. What is "
        "not given is asked for, on a terminal.",
    )
    parser.add_argument(
        "data",
        nargs="*",
        metavar="DATA",
        help="the tasks in their order: files, folders, dataset ids, "
        "or mappings: '{data: mails.csv, prompt: subject, completion: queue}'",
    )
    parser.add_argument("--model", help=f"Hub id or folder of the base model (asked for; {MODEL})")
    parser.add_argument(
        "--output_dir", "--output-dir", metavar="DIR", help=f"where the run goes (asked for; {FOLDER})"
    )
    parser.add_argument("--out", default=FILE, metavar="FILE", help=f"where the configuration goes ({FILE})")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm init`: look, choose, write, and say why."""
    out = Path(given.out)
    if out.exists():
        raise PmLlmError(f"{out} exists. Give another file with --out, or remove it.")
    data = given.data or shlex.split(_asked("Your tasks, in their order (files, folders, dataset ids)", None, "DATA"))
    model = given.model or _asked("Model", MODEL, "--model")
    folder = given.output_dir or _asked("Folder of the run", FOLDER, "--output_dir")

    from pm_llm.system.quiet import quiet_libraries

    quiet_libraries()
    from pm_llm.commands._propose import choose, entry, look
    from pm_llm.config import load_config
    from pm_llm.system.coerce import read_yaml
    from pm_llm.system.files import replace_bytes

    given_entries = [read_yaml(word) if word.startswith("{") else word for word in data]
    try:
        seen = look(model, given_entries)
    except PmLlmError as error:
        if "Name yours with" not in str(error):
            raise
        how = "'{data: FILE, prompt: COLUMN, completion: COLUMN}'"
        raise PmLlmError(f"{error} Here that is an entry in place of the file: {how}.") from error
    if len(seen.tasks) != len(data):  # a folder of task files
        raise PmLlmError(f"{' '.join(data)} holds {len(seen.tasks)} tasks. Name their files, in their order.")
    entries = [entry(one, task) for one, task in zip(given_entries, seen.tasks, strict=True)]
    choices = choose(seen)
    text = written(model, folder, entries, choices)
    load_config(read_yaml(text)).check()
    replace_bytes(out, text.encode())
    for task, (_, told) in zip(seen.tasks, entries, strict=True):
        print(f"{task.name}: {told}")
    print(f"\n{out}:")
    for one in choices:
        print(f"  {one.key}: {_shown(one.value)}\n      {one.why}")
    steps = (f"pm-llm {command} --config {out}" for command in ("tasks check", "doctor", "run"))
    print("\nNext: " + "\n      ".join(steps))
    return 0


def _asked(what: str, usual: str | None, flag: str) -> str:
    """What somebody answers; without a terminal the usual, or an error that names the flag."""
    if not sys.stdin.isatty():
        if usual is None:
            raise PmLlmError(f"no tasks are given. Name them: pm-llm init {flag} ... (files, folders or dataset ids).")
        print(f"{flag} is not given: {usual}", flush=True)
        return usual
    said = input(f"{what}{f' [{usual}]' if usual else ''}: ").strip() or usual
    return said or _asked(what, usual, flag)


def written(model: str, folder: str, entries: list[tuple[Any, str]], choices: list[Choice]) -> str:
    """The configuration as text."""
    from pm_llm.system.coerce import write_yaml

    def line(key: str, value: Any, why: str, indent: str = "") -> str:
        return f"{indent}{write_yaml({key: value}).strip()}".ljust(40) + f"  # {why}"

    top = [one for one in choices if "." not in one.key]
    train = [one for one in choices if one.key.startswith("train.")]
    return "\n".join(
        [
            "# Written by pm-llm init. All keys: pm-llm run --help",
            line("model", model, "any LLaMA-like decoder or T5, by id or folder"),
            line("method", "pm_curvature", "pm-llm methods lists all"),
            "tasks:                                    # in the order in which they are trained",
            *(f"  - {_shown(one)}".ljust(40) + f"  # {told}" for one, told in entries),
            *(line(one.key, one.value, one.why) for one in top),
            "lora: {r: 8, lora_alpha: 16, target_modules: all-linear}",
            "train:",
            *(line(one.key.removeprefix("train."), one.value, one.why, "  ") for one in train),
            "# evaluate: all                         # also score every task before it is trained",
            "# general: {skills: all}                # what the base could do before, scored beside the tasks",
            "# gate: {lose: 5}                       # stop when a task or a skill loses more points than that",
            line("output_dir", folder, "the run's folder"),
            "",
        ]
    )


def _shown(value: Any) -> str:
    """A value on one line of YAML."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).strip()
    return text.removesuffix("\n...").strip()
