"""The command line, `pm-llm COMMAND`. Heavy imports wait for the commands."""

from __future__ import annotations

import argparse
import importlib
import io
import re
import sys
from collections.abc import Sequence

from pm_llm import __version__
from pm_llm.commands import COMMANDS
from pm_llm.errors import PmLlmError, first_line, nobody_listens
from pm_llm.system.quiet import quiet_notices

NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def make_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="pm-llm",
        description="Fine-tune one language model on task after task and forget little; out comes one PEFT adapter.",
    )
    parser.add_argument("--version", action="version", version=f"pm-llm {__version__}")
    parser.set_defaults(keys=False)  # whether keys of the configuration are flags of the command
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"pm_llm.commands.{name}").add(commands)
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
    given.rest = rest
    if rest and not given.keys:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    quiet_notices()
    try:
        found: int = given.call(given)
        return found
    except PmLlmError as error:
        print(f"pm-llm: error: {error}", file=sys.stderr)
        return error.status
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


if __name__ == "__main__":
    sys.exit(main())
