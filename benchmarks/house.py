"""The house in figures: lines a room, modules, floors and arrows of the core, functions, options.

    python benchmarks/house.py

A floor is a step of the longest way down through the core's imports; an arrow is one module that imports another.
"""

import ast
import statistics
from collections import Counter
from functools import cache
from pathlib import Path

from stages import STAGES, load
from stages.core.options import declared

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "stages").rglob("*.py"), *(ROOT / "rloop_cli").rglob("*.py")])
CORE = "stages.core"


def module_of(path: Path) -> str:
    """The dotted name by which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


@cache
def arrows(module: str) -> frozenset[str]:
    """The modules of this project that a module imports; a package's own `from package import part` is the part."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            named |= parts & MODULES.keys() or {str(node.module)}
    return frozenset(named & MODULES.keys() - {module})


@cache
def floor(module: str) -> int:
    """The floor of a core module: 1 for one that imports none of the core."""
    return 1 + max((floor(below) for below in arrows(module) if below.startswith(CORE)), default=0)


def room(path: Path) -> str:
    """The directory of the core, the stage, or the part of the door that a file is in."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    depth = 3 if parts[:2] == ("stages", "core") and len(parts) > 3 else 2
    return "/".join(parts[:depth]).removesuffix("/__init__")


def num_lines(path: Path) -> int:
    """The lines of a file."""
    return len(path.read_text().splitlines())


def lengths() -> list[int]:
    """The lines of every function and method, from its def to its end."""
    nodes = (node for path in FILES for node in ast.walk(ast.parse(path.read_text())))
    return sorted(node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, ast.FunctionDef))  # type: ignore[operator]


def main() -> None:
    """Print the figures, a line each."""
    lines: Counter[str] = Counter()
    for path in FILES:
        lines[room(path)] += num_lines(path)
    for name, number in lines.items():
        print(f"{name:24}{number:7,}")
    core = [module for module in MODULES if module.startswith(CORE) and module != CORE]
    beside = sorted(path.stem for path in (ROOT / "stages/core").iterdir() if not path.name.startswith("_"))
    functions, tests = lengths(), sum(map(num_lines, (ROOT / "tests").glob("*.py")))
    rows = {
        "lines": f"{sum(lines.values()):,}; tests {tests:,}",
        "core, side by side": f"{len(beside)}: {' '.join(beside)}",
        "core, modules": len(core),
        "core, floors": max(map(floor, core)),
        "arrows": f"{sum(len(arrows(module)) for module in MODULES)} in all, "
        f"{sum(len([m for m in arrows(module) if m.startswith(CORE)]) for module in core)} in the core",
        "functions": f"{len(functions)}: median {statistics.median(functions):g}, "
        f"p90 {functions[9 * len(functions) // 10]}, longest {functions[-1]}",
        "options": sum(len(declared(load(stage).Options)) for stage in STAGES),
    }
    for name, value in rows.items():
        print(f"{name:24}{value}")


if __name__ == "__main__":
    main()
