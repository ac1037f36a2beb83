"""Imports flow one way, from room to room and from module to module."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A room imports those before it. ``load`` stands by itself: measuring needs it.
ROOMS = (
    *("compute", "kernels", "head", "sampling", "folder", "tuning"),
    *("integration", "load"),
    *("evaluation", "convert", "benchmarking", "commands"),
)


def imports(file: Path) -> set[str]:
    """Modules of this package that a file imports as it is imported itself; those that
    only type checkers see, or functions, do not count."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    name = parts if parts[0] == "mlx_flashhead" else ("mlx_flashhead", *parts)
    package = name if file.name == "__init__.py" else name[:-1]
    package = package[:-1] if package[-1] == "__init__" else package
    found = set()
    for node in ast.parse(file.read_text()).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        base = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            base = package[: len(package) - node.level + 1] + base
        if base[:1] != ("mlx_flashhead",):
            continue
        found.add(".".join(base))
        found |= {".".join((*base, alias.name)) for alias in node.names}
    return found


def modules() -> dict[str, set[str]]:
    files = [*(ROOT / "mlx_flashhead").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
    graph = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = parts if parts[0] == "mlx_flashhead" else ("mlx_flashhead", *parts)
        graph[".".join(p for p in name if p != "__init__")] = imports(file)
    return {name: used & graph.keys() - {name} for name, used in graph.items()}


def room(module: str) -> str:
    first = (*module.split("."), "")[1]
    return first if first in ROOMS else "commands"


def test_no_module_imports_itself_by_a_detour():
    graph = modules()
    assert len(graph) > 80 and sum(map(len, graph.values())) > 200
    # A package re-exports what its modules define: that is no detour.
    inner = {
        name: {m for m in used if not name.startswith(f"{m}.")}
        for name, used in graph.items()
    }
    tuple(TopologicalSorter(inner).static_order())


def test_rooms_are_in_order():
    for name, used in modules().items():
        if name == "mlx_flashhead":
            continue  # what the package exports
        for other in used - {"mlx_flashhead"}:
            assert ROOMS.index(room(other)) <= ROOMS.index(room(name)) or (
                other == "mlx_flashhead.cli"  # what commands and their work share
            ), f"{name} imports {other}"
