"""The architecture as a test: imports point one way, the pure part knows no torch, and importing does nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "seqmesh"
PURE = ["masks", "layouts", "load", "segments", "filling", "balance", "schedule", "heads", "traffic", "kernels.tiles"]
TORCH = ["mesh", "exchange", "merge", "kernels", "sharding", "calls", "ring", "ulysses", "compiled", "unified_attention"]
TRAINING = ["data", "loss", "integrations", "parallel"]
PROGRAMS = ["train", "bench", "verify", "planner", "picture", "cli", "__main__"]
LAYERS = [PURE, TORCH, TRAINING, PROGRAMS]
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py" or path.parent != ROOT)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer_of(module: str) -> int:
    for number, names in enumerate(LAYERS):
        if module in names:
            return number
    for number, names in enumerate(LAYERS):
        if module.split(".")[0] in names:
            return number
    raise AssertionError(f"seqmesh.{module} is in no layer: add it to tests/test_layers.py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "seqmesh":
                found |= {f"seqmesh.{alias.name}" for alias in node.names if (ROOT / f"{alias.name}.py").exists()}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_its_own_layer_and_those_below(path: Path) -> None:
    mine = layer_of(module_of(path))
    for name in imports(path):
        if name.startswith("seqmesh."):
            assert layer_of(name.removeprefix("seqmesh.")) <= mine, f"{module_of(path)} imports {name} from above"
        if mine == 0:
            assert name.split(".")[0] not in ("torch", "transformers"), f"{module_of(path)} is pure but imports {name}"
        if mine <= 1:
            assert name.split(".")[0] not in ("transformers", "rich", "typer", "pydantic", "matplotlib")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_importing_a_file_reads_no_environment_and_asks_no_device(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If):
            continue
        text = ast.unparse(node)
        for forbidden in ("os.environ", "getenv(", "cuda.is_available", "device_count(", "print("):
            assert forbidden not in text, f"{module_of(path)} runs {text!r} when imported"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_opens_with_what_it_is_and_stays_short(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{module_of(path)} has no docstring"
    assert text.count("\n") <= 400
