"""The arrows of the house: rloop_cli -> a stage -> its own room and stages.core, and no other way."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stages

ROOT = Path(stages.__file__).parents[1]
TREES = ("stages", "rloop_cli", "tests", "benchmarks", "experiments", "examples")
DOOR = sorted((ROOT / "rloop_cli").glob("*.py"))
CHECK = sorted((ROOT / "rloop_cli" / "check").glob("*.py"))
STAGES = {name: sorted([*(ROOT / "stages" / name).rglob("*.py"), *(ROOT / "stages").glob(f"{name}.py")])
          for name in stages.STAGES}  # fmt: skip
ROOMS = [(stage, path) for stage, paths in STAGES.items() for path in paths]
CORE = sorted((ROOT / "stages" / "core").rglob("*.py"))
CORE_ROOMS = {"policy": (), "grading": ("policy",), "drawing": ("policy", "grading"), "study": ()}  # and what each uses
MAP = {"stages", "stages.STAGES", "stages.load"}
PURE = ("records", "jsonl", "study.metrics", "grading.verifier", "grading.rewards", "grading.rewards.worker")
OF_THEIR_OWN = {f"stages.core.grading.{name}" for name in ("verifier.algebra", "rewards.worker")}  # processes
HEAVY = (
    *("torch", "vllm", "transformers", "trl", "peft", "accelerate"),
    *("datasets", "numpy", "matplotlib", "pandas", "scipy"),
)


def name(path):
    return str(path.relative_to(ROOT))


def module_name(path):
    """The dotted name by which the file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path, types=True):
    """Every module that the file imports anywhere, `from a import b` as both a and a.b; those for types if `types`."""
    tree, modules = ast.parse(path.read_text()), set()
    if not types:
        tree.body = [node for node in tree.body if ast.unparse(getattr(node, "test", node)) != "TYPE_CHECKING"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def named_kinds(path):
    """(name, meaning) of every class of the file and every alias of a type; two aliases of one type mean the same."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            yield node.name, f"{name(path)}:{node.lineno}"
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, ast.unparse(node.value)


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
    assert not {
        m for m in ours - MAP if m != "stages.core" and not within(m, "stages.core.errors", "stages.core.options")
    }


@pytest.mark.parametrize("path", CHECK, ids=name)
def test_the_check_knows_the_map_of_the_stages_and_the_core_but_no_stage(path):
    ours = {module for module in imported(path) if within(module, "stages")}
    assert not {module for module in ours - MAP if not within(module, "stages.core")}


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


def core_room(module):
    """The room of the core that a module is in, or the module itself."""
    part = module.removeprefix("stages.core.").partition(".")[0]
    return f"stages.core.{part}"


@pytest.mark.parametrize("path", CORE, ids=name)
def test_rooms_of_the_core_use_what_lies_below_them_and_no_arrow_runs_back(path):
    room = core_room(module_name(path)).rpartition(".")[2]
    modules = {module for module in imported(path, types=False) if within(module, "stages.core")}
    others = {core_room(module).rpartition(".")[2] for module in modules} & {*CORE_ROOMS}
    assert others <= {room, *CORE_ROOMS.get(room, ())}


def direct_users():
    """For each module of the core, who imports it: stages, the door, rooms and modules of the core."""
    users = {
        module_name(path): set() for path in CORE if path.parent != ROOT / "stages" / "core" or path.stem != "__init__"
    }
    groups = [*STAGES.items(), ("door", [*DOOR, *CHECK]), *((core_room(module_name(path)), [path]) for path in CORE)]
    for user, paths in groups:
        for module in set().union(*map(imported, paths)) & users.keys():
            users[module].add(user)
    return users


def test_every_room_of_the_core_has_two_direct_users():
    """A room, or a module in none, that only one stage imports belongs to that stage."""
    by_room = {}
    for module, users in direct_users().items():
        by_room.setdefault(core_room(module), set()).update(users & {*STAGES, "door"})
    assert not {room: users for room, users in by_room.items() if len(users) < 2}


def test_a_module_in_a_room_of_the_core_serves_its_room_or_two_others():
    alone = {
        module: users
        for module, users in direct_users().items()
        if core_room(module) not in users and len(users) < 2 and module not in OF_THEIR_OWN
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
    assert rooms - {"core"} == set(stages.STAGES)
    mapped = [line.split()[0] for line in stages.__doc__.splitlines() if "->" in line]
    assert mapped == list(stages.STAGES)
    assert not [stage for stage in STAGES if not (ROOT / "tests" / f"test_{stage}.py").is_file()]


@pytest.mark.parametrize("path", [*DOOR, *CHECK, *(path for _, path in ROOMS), *CORE], ids=name)
def test_every_function_is_typed_and_what_is_public_and_not_trivial_says_what_it_does(path):
    for node in functions(path):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        untyped = [given.arg for given in given if given.annotation is None and given.arg not in ("self", "cls")]
        assert not untyped, f"{name(path)}:{node.lineno}: {node.name} does not type {', '.join(untyped)}"
        typed = node.returns is not None or node.name == "__init__"
        assert typed, f"{name(path)}:{node.lineno}: {node.name} has no return type"
    for node in to_be_described(path):
        assert ast.get_docstring(node), f"{name(path)}:{node.lineno}: {node.name} has no docstring"


def test_a_class_name_means_one_thing_in_the_whole_tree():
    meanings = {}
    for path in (path for tree in TREES for path in (ROOT / tree).rglob("*.py")):
        for kind, meaning in named_kinds(path):
            if re.fullmatch(r"[A-Z]\w*[a-z]\w*", kind) and kind != "Options":
                meanings.setdefault(kind, set()).add(meaning)
    assert len(meanings) > 200
    assert not {kind: sorted(several) for kind, several in meanings.items() if len(several) > 1}
