"""What the site makes of the pages: reference pages from the code, the tutorial from its notebook, links to sources.

mkdocs calls the functions by their names (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

DOCS = Path(__file__).parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]*)(#[^)]*)?\)")  # a link to a file that is no page


def keys_page() -> str:
    """Every key of a configuration."""
    from pm_llm.config import flags

    rows = "\n".join(f"| `{key}` | {text.replace('|', chr(92) + '|')} |" for key, text in flags())
    head = "# Keys\n\nOf a YAML file given as `--config`, or flags (`--lora.r 4`).\n\n| key | meaning |\n|---|---|\n"
    return f"{head}{rows}\n"


def commands_page() -> str:
    """What every command says of itself."""
    from pm_llm.cli import make_parser

    os.environ["COLUMNS"] = "100"
    parts = ["# Commands"]
    for action in make_parser()._actions:
        for name, parser in (getattr(action, "choices", None) or {}).items():
            shown = parser.format_help().partition("\nkeys:\n")[0].rstrip()
            parts.append(f"## pm-llm {name}\n\n```text\n{shown}\n```")
    return "\n\n".join(parts) + "\n"


def tutorial_page() -> str:
    """The notebook's cells, with what they printed."""
    parts = []
    for cell in json.loads((DOCS / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            said = "".join(output.get("text") or output.get("data", {}).get("text/plain", []))
            parts += [f"```text\n{said.rstrip()}\n```"] if said.strip() else []
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    """The public names."""
    import pm_llm

    names = [f"::: {where}.{name}" for name, where in pm_llm._PUBLIC.items()]
    return "# Python\n\nAll of these are imported from `pm_llm`.\n\n" + "\n\n".join(names) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "keys.md": keys_page,
    "commands.md": commands_page,
    "tutorial.md": tutorial_page,
    "api.md": api_page,
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link to a file that is no page becomes its path. Raises PluginError where there is no such file."""

    def shown(link: re.Match[str]) -> str:
        if not (DOCS.parent / link[2]).exists():
            raise PluginError(f"{page.file.src_path} links to {link[2]}, which is not there.")
        name = link[1].strip("`")
        return f"`{link[2]}`" if name in link[2] else f"{link[1]} (`{link[2]}`)"

    return OUTSIDE.sub(shown, markdown)
