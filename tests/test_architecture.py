"""The house: no circle of imports, and which rooms may know which."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

FOLDERS = ("pm_llm", "benchmarks", "recipes")


def modules() -> dict[str, Path]:
    found = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports_of(path: Path, known: dict[str, Path], also_late: bool = False) -> set[str]:
    """The project's modules that a module imports when it is imported; with `also_late` those in functions, too."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if also_late else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known.keys()


def test_no_circle_of_imports() -> None:
    known = modules()
    graph = {name: imports_of(path, known) - {name} for name, path in known.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(known)  # or it raises CycleError with the circle
