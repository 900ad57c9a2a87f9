"""The sizes and names that CONTRIBUTING.md asks for, and the imports of kernels/; `lint-imports` checks the rest."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "steerfast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in FILES}

MOST_LINES = {ast.ClassDef: 400, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}
MOST_PARAMETERS = 8


def definitions() -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
                yield file, node


def is_kernel(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A Triton kernel takes the operands of an op one by one."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_every_definition_fits_a_screen() -> None:
    long = []
    for file, node in definitions():
        lines = int(node.end_lineno or 0) - node.lineno + 1
        if lines > MOST_LINES[type(node)]:
            long.append(f"{file}:{node.lineno} {node.name}: {lines} lines")
    assert not long, "\n".join(long)


def test_no_function_takes_a_list_of_parameters() -> None:
    many = []
    for file, node in definitions():
        if isinstance(node, ast.ClassDef):
            continue
        arguments = node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > MOST_PARAMETERS:
            many.append(f"{file}:{node.lineno} {node.name}: {count} parameters")
    assert not many, "\n".join(many)


def test_no_two_classes_have_the_same_name() -> None:
    places: dict[str, list[str]] = {}
    for file, node in definitions():
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            places.setdefault(node.name, []).append(f"{file}:{node.lineno}")
    assert not {name: files for name, files in places.items() if len(files) > 1}


@pytest.mark.parametrize("file", [file for file in TREES if file.startswith("kernels/")])
def test_kernels_import_torch_and_triton_alone(file: str) -> None:
    imported = set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"line {node.lineno} leaves kernels/"
            imported |= set() if node.level else {str(node.module).split(".")[0]}
    assert imported - sys.stdlib_module_names <= {"torch", "triton"}
