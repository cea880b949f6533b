"""The architecture as a test: imports point one way and never in a circle.

The pure part knows no torch, and importing does nothing.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast


ROOT = Path(__file__).parent.parent / "seqmesh"
FILES = sorted(ROOT.rglob("*.py"))

PURE = ["masks", "layouts", "schedule"]
"""Data, not code: no torch below the engine."""

ALLOWED: dict[str, list[str]] = {
    "masks": [],
    "layouts": ["masks"],
    "schedule": ["masks", "layouts"],
    "engine": PURE,
    "kernel_table": ["masks", "engine"],
    "notation": ["masks"],
    "processes": [],
    "provenance": [],
    "picture": [*PURE, "notation"],
    "integrations": ["masks", "layouts", "engine"],
    "generate": ["masks", "layouts", "engine", "integrations"],
    "generate.program": ["engine", "generate", "integrations", "processes", "train"],
    "generate.command": ["generate.program", "processes", "train"],
    "parallel": ["masks", "layouts", "engine", "integrations"],
    "train": ["engine", "integrations", "masks", "parallel", "processes", "provenance"],
    "train.memory": ["layouts", "schedule", "planner.inputs"],
    "trace": ["parallel", "processes", "train", "train.memory"],
    "bench": [
        *(*PURE, "seqmesh", "engine", "parallel", "train", "processes", "provenance"),
        *("picture", "planner.inputs", "planner.cost", "trace", "foresee"),
        *("integrations", "generate"),
    ],
    "bench.command": ["bench"],
    "verify": [
        *("masks", "layouts", "notation", "engine"),
        *("integrations", "train", "processes", "provenance"),
    ],
    "planner.inputs": ["masks", "layouts", "train"],
    "planner.cost": [*PURE, "planner.inputs", "train", "train.memory"],
    "planner": ["planner.inputs", "planner.cost"],
    "planner.paper": ["planner.inputs", "planner.cost", "planner"],
    "planner.output": ["planner.inputs", "planner.cost", "planner", "train"],
    "foresee": ["planner.inputs", "planner.cost", "trace", "train"],
    "planner.command": [
        *("planner", "planner.inputs", "planner.cost", "planner.paper", "planner.output"),
        *("train.memory", "trace"),
    ],
    "cli": [
        *("seqmesh", "train", "generate.command", "foresee", "bench.command"),
        *("planner.command", "picture", "verify", "kernel_table"),
    ],
    "seqmesh": ["masks", "layouts", "engine", "kernel_table"],
}
"""Part of the package -> the parts that it may import, besides itself.

"planner" is what lies in none of its folders.
"""

TORCH_FREE = [
    *PURE,
    "planner",
    "notation",
    "picture",
    "provenance",
    "cli",
    "verify.cases",
    "verify.command",
    "bench.command",
    "train.config",
    "train.recipe",
    "train.events",
    "train.evening",
    "train.memory",
]
TORCH_ONLY = ["engine", "processes"]
"""Need torch and nothing else that is not in the standard library."""


def module_of(path: Path) -> str:
    """`planner.cost.step` for seqmesh/planner/cost/step.py; `seqmesh` for the package's own __init__."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    return name or "seqmesh"


def part_of(module: str) -> str:
    """The longest name of ALLOWED that a module lies in."""
    inside = [part for part in ALLOWED if module == part or module.startswith(f"{part}.")]
    assert inside, f"seqmesh.{module} is in no part: add it to ALLOWED"
    return max(inside, key=len)


def is_in(module: str, parts: list[str]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path, *, at_import: bool = False) -> set[str]:
    """Full names of what a file imports, anywhere in it.

    Or only `at_import`: not in functions, not for types.
    """
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if at_import and (isinstance(node, ast.FunctionDef) or for_types):
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path} has a relative import; write it in full"
            # `from package import module` names a module, `from module import name` does not
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                found.add(longer if longer.removeprefix("seqmesh.") in MODULES else node.module)
    return found


def ours(names: set[str]) -> set[str]:
    """Those of seqmesh, as modules."""
    return {name.removeprefix("seqmesh.") for name in names if name.split(".")[0] == "seqmesh"}


