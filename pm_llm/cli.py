"""The command line, `pm-llm COMMAND`. Heavy imports wait for the commands."""

from __future__ import annotations

import argparse
import dataclasses
import io
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import yaml

from pm_llm import __version__
from pm_llm.config import RunConfig, flags, load_config
from pm_llm.errors import PmLlmError, first_line, nobody_listens
from pm_llm.system.quiet import quiet_libraries, quiet_notices

NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def make_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="pm-llm",
        description="Fine-tune one language model on task after task and forget little; out comes one PEFT adapter.",
    )
    parser.add_argument("--version", action="version", version=f"pm-llm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="train a sequence of tasks",
        description="Train a sequence of tasks. Any key of the configuration can be given as a flag and overrides "
        "the file; a dot reaches into a section (--lora.r 4). Values are read as YAML.",
        epilog="keys:\n" + "\n".join(f"  --{key}\n        {text}" for key, text in flags()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("--config", metavar="RECIPE.YAML", help="configuration to start from")
    run.add_argument(
        "--restart-from", metavar="TASK", help="redo a run from this task on (its name or number), keeping the rest"
    )

    status = commands.add_parser("status", help="show where a run stands and what it will do next")
    status.add_argument("run_dir", metavar="RUN_DIR")

    doctor = commands.add_parser(
        "doctor",
        help="say what of this machine will not work, and what to install",
        description="Check versions, devices, bfloat16, disk and the Hub login, for the run that the configuration "
        "describes. Further flags are keys of the configuration, as for run. Exit status 1 if a run would fail.",
    )
    doctor.add_argument("--config", metavar="RECIPE.YAML", help="configuration to start from")

    merge = commands.add_parser("merge", help="fold one LoRA adapter into another, exactly")
    merge.add_argument("--running", required=True, metavar="DIR", help="the adapter to fold into")
    merge.add_argument(
        "--new", required=True, metavar="DIR", nargs="+", action="extend", help="the adapter to add, or several"
    )
    merge.add_argument(
        "--coefficient",
        type=float,
        nargs="+",
        action="extend",
        metavar="X",
        help="weight of the new adapter: one for all, or one each (default: 1)",
    )
    merge.add_argument("--max-rank", type=int, help="truncate the result to this rank (default: exact, no truncation)")
    merge.add_argument("--out", required=True, metavar="DIR", help="folder for the result; must not exist")

    evaluate = commands.add_parser(
        "evaluate",
        help="score an adapter on tasks",
        description="Score a PEFT adapter (or the base model alone) on tasks. Further flags are keys of the "
        "configuration, as for run: --model, --benchmark, --order, --data-dir, --tasks ...",
    )
    evaluate.add_argument(
        "--adapter", metavar="DIR_OR_ID", help="adapter folder or Hub id; none: the base model alone"
    )
    evaluate.add_argument("--config", metavar="RECIPE.YAML", help="configuration to start from")
    evaluate.add_argument("--predictions", metavar="FILE.jsonl", help="keep the predictions, to score them again")

    tasks = commands.add_parser("tasks", help="look at tasks before training on them")
    check = tasks.add_subparsers(dest="action", required=True, metavar="ACTION").add_parser(
        "check",
        help="sizes, label balance, token lengths, shared rows, examples",
        description="Print what a run would train on, or everything that is wrong with it, with file and line. "
        "Tasks are given as files or dataset ids, or by --config, --benchmark, --order, --data_dir, --tasks ...; "
        "--model names the tokenizer.",
        usage="pm-llm tasks check [TASK ...] [--config RECIPE.YAML] [--KEY VALUE ...]",
    )
    check.add_argument("--config", metavar="RECIPE.YAML", help="configuration to start from")

    score = commands.add_parser(
        "score",
        help="score saved predictions, without the model",
        description="Score saved predictions again: those after a run's last task, or of one file.",
    )
    score.add_argument("predictions", metavar="RUN_DIR_OR_FILE")
    score.add_argument("--scorer", help="another scorer than the tasks' own")

    vector = commands.add_parser(
        "vector",
        help="write the difference of two models as a LoRA adapter",
        description="Write the difference of two models, such as an instruction-tuned one and its base, as a LoRA "
        "adapter of the base: to fold in with merge, or for `merge: {name: transfer, adapter: DIR}`.",
    )
    vector.add_argument("--base", required=True, metavar="DIR_OR_ID", help="the model that the vector is relative to")
    vector.add_argument("--tuned", required=True, metavar="DIR_OR_ID", help="the other model, of the same shapes")
    vector.add_argument("--rank", type=int, default=64, help="rank of the adapter (default: 64)")
    vector.add_argument("--target-modules", nargs="+", help="as lora.target_modules (default: q and v projections)")
    vector.add_argument("--out", required=True, metavar="DIR", help="folder for the adapter; must not exist")

    compress = commands.add_parser(
        "compress",
        help="make a stored adapter small, or an ordinary one again",
        description="Write an adapter with fewer ranks and bits, module by module within a budget, and say what that "
        "costs; with --expand make an ordinary PEFT adapter of a compressed one.",
    )
    compress.add_argument("--adapter", required=True, metavar="DIR", help="the adapter, or the compressed one")
    compress.add_argument("--budget", type=float, default=0.25, help="share of its bytes (default: 0.25)")
    compress.add_argument("--expand", action="store_true", help="make an ordinary adapter again")
    compress.add_argument("--out", required=True, metavar="DIR", help="folder for the result; must not exist")

    route = commands.add_parser(
        "route",
        help="score a run's task adapters with each prompt sent to those it looks like, instead of merging",
        description="Score the task adapters of a finished run (start alone, as the preset per_task): each prompt "
        "is answered with the adapter whose training prompts are nearest in the base model's hidden states, or PEFT's "
        "Arrow mixes the adapters token by token.",
    )
    route.add_argument("run_dir", metavar="RUN_DIR")
    route.add_argument("--router", default="nearest", help="nearest (default) or arrow")

    commands.add_parser("methods", help="list every preset, start, constraint and merge")

    report = commands.add_parser("report", help="print finished runs' tables and write them as one HTML page")
    report.add_argument("run_dir", nargs="+", metavar="RUN_DIR", help="one run, or several to compare")
    report.add_argument("--out", metavar="DIR", help="folder for report.html and figures (default: the first run's)")
    report.add_argument("--joint", type=float, help="final average of joint training, as the first run was scored")

    push = commands.add_parser("push", help="upload a run's adapter with a model card to the Hub")
    push.add_argument("run_dir", metavar="RUN_DIR")
    push.add_argument("repo_id", metavar="USER/NAME")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--base-model", metavar="USER/NAME", help="id of the base model, where the run's is a folder")
    push.add_argument("--dry-run", action="store_true", help="show the card and list the files, upload nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, or 2 after printing one line on bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of ASCII stops nothing
    parser = make_parser()
    for command in parser._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        command._negative_number_matcher = NEGATIVE  # -1e-1 is a number too, and no flag
    given, rest = parser.parse_known_args(arguments)
    quiet_notices()
    try:
        if given.command in ("run", "evaluate", "tasks", "doctor"):
            files = list(takewhile(lambda word: not word.startswith("-"), rest)) if given.command == "tasks" else []
            overrides = parse_overrides(rest[len(files) :]) | ({"tasks": files} if files else {})
            config = load_config(given.config, overrides).check()
            quiet_libraries()
            configured = {"run": run, "evaluate": evaluate, "tasks": check_tasks, "doctor": doctor}
            return configured[given.command](given, config)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        simple = {"merge": merge, "vector": vector, "score": score, "report": report, "push": push}
        simple |= {"status": status, "methods": methods, "compress": compress, "route": route}
        return simple[given.command](given)
    except PmLlmError as error:
        print(f"pm-llm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pm-llm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads on, as after `| head`
        nobody_listens()
        return 0
    except OSError as error:  # of the disk, names, links or the network; what is committed stays as it is
        print(f"pm-llm: error: {error.strerror or first_line(error)}: {_place(error)}.", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError) as error:
        print(f"pm-llm: error: {_explained(error)}", file=sys.stderr)
        return 2


def _explained(error: Exception) -> str:
    """What the libraries' errors mean that can be told from their texts; any other is raised."""
    from pm_llm.system.processes import is_lost_connection

    if is_lost_connection(error):
        return (
            f"the connection to another process was lost ({first_line(error)}). See what that process said last; what "
            "is committed stays, and the same command goes on from there."
        )
    if "null byte" in str(error) or "Symlink loop" in str(error):
        return f"{first_line(error)}: check the names that were given."
    raise error


def _place(error: OSError) -> str:
    name = str(error.filename or "while reading or writing")
    return name if len(name) <= 200 else name[:200] + "..."


def parse_overrides(rest: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` pairs; several values make a list; `--data-dir` is `data_dir`.

    Raises:
        PmLlmError: If a value is missing, a list is given twice, or something is not a flag.
    """
    overrides: dict[str, list[Any]] = {}
    texts = {"model", "data_dir", "output_dir", "tasks", "probes"}  # paths: `#2` in one is no comment

    def read(key: str, word: str) -> Any:
        return word if key in texts and not word.startswith(("{", "[", '"', "'")) else _yaml(word)

    lists = {"tasks", "probes", "lora.target_modules", "lora.layers_to_transform"}
    key = None
    for word in rest:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            if key in lists & overrides.keys():
                raise PmLlmError(f"--{key} is given twice. Give all of its values after one --{key}.")
            overrides[key] = [read(key, value)] if equals else []
        elif key is None:
            raise PmLlmError(f"{word!r} is not a flag. Settings are given as --key value.")
        else:
            overrides[key].append(read(key, word))
    for key, values in overrides.items():
        if not values:
            raise PmLlmError(f"--{key} needs a value.")
    given = {key: values[0] if len(values) == 1 else values for key, values in overrides.items()}
    none = {key for key in given if key.startswith("lora.") and given[key] in (None, "none")}
    one = {key for key in (lists & given.keys()) - none if not isinstance(given[key], list)}
    return {key: [value] if key in one else value for key, value in given.items()}


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # 2024-02-30 is taken for a date
        return text


def run(given: argparse.Namespace, config: RunConfig) -> int:
    """`pm-llm run`: train, then print the matrix and what follows from it."""
    from pm_llm.report.tables import describe
    from pm_llm.sequence import ContinualSequence
    from pm_llm.system.processes import shut_down
    from pm_llm.system.progress import say
    from pm_llm.training.stopping import Stopped

    sequence = ContinualSequence(config, restart_from=given.restart_from)
    try:
        results = sequence.run()
    except Stopped as stop:
        say(f"{stop}; the same command goes on from here. Where that is: pm-llm status {sequence.run_dir.path}")
        return 128 + stop.number
    if sequence.state.is_main_process:
        say("\n" + describe(results))
        folder = sequence.run_dir.path
        try:
            from pm_llm.report.figures import matrix_png

            with sequence.run_dir.locked():
                sequence.run_dir.write("matrix.png", matrix_png(results))
        except ImportError:  # matplotlib is an extra; the results are there all the same
            say('for a picture of the matrix: pip install "pm_llm[report]"')
        say(f"\nadapter: {folder / 'adapter'}\nresults: {folder / 'results.json'}")
    shut_down()
    return 0


def status(given: argparse.Namespace) -> int:
    """`pm-llm status`: where a run stands."""
    from pm_llm.run.status import describe_run

    print(describe_run(given.run_dir))
    return 0


def evaluate(given: argparse.Namespace, config: RunConfig) -> int:
    """`pm-llm evaluate`: one line a task with its 95 % bootstrap interval, and their mean (probes aside)."""
    from pm_llm.evaluation.answering import evaluate_adapter
    from pm_llm.run.folder import RunDir, jsonl
    from pm_llm.system.files import replace_bytes, writing
    from pm_llm.system.processes import process_state, shut_down
    from pm_llm.system.progress import say
    from pm_llm.tasks.loading import load_tasks, scored

    keep = Path(given.predictions) if given.predictions else None
    if keep is not None and (keep.is_dir() or not keep.absolute().parent.is_dir()):
        raise PmLlmError(f"--predictions {keep} is a folder, or in one that does not exist. Name a file.")
    if given.adapter:
        RunDir.check_within(given.adapter)
    stages = load_tasks(config)
    found = evaluate_adapter(given.adapter, config, scored(config, stages))
    for line in _score_lines(found, tasks=[task.name for task in stages]):
        say(line)
    shut_down()
    if keep is not None and process_state().is_main_process:
        with writing(keep):  # whole, or as it was
            replace_bytes(keep, jsonl([line for one in found for line in one.lines()]))
    return 0


def _score_lines(found: Sequence[Any], scorer: str | None = None, tasks: Sequence[str] | None = None) -> list[str]:
    """A line each, and their mean; of a run's `tasks`, where its probes are among them."""
    from pm_llm.evaluation.intervals import interval, mean_interval
    from pm_llm.evaluation.scorers import scorer_named

    if scorer is not None:
        found = [dataclasses.replace(one, scorer=scorer) for one in found]
    named = [(one.task, interval(one), len(one.predictions)) for one in found]
    counted = [one for one in found if tasks is None or one.task in tasks]
    if len({scorer_named(one.scorer).lower_is_better for one in counted}) == 1:
        named.append(("mean", mean_interval(counted), sum(len(one.predictions) for one in counted)))
    return [f"{name}\t{x.value:.2f}\t({x.low:.2f} to {x.high:.2f})\t{rows} rows" for name, x, rows in named]


def doctor(given: argparse.Namespace, config: RunConfig) -> int:
    """`pm-llm doctor`: a line for each thing that was looked at."""
    from pm_llm.commands.doctor import main_text

    text, status = main_text(config)
    print(text)
    return status


def check_tasks(given: argparse.Namespace, config: RunConfig) -> int:
    """`pm-llm tasks check`: what a run would train on."""
    from pm_llm.tasks.check import describe_tasks

    print(describe_tasks(config))
    return 0


def score(given: argparse.Namespace) -> int:
    """`pm-llm score`: scores of saved predictions."""
    from pm_llm.evaluation.predictions import read_all
    from pm_llm.presets import knows_task
    from pm_llm.run.folder import RunDir

    paths, tasks = [Path(given.predictions)], None
    if paths[0].is_dir():
        run_dir = RunDir.open(paths[0])
        state = run_dir.state()
        stages = state["stages"]
        known = bool(stages) and knows_task(state["config"]["method"], stages[-1].get("words"))
        tasks = [] if known else state["tasks"]  # no mean of what its result is not used for
        paths = run_dir.predictions(len(stages) - 1)
    found = read_all(paths)
    if not found:
        raise PmLlmError(f"{given.predictions} holds no predictions: nothing has been scored yet.")
    print("\n".join(_score_lines(list(found.values()), given.scorer, tasks)))
    return 0


def merge(given: argparse.Namespace) -> int:
    """`pm-llm merge`: fold, write, and say how exact it is."""
    from pm_llm.merges.files import merge_folders
    from pm_llm.run.folder import RunDir

    for folder in (given.running, *given.new):
        RunDir.check_within(folder)
    report = merge_folders(given.running, given.new, given.coefficient or [1.0], given.max_rank, given.out)
    print(f"{given.out}: rank {report.rank}, relative truncation error {report.truncation_error:.3e}")
    return 0


def vector(given: argparse.Namespace) -> int:
    """`pm-llm vector`: the difference, and how much of it the rank leaves out."""
    from pm_llm.merges.files import write_task_vector
    from pm_llm.run.folder import RunDir

    RunDir.check_within(given.out)
    error, names, share = write_task_vector(given.base, given.tuned, given.rank, given.target_modules, given.out)
    print(f"{given.out}: rank {given.rank}, relative truncation error {error:.3e}")
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        print(f"left out: {share:.1%} of the squared change, in {shown}. --target-modules says what is taken.")
    return 0


def compress(given: argparse.Namespace) -> int:
    """`pm-llm compress`: what each module was cut to, and what was lost."""
    from pm_llm.adapters.compression import compress, expand
    from pm_llm.run.folder import RunDir
    from pm_llm.system.files import size_of

    RunDir.check_within(given.adapter)
    if given.expand:
        expand(given.adapter, given.out)
        print(given.out)
        return 0
    damage = compress(given.adapter, given.out, given.budget)
    for name, error in damage.errors.items():
        print(f"{name}\trank {damage.ranks[name]}\t{damage.bits[name]} bits\trelative error {error:.3f}")
    print(f"{given.out}: {size_of(damage.before)} -> {size_of(damage.after)}, relative error {damage.error:.3f}")
    return 0


def route(given: argparse.Namespace) -> int:
    """`pm-llm route`: one line a task with the share that went to its own adapter, the mean, and the memory."""
    quiet_libraries()
    from pm_llm.evaluation.routing import route
    from pm_llm.system.files import size_of

    found = route(given.run_dir, given.router)
    lines = _score_lines(found.predictions)
    shares = [f"\trouted right {share:.0%}" for share in found.right]
    print("\n".join(line + share for line, share in zip_longest(lines, shares, fillvalue="")))
    print(f"kept: {size_of(found.kept_bytes)}")
    return 0


def methods(given: argparse.Namespace) -> int:
    """`pm-llm methods`: the table of presets, then what they are made of."""
    from pm_llm.report.catalogue import choices, table

    print(f"{table()}\n{choices()}")
    return 0


def report(given: argparse.Namespace) -> int:
    """`pm-llm report`: tables here, and the page with its figures in a folder."""
    from pm_llm.report.data import open_run
    from pm_llm.report.tables import compare, describe
    from pm_llm.run.folder import RunDir

    runs = [open_run(path) for path in given.run_dir]
    out = Path(given.out or runs[0].path)
    own = out.resolve() == runs[0].path.resolve()
    if not own and (out / "state.json").exists():
        raise PmLlmError(
            f"{out} is the folder of a run. Choose another --out; without it the page goes to {runs[0].path}."
        )
    for one in runs:
        print(f"{one.path}\n{describe(one.results)}\n")
    table = compare([one.results for one in runs], given.joint, [one.name for one in runs])
    if len(runs) > 1:
        print(table + "\n")
    if given.joint is not None and "gap closed" not in table:
        print("no gap closed: it needs a run of seqlora among these, scored as the first, with another average.\n")
    try:
        from pm_llm.report.page import FIGURES, PAGE, write_report
    except ImportError as error:
        raise PmLlmError(f'the page needs matplotlib: pip install "pm_llm[report]" ({error})') from error
    run_dir = RunDir.open(given.run_dir[0])
    with run_dir.locked() if own else nullcontext():
        if own:
            run_dir.forget(lambda name: name == PAGE or name.startswith(f"{FIGURES}/"))
        page = write_report(runs, out, given.joint)
        if own:
            run_dir.record([page, *(page.parent / FIGURES).iterdir()])
    print(f"page: {page}")
    return 0


def push(given: argparse.Namespace) -> int:
    """`pm-llm push`: the adapter and its card."""
    from pm_llm.report.hub import push_run

    print(push_run(given.run_dir, given.repo_id, given.private, given.dry_run, given.base_model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
