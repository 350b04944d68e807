"""The house: no circle of imports, and which rooms may know which."""

from __future__ import annotations

import ast
import re
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


ALGEBRA = ("algebra", "fisher", "merges")


def test_which_rooms_know_which() -> None:
    known = modules()
    for name, path in known.items():
        folder = name.split(".")[1] if name.startswith("pm_llm.") else ""
        rooms = {one.split(".")[1] for one in imports_of(path, known, also_late=True) if one.startswith("pm_llm.")}
        if folder in ("starts", "constraints", "merges"):
            assert not rooms & ({"starts", "constraints", "merges"} - {folder}), name
        if folder in ALGEBRA:
            assert not rooms & {"training", "run", "commands", "report", "sequence", "stage"}, name
        if folder in ("sequence", "stage"):
            assert "algebra" not in rooms, name


def test_files_and_functions_are_short() -> None:
    """Without docstrings. A text or a table may be long; what is read from top to bottom may not."""
    files, functions = {}, {}
    for name, path in modules().items():
        if not name.startswith("pm_llm"):
            continue
        text = path.read_text()
        if len(text.splitlines()) > 400:
            files[name] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                said = ast.get_docstring(node)
                lines = node.end_lineno - node.lineno + 1 - (len(said.splitlines()) if said else 0)
                if lines > 40:
                    functions[f"{name}.{node.name}"] = lines
    assert not files
    assert len(functions) <= 5, functions


def test_the_page_of_the_house_names_what_is_there() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rooms = {path.name for path in (ROOT / "pm_llm").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    for room in rooms:
        assert f"{room}/" in page, room
    block = page.split("```")[1]
    for path in (ROOT / "pm_llm").glob("*/*.py"):
        listed = path.parent.name in ("starts", "constraints", "merges", "commands", "fisher") or path.name[0] == "_"
        assert listed or path.name in block, path.name
    for name in set(re.findall(r"[a-z_]+\.py", block)):
        assert any(path.name == name for path in (ROOT / "pm_llm").rglob("*.py")), name
    for name in re.findall(r"`([A-Z]{4,})`", page):
        assert any(f"\n{name}" in path.read_text() for path in (ROOT / "pm_llm").rglob("*.py")), name