def foreign(names: set[str]) -> set[str]:
    """Packages that neither the standard library nor seqmesh has."""
    packages = {name.split(".")[0] for name in names}
    return packages - {"seqmesh"} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_what_its_part_may(module: str) -> None:
    mine = part_of(module)
    for name in ours(imports(MODULES[module])):
        theirs = part_of(name)
        assert theirs == mine or theirs in ALLOWED[mine], (
            f"{module} imports {name}: {mine} may not use {theirs}"
        )


def test_what_may_import_what_has_no_circle_and_no_edge_that_nothing_uses() -> None:
    tuple(TopologicalSorter(ALLOWED).static_order())
    used: dict[str, set[str]] = {part: set() for part in ALLOWED}
    for module, path in MODULES.items():
        mine = part_of(module)
        used[mine] |= {part_of(name) for name in ours(imports(path))} - {mine}
    assert {
        part: set(others) - used[part] for part, others in ALLOWED.items() if set(others) - used[part]
    } == {}


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions count too: they would only hide a circle."""
    graph = {module: ours(imports(path)) - {module} for module, path in MODULES.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", [m for m in MODULES if is_in(m, PURE)] + ["engine.kernels.tiles"])
def test_the_pure_part_needs_only_the_standard_library(module: str) -> None:
    assert foreign(imports(MODULES[module])) <= {"numpy"}  # Mask.dense, on use, for tests and pictures
    assert foreign(imports(MODULES[module], at_import=True)) == set()


@pytest.mark.parametrize("module", [m for m in MODULES if is_in(m, TORCH_FREE)])
def test_the_planner_and_the_command_line_load_no_torch(module: str) -> None:
    slow = {"torch", "transformers", "numpy", "matplotlib", "safetensors"}
    assert not foreign(imports(MODULES[module], at_import=True)) & slow
    for name in ours(imports(MODULES[module], at_import=True)):
        assert name == "seqmesh" or is_in(name, TORCH_FREE) or name in ("train", "integrations", "bench")


def test_the_planner_runs_without_torch() -> None:
    code = (
        "import sys, seqmesh.planner.command, seqmesh.cli;"
        " assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


CONTRACT = """
import seqmesh.engine.attention  # a module of that name must not hide the function
import seqmesh
from seqmesh import layouts, masks
from seqmesh.schedule import ring_schedule
from seqmesh.integrations.transformers import plug_in

assert callable(seqmesh.attention) and callable(seqmesh.Schedule.build) and callable(plug_in)
assert callable(seqmesh.capabilities)
assert callable(seqmesh.SequenceMesh.build) and callable(seqmesh.SequenceMesh.from_device_mesh)
for name in ("full", "causal", "sliding_window", "documents", "prefix_lm", "cross", "Mask", "Band"):
    assert callable(getattr(masks, name)), name
for name in ("contiguous", "zigzag", "striped", "balanced", "auto", "Layout", "Span"):
    assert callable(getattr(layouts, name)), name
"""


def test_the_names_that_other_code_relies_on_are_there() -> None:
    subprocess.run([sys.executable, "-c", CONTRACT], check=True, timeout=60)


@pytest.mark.parametrize("module", [m for m in MODULES if is_in(m, TORCH_ONLY)])
def test_the_engine_needs_torch_alone(module: str) -> None:
    # PyTorch's CUDA builds bring Triton; this file is loaded on CUDA only
    triton = {"triton"} if module == "engine.fused_merge" else set()
    assert foreign(imports(MODULES[module])) <= {"torch", *triton}


def test_no_class_name_means_two_things() -> None:
    homes: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name.lstrip("_"), []).append(module)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


@pytest.mark.parametrize("module", MODULES)
def test_importing_a_file_reads_no_environment_and_asks_no_device(module: str) -> None:
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If):
            continue
        text = ast.unparse(node)
        for forbidden in ("os.environ", "getenv(", "cuda.is_available", "device_count(", "print("):
            assert forbidden not in text, f"{module} runs {text!r} when imported"


@pytest.mark.parametrize("module", MODULES)
def test_a_file_opens_with_what_it_is_and_stays_short(module: str) -> None:
    text = MODULES[module].read_text()
    assert ast.get_docstring(ast.parse(text)), f"{module} has no docstring"
    assert text.count("\n") <= 400
