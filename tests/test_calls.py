"""Lectures, coursework and pages import names that exist, and call them with options that they take.

Running every cell takes most of an hour; this takes seconds, and finds what a renaming has left behind.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pytest

import coneslab

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = sorted(
    path
    for pattern in ("notebooks/**/*.ipynb", "coursework/source/**/*.ipynb", "README.md", "CONTRIBUTING.md", "docs/*.md")
    for path in ROOT.glob(pattern)
    if "checkpoints" not in path.parts[-2]
)


def code(path: Path) -> Iterator[str]:
    """The Python in a notebook, without magics, or in a page's fenced blocks."""
    if path.suffix == ".md":
        yield from re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
        return
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            yield re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", cell.source)


def dotted(node: ast.AST) -> list[str] | None:
    """["coneslab", "generate"] for `coneslab.generate`; None for what is no plain name."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)) is not None:
        return [*before, node.attr]
    return None


def imported(tree: ast.AST, known: dict[str, Any], wrong: list[str]) -> None:
    """Add what a tree imports from the package to `known`, by the names it gets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "coneslab":
                    module = importlib.import_module(alias.name)
                    known[alias.asname or "coneslab"] = module if alias.asname else coneslab
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "coneslab":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name) and hasattr(module, "__path__"):  # a room's module
                    if find_spec(f"{node.module}.{alias.name}"):
                        importlib.import_module(f"{node.module}.{alias.name}")
                if hasattr(module, alias.name):
                    known[alias.asname or alias.name] = getattr(module, alias.name)
                else:
                    wrong.append(f"line {node.lineno}: {node.module} has no {alias.name}")


def misuses(sources: Iterator[str]) -> list[str]:
    """Imports of names that do not exist, and options that the called function does not take."""
    known: dict[str, Any] = {}
    wrong: list[str] = []
    for source in sources:
        tree = ast.parse(source)
        imported(tree, known, wrong)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or (path := dotted(node.func)) is None or path[0] not in known:
                continue
            called: Any = known[path[0]]
            try:
                for name in path[1:]:
                    called = getattr(called, name)
            except AttributeError:
                wrong.append(f"{'.'.join(path)} does not exist")
                continue
            try:
                taken = inspect.signature(called).parameters
            except (TypeError, ValueError):  # a module whose name is used for something else as well; a builtin type
                continue
            if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
                continue
            names = [option.arg for option in node.keywords if option.arg is not None and option.arg not in taken]
            wrong += [f"{'.'.join(path)} takes no {name}" for name in names]
    return wrong


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_what_is_written_calls_what_exists(path):
    assert misuses(code(path)) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("from coneslab.finetuning import draws", "line 1: coneslab.finetuning has no draws"),
        ("from coneslab.finetuning.samples import Draw", "line 1: coneslab.finetuning.samples has no Draw"),
        ("import coneslab\nconeslab.generate(pipe, 'a cat', steps=2)", "coneslab.generate takes no steps"),
        ("import coneslab as lab\nlab.find_neurons(pipe)", "lab.find_neurons does not exist"),
        ("from coneslab import find_concept_neurons as find\nfind(pipe, cat, round=3)", "find takes no round"),
        ("from coneslab import show\nshow.plots.picture_grid(made)", None),
    ],
)
def test_a_misuse_is_found(source, said):
    assert misuses(iter([source])) == ([said] if said else [])
