"""The limits that the tree keeps: sizes, and what may be loaded where (the rest is import-linter's)."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "server", "engine", "kernels", "tests", "tools", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
FORBIDDEN_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def statements() -> Sequence[tuple[Path, Function | ast.Global | ast.Import | ast.ImportFrom]]:
    """Yields the statements of all files that the tests check. Each file is parsed once."""
    wanted = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Global, ast.Import, ast.ImportFrom)
    found: list[tuple[Path, Any]] = []
    for path in FILES:
        found += [(path, node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, wanted)]
    return found


def functions() -> Iterator[tuple[str, Function]]:
    for path, node in statements():
        if isinstance(node, Function):
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def is_gpu_kernel(function: Function) -> bool:
    """Returns whether a function is compiled by triton. Such a function has many parameters: each tensor, stride and
    size."""
    decorators = [d.func if isinstance(d, ast.Call) else d for d in function.decorator_list]
    return any(isinstance(decorator, ast.Name) and decorator.id == "jit" for decorator in decorators)


def num_parameters(function: Function) -> int:
    """Returns the number of parameters that a caller passes, without self and cls."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    if positional and positional[0].arg in ("self", "cls"):
        positional = positional[1:]
    return len(positional) + len(arguments.kwonlyargs)


def imported(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=str(module)):
            yield module
        case _:
            return


def test_the_tree_is_found() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} >= {"server", "engine", "kernels", "tests"}


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_fit_a_screen() -> None:
    lengths = {name: (node.end_lineno or node.lineno) - node.lineno + 1 for name, node in functions()}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_parameter_lists_are_short() -> None:
    numbers = {name: num_parameters(node) for name, node in functions() if not is_gpu_kernel(node)}
    assert {name: number for name, number in numbers.items() if number > MAX_PARAMETERS} == {}


def test_no_file_is_a_drawer_for_everything() -> None:
    assert [str(path.relative_to(ROOT)) for path in FILES if path.name in FORBIDDEN_NAMES] == []


def test_nothing_pickles_and_no_function_rebinds_a_module_variable() -> None:
    found: list[str] = []
    for path, node in statements():
        where = f"{path.relative_to(ROOT)}:{node.lineno}"
        if isinstance(node, ast.Global):
            found.append(f"{where} global {', '.join(node.names)}")
        found += [f"{where} imports {name}" for name in imported(node) if name.split(".")[0] in PICKLES]
    assert found == []


def test_torch_stays_out_of_the_http_process() -> None:
    """import-linter reads our sources; this is what really happens, also through other people's packages."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    names = next(contract["source_modules"] for contract in contracts if contract["id"] == "torch")
    program = (
        "import importlib, pkgutil, sys\n"
        f"for name in {names}:\n"
        "    package = importlib.import_module(name)\n"
        "    for module in pkgutil.walk_packages(getattr(package, '__path__', []), name + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(f'importing {name} imports torch')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
