"""The arrows of the house: rloop_cli -> a stage -> its own room and stages.core, and no other way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stages

ROOT = Path(stages.__file__).parents[1]
DOOR = sorted((ROOT / "rloop_cli").glob("*.py"))
CHECK = "check"  # a room, but no stage of the pipeline: the door hands it the graph
STAGES = {name: sorted([*(ROOT / "stages" / name).rglob("*.py"), *(ROOT / "stages").glob(f"{name}.py")])
          for name in (*stages.STAGES, CHECK)}  # fmt: skip
ROOMS = [(stage, path) for stage, paths in STAGES.items() for path in paths]
CORE = sorted((ROOT / "stages" / "core").rglob("*.py"))
PURE = ("records", "jsonl", "study.metrics", "grading.verifier", "grading.rewards", "grading.rewards.worker")
HEAVY = (
    *("torch", "vllm", "transformers", "trl", "peft", "accelerate"),
    *("datasets", "numpy", "matplotlib", "pandas", "scipy"),
)


def name(path):
    return str(path.relative_to(ROOT))


def module_name(path):
    """The dotted name by which the file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path):
    """Every module that the file imports anywhere, `from a import b` as both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module, *packages):
    return any(module == package or module.startswith(package + ".") for package in packages)


def functions(path):
    """Every function and method, those inside of functions included."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def is_trivial(method):
    """Whether a method of a class that has a docstring needs none of its own."""
    length = method.end_lineno - method.body[0].lineno + 1
    return length <= 3 or any("property" in ast.unparse(decorator) for decorator in method.decorator_list)


def to_be_described(path):
    """The public classes and functions of the module, and the public methods that are not trivial."""
    shown = [node for node in ast.parse(path.read_text()).body if not getattr(node, "name", "_").startswith("_")]
    methods = [
        node
        for owner in shown
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not is_trivial(node)
    ]
    return shown + methods


@pytest.mark.parametrize("path", DOOR, ids=name)
def test_the_door_knows_the_map_of_the_stages_the_errors_and_the_options_alone(path):
    ours = {module for module in imported(path) if within(module, "stages")}
    if path.stem == "imports":  # what a process imports ahead of many commands, and nothing else does
        assert not [other for other in [*DOOR, *CORE, *(p for _, p in ROOMS)] if "rloop_cli.imports" in imported(other)]
        return
    own = ("stages.check",) if path.stem in ("check", "graph") else ()
    assert ours <= {"stages", "stages.STAGES", "stages.load", "stages.core", "stages.core.options"} | {
        m for m in ours if within(m, "stages.core.errors", "stages.core.options", *own)
    }


@pytest.mark.parametrize(("stage", "path"), ROOMS, ids=lambda value: value if isinstance(value, str) else value.stem)
def test_a_stage_imports_its_own_room_and_the_core_but_no_stage_and_nothing_of_the_door(stage, path):
    modules = imported(path)
    ours = {module for module in modules if within(module, "stages", "rloop_cli")}
    assert all(module == "stages.core" or within(module, "stages.core", f"stages.{stage}") for module in ours)
    assert not {module for module in modules if within(module, "typer", "click", "dvc")}


@pytest.mark.parametrize("path", CORE, ids=name)
def test_the_core_knows_neither_a_stage_nor_the_command_line_nor_dvc(path):
    modules = imported(path)
    ours = {module for module in modules if within(module, "stages", "rloop_cli")}
    assert all(within(module, "stages.core") for module in ours)
    assert not {module for module in modules if within(module, "typer", "click", "dvc")}


def test_every_module_of_the_core_has_two_users():
    """A module that one stage alone uses, itself or by way of the core, belongs in that stage's room."""
    core = {module_name(path): {m for m in imported(path) if within(m, "stages.core")} for path in CORE}
    used = {stage: set().union(*(imported(path) for path in paths)) for stage, paths in STAGES.items()}
    for modules in used.values():
        for _ in core:  # whatever is reached through other modules of the core is used, too
            modules |= set().union(*(found for module, found in core.items() if module in modules))
    door = set().union(*map(imported, DOOR))
    alone = {
        module: users
        for module in core
        if module != "stages.core"
        and not within(module, "stages.core.grading.verifier", "stages.core.grading.rewards.worker")
        and len(users := [stage for stage in used if module in used[stage]]) + (module in door) < 2
    }
    assert not alone


def loaded_by(statement):
    """The top-level modules that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_pure_part_of_the_core_loads_no_torch():
    loaded = loaded_by("import " + ", ".join(f"stages.core.{module}" for module in PURE))
    assert not loaded & set(HEAVY)


def test_the_command_line_with_every_stage_loads_no_heavy_library():
    loaded = loaded_by("import rloop_cli.app")
    assert "typer" in loaded
    assert not loaded & set(HEAVY)


def test_a_stage_is_a_room_a_line_of_the_map_and_a_test_file():
    rooms = {path.stem for path in (ROOT / "stages").iterdir() if not path.name.startswith(("_", "."))}
    assert rooms - {"core", CHECK} == set(stages.STAGES)
    mapped = [line.split()[0] for line in stages.__doc__.splitlines() if "->" in line]
    assert mapped == list(stages.STAGES)
    assert not [stage for stage in STAGES if not (ROOT / "tests" / f"test_{stage}.py").is_file()]


@pytest.mark.parametrize("path", [*DOOR, *(path for _, path in ROOMS), *CORE], ids=name)
def test_every_function_is_typed_and_what_is_public_and_not_trivial_says_what_it_does(path):
    for node in functions(path):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        untyped = [given.arg for given in given if given.annotation is None and given.arg not in ("self", "cls")]
        assert not untyped, f"{name(path)}:{node.lineno}: {node.name} does not type {', '.join(untyped)}"
        typed = node.returns is not None or node.name == "__init__"
        assert typed, f"{name(path)}:{node.lineno}: {node.name} has no return type"
    for node in to_be_described(path):
        assert ast.get_docstring(node), f"{name(path)}:{node.lineno}: {node.name} has no docstring"
