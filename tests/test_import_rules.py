"""The shape of the code, read from its syntax trees: who may import whom, and what must not happen at import.

A new module of `beacon` gets its place in `LAYERS`; a new file of Triton kernels its name in `KERNEL_FILES`.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BEACON = ROOT / "beacon"
KERNELS = ROOT / "kernels" / "beacon_kernels"

# Top-level modules and packages of `beacon`, highest first. Code may import from lines below its own and from inside
# its own package, not from its neighbours on the line. `__init__` is `import beacon` itself, the public API.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("training",),
    ("evaluation",),
    ("__init__",),
    ("saving", "cache_files"),
    ("wrapping",),
    ("model",),
    ("columns", "generation", "loss", "stock"),
    ("decoding",),
    ("decoder",),
    ("reading",),
    ("text", "documents", "segments", "recording"),
    ("cache", "slot_passes"),
    ("slots",),
    ("modules",),
    ("identity", "weights"),
    ("attention", "families", "memory"),
    ("policies", "retrieval"),
    ("plan",),
    ("config",),
    ("assets",),
)
KERNEL_USERS = {"attention"}  # modules of `beacon` that may import `beacon_kernels`
KERNEL_FILES = {
    "forward.py",
    "backward.py",
    "backward_dkv.py",
    "decode.py",
}  # files of `beacon_kernels` that import triton at the top
KERNEL_IMPORTS = {"beacon_kernels", "torch", "triton"}  # all that `beacon_kernels` may import, beside the stdlib
PRINTING = {"__main__", "cli"}  # modules of `beacon` that may print
# Optional or slow to import: `beacon` imports them inside functions only.
LAZY = {"accelerate", "bm25s", "datasets", "flash_attn", "lm_eval", "matplotlib", "peft", "triton"}

RANK = {name: rank for rank, line in enumerate(reversed(LAYERS)) for name in line}


@dataclass(frozen=True)
class Import:
    """One imported module: its dotted name, its line, and whether it is put off to a call (or to the type checker)."""

    module: str
    line: int
    lazy: bool


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def dotted_name(path: Path, package: Path) -> str:
    parts = (package.name, *path.relative_to(package).with_suffix("").parts)
    return ".".join(parts)


def top_module(dotted: str) -> str:
    """The name in `LAYERS` that `dotted` belongs to, as in `beacon.attention.sdpa` -> `attention`."""
    parts = dotted.split(".")
    if parts[-1] == "__main__":
        return "__main__"  # of a package, too: what `python -m` runs stands above everything
    return parts[1] if len(parts) > 1 else "__init__"


def imports(tree: ast.AST, dotted: str) -> Iterator[Import]:
    """Every import in a file, relative ones resolved; `from beacon import x` is `beacon.x` where x is a module."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            package = dotted.split(".")[: -node.level] if node.level else []  # `__init__` stands for its own file here
            base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                is_module = base == "beacon" and alias.name in RANK
                yield Import(f"{base}.{alias.name}" if is_module else base, node.lineno, lazy)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, lazy)
        else:
            lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, lazy)

    return visit(tree, False)


def upward_imports(tree: ast.AST, dotted: str) -> list[str]:
    """Imports of a module of `beacon` that do not point downwards, lazy ones included."""
    own = top_module(dotted)
    found = []
    for item in imports(tree, dotted):
        target = top_module(item.module)
        if item.module.split(".")[0] == "beacon" and target != own and RANK.get(target, 99) >= RANK[own]:
            found.append(f"line {item.line}: {own} must not import {item.module} (see LAYERS)")
        if item.module.split(".")[0] == "beacon_kernels" and own not in KERNEL_USERS:
            found.append(f"line {item.line}: {own} must not import {item.module} (see KERNEL_USERS)")
    return found


def eager_imports(tree: ast.AST, dotted: str) -> list[str]:
    """Imports of `LAZY` packages that run when the module is imported."""
    return [
        f"line {item.line}: import {item.module} inside the function that needs it"
        for item in imports(tree, dotted)
        if not item.lazy and item.module.split(".")[0] in LAZY
    ]


def foreign_imports(tree: ast.AST, dotted: str) -> list[str]:
    """Imports that `beacon_kernels` must not have."""
    allowed = KERNEL_IMPORTS | sys.stdlib_module_names
    return [
        f"line {item.line}: beacon_kernels must not import {item.module} (see KERNEL_IMPORTS)"
        for item in imports(tree, dotted)
        if item.module.split(".")[0] not in allowed
    ]


