"""Build the site: python docs/build.py build/book [--draft]

A draft is for whoever writes: all pages with their links, but nothing below a module's heading in the reference, and no
model behind the page that draws. It takes a third of the time.

What Sphinx reads is put together in `build/book/source`, in the layout of the repository, so that every link between
README, notebooks and model cards works there as it does here; the pages of docs/ lie at its top. The site is then in
`build/book/html`.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import findings
import playground
from hosts import running_times
from prose import modules
from result_tables import browser, evaluation, experiments, markdown_table, methods
from sphinx.cmd.build import main as sphinx

from notebooks import card, cleaned, thumbnail

ROOT = Path(__file__).resolve().parent.parent
AT_THE_TOP = ("README.md", "CONTRIBUTING.md")
COPIED = ("data/README.md", "data/models/*/*.md", "data/models/*/*.png", "data/results/*.png")

MODULES = re.compile(r"(?m)^```\{modules\}\n([^`]+)```$")  # a group of modules on a page of docs/


def assemble(source: Path, *, draft: bool = False) -> None:
    """Put everything that Sphinx reads into `source`."""
    for name, content in _files(draft):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _files(draft: bool) -> Iterator[tuple[str, bytes]]:
    """Names, relative to the source folder, and contents."""
    for path in (ROOT / "docs").rglob("*.md"):
        text = MODULES.sub(lambda group: module_table(group[1].split()), path.read_text(encoding="utf-8"))
        yield path.relative_to(ROOT / "docs").as_posix(), text.encode()
    for path in (ROOT / "docs").glob("*.svg"):
        yield path.name, path.read_bytes()
    for name in AT_THE_TOP:  # on the site the pages of docs/ lie beside them
        yield name, (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](").encode()
    for module in (name.removeprefix("coneslab.") for name in modules()):
        yield f"api/{module}.md", (f"# coneslab.{module}\n" if draft else reference(module)).encode()
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            yield path.relative_to(ROOT).as_posix(), path.read_bytes()
    cards = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shown = card(path)
        yield f"notebooks/{path.name}", cleaned(path, playground.links(path.stem)).encode()
        yield f"parts/{path.stem}.png", thumbnail(shown.picture)
        cards.append(_card(path.stem, shown.title, shown.alt, line_about(path.name)))
    yield "parts/minutes.md", running_times(sorted((ROOT / "notebooks").glob("*.ipynb"))).encode()
    yield "parts/cards.md", "\n".join([":::::{container} gallery", *cards, ":::::", ""]).encode()
    results = ROOT / "data" / "results"
    for path in results.glob("evaluation_*.json"):
        yield f"parts/{path.stem}.md", evaluation(path).encode()
    yield "parts/browser.md", browser(results / "browser.csv").encode()
    yield "parts/methods.md", methods(results / "methods.csv").encode()
    yield "parts/experiments.md", experiments(results).encode()
    yield "parts/findings.md", findings.page(results).encode()
    yield "parts/door.md", door().encode()


def _card(stem: str, title: str, alt: str, line: str) -> str:
    alt = re.sub(r"([\[\]\\])", r"\\\1", " ".join(alt.split()))
    picture = f"[![{alt}](parts/{stem}.png)](notebooks/{stem}.ipynb)"
    return f"::::{{container}} gallery-card\n{picture}\n\n[{title}](notebooks/{stem}.ipynb)\n\n{line}\n::::"


def line_about(name: str) -> str:
    """What the README's table says about a notebook."""
    row = re.search(rf"(?m)^\|.*\(notebooks/{re.escape(name)}\) \| (.+) \|$", (ROOT / "README.md").read_text("utf-8"))
    if row is None:
        raise ValueError(f"README.md says nothing about notebooks/{name}: give it a line in the table of notebooks")
    return row[1][0].upper() + row[1][1:] + ("" if row[1].endswith((".", "?", "!")) else ".")


def reference(module: str) -> str:
    """The page of one module, or of a room: its names are described where they are defined."""
    alone = "\n   :no-members:" if (ROOT / "coneslab").joinpath(*module.split(".")).is_dir() else ""
    return f"# coneslab.{module}\n\n```{{eval-rst}}\n.. automodule:: coneslab.{module}{alone}\n```\n"


def module_table(modules: Sequence[str]) -> str:
    """Modules with the first lines of their docstrings, and their pages in the order of reading."""
    rows = [[f"{{py:mod}}`{name} <coneslab.{name}>`", about(ast.get_docstring(parsed(name)))] for name in modules]
    pages = "\n".join(f"{name} <{name}>" for name in modules)
    return f"{markdown_table(['module', 'what it holds'], rows)}\n\n```{{toctree}}\n:hidden:\n\n{pages}\n```"


def parsed(module: str) -> ast.Module:
    """The code of a module, or of a room's face: "world", "world.subjects", "" for the package's own."""
    path = ROOT.joinpath("coneslab", *filter(None, module.split(".")))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def about(docstring: str | None) -> str:
    """The first sentence or so: the first paragraph of a docstring, in one line."""
    return " ".join((docstring or "").partition("\n\n")[0].split())


def door() -> str:
    """The names that `import coneslab` offers, as a table; their docstrings are read, nothing is imported."""
    rows = []
    for node in ast.walk(parsed("")):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for name in (alias.name for alias in node.names):
                module, part = home(str(node.module), name)
                if isinstance(part, ast.FunctionDef | ast.ClassDef):
                    said = about(ast.get_docstring(part))
                    rows.append([f"{{py:obj}}`{name} <coneslab.{module}.{name}>`", said])
    return markdown_table(["name", "what it is"], sorted(rows))


def home(module: str, name: str) -> tuple[str, ast.AST | None]:
    """The module that defines a name which `module` has or offers, and the definition where it is one."""
    tree = parsed(module)
    for part in tree.body:
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and part.name == name:
            return module, part
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and name in {alias.name for alias in node.names}:
            return home(f"{module}.{node.module}", name)
    return module, None


def main(folder: str, *, draft: bool = False) -> int:
    """Build everything anew: what is kept from one time to the next would not know that the code in docs/ changed."""
    source, html, kept = (Path(folder) / name for name in ("source", "html", "doctrees"))
    for path in (source, html, kept):
        shutil.rmtree(path, ignore_errors=True)
    assemble(source, draft=draft)
    failed = sphinx(
        ["--builder", "html", "--conf-dir", str(ROOT / "docs"), "--doctree-dir", str(kept)]
        + ["--fail-on-warning", "--keep-going", "--quiet", str(source), str(html)]
    )
    playground.build(html / playground.FOLDER, draft=draft)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the site.")
    parser.add_argument("folder")
    parser.add_argument("--draft", action="store_true", help="without the reference's contents and the page's model")
    asked = parser.parse_args()
    sys.exit(main(asked.folder, draft=asked.draft))
