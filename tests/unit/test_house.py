"""The house: who may import whom, who alone may touch what is dangerous, and how large a thing may grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TRAINER = Path(__file__).parents[2] / "trainer"
CONCEPTS = TRAINER.parent / "docs/concepts.md"
FILES = sorted(TRAINER.rglob("*.py"))

# Imports point only down this list. A package is one floor; inside it they must not go in circles.
FLOORS = [
    "__main__",
    "cli",
    "sweep",
    "reports",
    "dealing",
    "plan",
    "doctor",
    "launcher",
    "worker",
    "compose",
    "build",
    "leaves",
    "sites",
    "weighing",
    "numerics",
    "profile",
    "checks",
    "fit",
    "round",
    "midround",
    "micro_batch",
    "state",
    "speed",
    "figures",
    "evaluate",
    "personal",
    "local",
    "contact",
    "run",
    "folder",
    "checkpoints",
    "algorithms",
    "wires",
    "gradients",
    "codecs",
    "work",
    "shares",
    "comm",
    "cohort",
    "tasks",
    "preprocess",
    "weights",
    "models",
    "data",
    "metrics",
    "launch",
    "topology",
    "devices",
    "place",
    "optim",
    "ema",
    "flat",
    "hardware",
    "clock",
    "randomness",
    "compiling",
    "endings",
    "room",
    "arguments",
    "config",
]

# What is dangerous, and the floors that own it.
OWNERS = {
    "torch.distributed": {"topology", "comm", "gradients", "launch"},
    "torch.nn.parallel": {"local", "gradients"},
    "hydra": {"compose", "leaves", "sweep"},
    "omegaconf": {"compose", "sweep"},
    "safetensors": {"checkpoints", "data", "weights"},
    "subprocess": {"launch"},
    "signal": {"__main__", "launcher", "launch"},
    "random": set(),
    "pickle": set(),
}

# Calls that undo what the house is built for, wherever they stand.
FORBIDDEN_CALLS = {
    "torch.save": "state on disk is safetensors and JSON",
    "torch.load": "it unpickles",
    "torch.manual_seed": "it costs 300 microseconds: seed the default generators",
    "torch.cuda.manual_seed_all": "seed the default generators",
    "np.random.seed": "random streams are derived, not global",
    "print_exc": "a failure is said once, by the worker",
}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def floor_of(module: str) -> str:
    """The floor of `trainer.data.loader`: data."""
    return module.split(".")[1]


def module_of(path: Path) -> str:
    """trainer/data/loader.py is trainer.data.loader; a package's __init__ is the package."""
    parts = path.relative_to(TRAINER.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it; a name from a package is its module where there is one."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: write imports in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def ours(path: Path) -> set[str]:
    """The modules of the trainer that a file imports."""
    return {name for name in imports(path) if name.startswith("trainer.")}


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def named(path: Path) -> str:
    return str(path.relative_to(TRAINER))


files = pytest.mark.parametrize("path", FILES, ids=named)


def test_the_list_names_every_floor_once():
    there = {floor_of(module) for module in MODULES if module != "trainer"}
    assert set(FLOORS) == there
    assert len(FLOORS) == len(there)


def test_the_documentation_has_the_same_list():
    listing = CONCEPTS.read_text().split("```\ntrainer/\n")[1].split("```")[0]
    listed = [word.removesuffix(".py").removesuffix("/") for word in listing.split() if word.endswith((".py", "/"))]
    assert listed == FLOORS


@files
def test_imports_point_down(path: Path):
    module = module_of(path)
    if module == "trainer":
        assert not ours(path)
        return
    mine = FLOORS.index(floor_of(module))
    up = [name for name in ours(path) if FLOORS.index(floor_of(name)) < mine]
    assert not up, f"{named(path)} imports {up}, which are above it"


def test_imports_inside_a_floor_do_not_go_in_circles():
    """Kahn's sorting comes to an end; a package's __init__ is on top of its own modules."""
    waiting = {module: ours(path) - {module} for module, path in MODULES.items()}
    while free := [module for module, needs in waiting.items() if not needs & set(waiting)]:
        for module in free:
            del waiting[module]
    assert not waiting


@files
def test_what_is_dangerous_is_touched_by_its_owners_alone(path: Path):
    module = module_of(path)
    for name in imports(path):
        owned = max((package for package in OWNERS if is_within(name, package)), key=len, default=None)
        if owned is not None:
            assert module != "trainer" and floor_of(module) in OWNERS[owned], f"{named(path)} imports {name}"


def calls(path: Path) -> Iterator[str]:
    """What a file calls, as it is written there: `torch.load`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@files
def test_nothing_forbidden_is_called(path: Path):
    found = {name: why for name, why in FORBIDDEN_CALLS.items() if any(c.endswith(name) for c in calls(path))}
    if named(path) == "weights.py":
        assert ast.unparse(tree_of(path)).count("torch.load(path, 'cpu', weights_only=True)") == 1
        assert [call for call in calls(path) if call.endswith("load")] == ["torch.load"]
        found.pop("torch.load")
    assert not found


def test_one_file_instantiates():
    users = {module for module, path in MODULES.items() if "hydra.utils.instantiate" in calls(path)}
    assert users == {"trainer.leaves"}


def test_parameters_are_bound_to_the_vectors_in_one_place():
    """`parameter.data = ...` after DistributedDataParallel has wrapped the module breaks the run without a word."""
    binding = {
        named(path)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Attribute) and target.attr == "data" for target in node.targets)
        and ast.unparse(node.targets[0]) != "self.data"
    }
    assert binding == {"flat.py"}


@files
def test_files_are_small(path: Path):
    assert len(path.read_text().splitlines()) <= 300


def function_sizes(path: Path) -> Iterator[tuple[str, int]]:
    """The functions of a file with their numbers of lines."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@files
def test_functions_fit_on_a_screen(path: Path):
    """None over 50 lines, docstring counted; most are under 20."""
    assert not {name: size for name, size in function_sizes(path) if size > 50}


@files
def test_every_file_says_what_it_is(path: Path):
    """A docstring, whose first line is a sentence or ends with a colon; types are read lazily where there are any."""
    tree = tree_of(path)
    said = ast.get_docstring(tree)
    assert said, f"{named(path)} has no docstring"
    has_functions = any(isinstance(node, ast.FunctionDef) and node.args.args for node in ast.walk(tree))
    lazily = "from __future__ import annotations" in path.read_text()
    assert lazily or not has_functions


def test_most_functions_are_short():
    """The median is at most 10 lines."""
    sizes = sorted(size for path in FILES for _, size in function_sizes(path))
    assert sizes[len(sizes) // 2] <= 10
    assert sum(size < 20 for size in sizes) > 0.8 * len(sizes)
