"""The examples in the docstrings run, and what a reader calls first has one."""

from __future__ import annotations

import ast
import doctest
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sharing import share

import coneslab

ROOT = Path(__file__).resolve().parent.parent
CALLED_FIRST = (
    "load",
    "subject",
    "subject_from_folder",
    "sample",
    "generate",
    "find_concept_neurons",
    "ConceptNeurons.applied",
    "concatenate",
    "finetune_together",
    "load_edit",
    "textual_inversion",
    "dreambooth",
    "lora",
    "custom_diffusion",
    "merge",
    "ablate",
    "decompose",
    "load_judge",
    "Judge.classify",
    "record_attention",
    "watch",
    "patch",
    "bootstrap_interval",
)


class Example(NamedTuple):
    """A docstring with an example: of what, in which module, and where."""

    module: str
    name: str
    docstring: str
    file: Path
    line: int


def documented(tree: ast.AST, before: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Functions and classes with their dotted names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield before + node.name, node
            yield from documented(node, f"{before}{node.name}.")


def examples(package: Path) -> list[Example]:
    """Read off the source, so that nothing is imported before a test runs."""
    found = []
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        module = ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        for name, node in [("", tree), *documented(tree)]:
            docstring = ast.get_docstring(node, clean=False)
            if docstring and ">>> " in docstring:
                found.append(Example(module, name, docstring, file, node.body[0].lineno))
    return found


def run(example: Example) -> str:
    """What doctest says of an example; empty where it holds. `coneslab` is known in it, as after `import coneslab`."""
    said: list[str] = []
    names = vars(importlib.import_module(example.module)) | {"coneslab": coneslab, "__name__": "__main__"}
    test = doctest.DocTestParser().get_doctest(
        example.docstring, names, example.name, str(example.file), example.line - 1
    )
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test, out=said.append)
    return "".join(said).strip("*\n")


@pytest.fixture(scope="module")
def shipped_judge() -> Any:
    return share("shipped_judge", coneslab.load_judge(), "model")


EXAMPLES = examples(ROOT / "coneslab")


def marked(example: Example) -> Any:
    """The methods train, if only for a step or two; all else is quick."""
    marks = [pytest.mark.slow] if example.module.startswith("coneslab.methods.") else []
    return pytest.param(example, id=f"{example.module}.{example.name}", marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("example", [marked(example) for example in EXAMPLES])
def test_an_example_shows_what_one_gets(example, request, monkeypatch, tmp_path):
    # every example loads what it needs, as a reader does; here that is done once for all
    for function, fixture in (("load", "tiny"), ("load_judge", "shipped_judge")):
        if f"{function}(" in example.docstring and example.name != function:
            loaded = request.getfixturevalue(fixture)
            monkeypatch.setattr(coneslab, function, lambda *name, loaded=loaded: loaded)
    monkeypatch.chdir(tmp_path)
    if failure := run(example):
        pytest.fail(failure, pytrace=False)


@pytest.mark.parametrize("name", CALLED_FIRST)
def test_what_a_reader_calls_first_has_an_example(name):
    found = coneslab
    for part in name.split("."):
        found = getattr(found, part)
    assert name in [one.name for one in EXAMPLES if one.module == found.__module__], f"{name} shows no example"
    lines = doctest.DocTestParser().get_examples(found.__doc__)
    assert any(line.want for line in lines), f"{name}: the example shows nothing that one gets"


@pytest.mark.parametrize(
    ("docstring", "told"),
    [
        ('"""Double.\n\n    >>> double(2)\n    5\n    """', "Expected:\n    5\nGot:\n    4"),
        ('"""Double.\n\n    >>> double("a", 2)\n    4\n    """', "takes 1 positional argument"),
        ('"""Double.\n\n    >>> double(2)\n    4\n    """', ""),
    ],
)
def test_a_wrong_example_is_found(tmp_path, monkeypatch, docstring, told):
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "__init__.py").write_text(
        f"class A:\n    pass\n\n\ndef double(x):\n    {docstring}\n    return 2 * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wrong", raising=False)
    (example,) = examples(tmp_path / "wrong")
    assert (example.module, example.name, example.line) == ("wrong", "double", 6)
    assert told in run(example) and bool(told) == bool(run(example))
