"""`pm-llm export`: a run's result for other programs."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "export",
        help="write a run's adapter, the merged model, or a GGUF file",
        description="Write a run's result for other programs: a plain PEFT adapter, the whole model with the adapter "
        "in its weights, or a LoRA file for llama.cpp. It is loaded again and compared.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--as", dest="kind", required=True, metavar="KIND", help="adapter, model or gguf")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for it; must not exist")
    parser.add_argument("--dtype", help="of the weights: float32, bfloat16 or float16 (default: as they are)")
    parser.add_argument("--base-model", metavar="USER/NAME", help="the base model's id that an adapter is to name")
    parser.set_defaults(call=call)


def call(given: argparse.Namespace) -> int:
    """`pm-llm export`: what was written, and how near it is."""
    from pm_llm.report.export import export
    from pm_llm.system.quiet import quiet_libraries

    quiet_libraries()
    print(export(given.run_dir, given.kind, given.out, given.dtype, given.base_model))
    return 0