def print_calls(tree: ast.AST) -> list[str]:
    return [
        f"line {node.lineno}: print() in the library; use a logger or return the text"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def report(path: Path, found: list[str]) -> list[str]:
    return [f"{path.relative_to(ROOT)} {line}" for line in dict.fromkeys(found)]


def test_every_module_has_a_layer():
    names = {top_module(dotted_name(path, BEACON)) for path in python_files(BEACON)}
    unknown = sorted(names - RANK.keys())
    assert not unknown, f"give {', '.join(unknown)} a line in LAYERS of {Path(__file__).name}"
    assert "__init__" in names, "no beacon/__init__.py found: the tests of this file would check nothing"


def test_imports_point_downwards():
    found = []
    for path in python_files(BEACON):
        dotted = dotted_name(path, BEACON)
        if top_module(dotted) in RANK:
            found += report(path, upward_imports(parse(path), dotted))
    assert not found, "\n".join(found)


def test_optional_packages_are_imported_inside_functions():
    found = []
    for package in (BEACON, KERNELS):
        for path in python_files(package):
            if not (package == KERNELS and path.name in KERNEL_FILES):
                found += report(path, eager_imports(parse(path), dotted_name(path, package)))
    assert not found, "\n".join(found)


def test_kernels_stand_alone():
    found = []
    for path in python_files(KERNELS):
        found += report(path, foreign_imports(parse(path), dotted_name(path, KERNELS)))
    assert not found, "\n".join(found)


def test_library_does_not_print():
    found = []
    for package in (BEACON, KERNELS):
        for path in python_files(package):
            if not (package == BEACON and top_module(dotted_name(path, BEACON)) in PRINTING):
                found += report(path, print_calls(parse(path)))
    assert not found, "\n".join(found)


def test_no_file_shadows_another_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the PyPI package `kernels`"
    folders = ("beacon", "kernels", "benchmarks", "tests", "examples")
    named_triton = [path for folder in folders for path in python_files(ROOT / folder) if path.name == "triton.py"]
    assert not named_triton, f"{named_triton} would shadow triton when run as a script"


@pytest.mark.parametrize(
    "dotted, source, count",
    [
        ("beacon.config", "from beacon.plan import Plan", 1),
        ("beacon.config", "from .plan import Plan", 1),
        ("beacon.config", "from . import plan", 1),
        ("beacon.config", "def f():\n    import beacon.model", 1),
        ("beacon.config", "import beacon", 1),
        ("beacon.config", "from beacon.brand_new import x", 1),
        ("beacon.cache", "from beacon.saving import save_adapter", 1),
        ("beacon.attention.sdpa", "from ..model import x", 1),
        ("beacon.attention.__init__", "from .sdpa import x\nfrom .. import model", 1),
        ("beacon.model", "import beacon_kernels", 1),
        ("beacon.attention.sdpa", "from .reference import x\nfrom ..plan import y\nimport beacon_kernels.testing", 0),
        ("beacon.cli", "import beacon\nfrom beacon import evaluation, wrap\nimport torch", 0),
    ],
)
def test_upward_imports_are_found(dotted, source, count):
    assert len(upward_imports(ast.parse(source), dotted)) == count


@pytest.mark.parametrize(
    "source, count",
    [
        ("import triton.language as tl", 1),
        ("try:\n    import triton\nexcept ImportError:\n    triton = None", 1),
        ("class A:\n    from matplotlib import pyplot", 1),
        ("def f():\n    import triton", 0),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton", 0),
    ],
)
def test_eager_imports_are_found(source, count):
    assert len(eager_imports(ast.parse(source), "beacon.attention.sdpa")) == count


def test_foreign_imports_and_prints_are_found():
    source = "import math, torch\nimport transformers\nfrom beacon.plan import Plan\nfrom .tiles import x\nprint(1)"
    tree = ast.parse(source)
    assert len(foreign_imports(tree, "beacon_kernels.beacon_attention.api")) == 2
    assert len(print_calls(tree)) == 1


def run_fresh(code: str) -> str:
    """The output of `code` in a new interpreter that sees this tree's packages."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_module_imports_without_triton():
    modules = [
        dotted_name(path, package).removesuffix(".__init__")
        for package in (BEACON, KERNELS)
        for path in python_files(package)
        if path.name != "__main__.py" and not (package == KERNELS and path.name in KERNEL_FILES)
    ]
    run_fresh(f"""
import importlib, sys
sys.modules["triton"] = None
for name in {modules}:
    importlib.import_module(name)
""")


def test_importing_beacon_brings_in_nothing_heavy():
    code = f"""
import sys
import transformers.cache_utils, transformers.generation, transformers.modeling_utils
import transformers.models.llama.modeling_llama
before = set(sys.modules)  # what transformers imports by itself does not count
import beacon
import beacon_kernels
print(sorted({LAZY} & {{name.split(".")[0] for name in set(sys.modules) - before}}))
"""
    assert run_fresh(code).strip() == "[]"
