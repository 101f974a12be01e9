"""What lets every notebook run on Colab and Binder: its set-up cell and its links, from one address.

    python docs/hosts.py                                        all notebooks, and the README: `make hosts`
    python docs/hosts.py --minutes 3 notebooks/04_x.ipynb       a new one, which takes 3 minutes on two CPU cores

A notebook on Colab is a single file, so its first code cell has to say by itself where coneslab comes from. It is
written here, from the repository's address in pyproject.toml; tests/test_hosts.py checks that all are as written. What
it prints is saved with it where the cell has changed. Every other cell and output stays as it is.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import nbformat
from result_tables import markdown_table

from coneslab.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
BRANCH = "main"
FIRST = "00_tour.ipynb"  # what the README's links open

SET_UP = """\
# Set-up, written by `make hosts`: on Colab this installs coneslab, anywhere else `make lab` has done so.
from importlib.util import find_spec

if "google.colab" in str(get_ipython()) and not find_spec("coneslab"):
    %pip install -q git+{address}
import coneslab  # not found? Start Jupyter with `make lab`, or run the %pip line above

device = coneslab.set_up_notebook(minutes={minutes:g})"""

LINKS = re.compile(r"(?m)^\[Open (?:the tour )?in Colab\]\(\S+\) ·\s\[in Binder\]\(\S+\)$")


def address() -> str:
    """Where the repository is: the only place that says so is pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removesuffix("/")


def set_up(address: str, minutes: float) -> str:
    """The source of a set-up cell. minutes: how long the notebook takes, as for `coneslab.set_up_notebook`."""
    return SET_UP.format(address=address, minutes=minutes)


def links(address: str, name: str, what: str = "") -> str:
    """Markdown that opens notebooks/`name` on Colab and on Binder. what: "the tour ", where the place does not say."""
    place = address.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{place}/blob/{BRANCH}/notebooks/{name}"
    binder = f"https://mybinder.org/v2/gh/{place}/{BRANCH}?urlpath=lab/tree/notebooks/{name}"
    return f"[Open {what}in Colab]({colab}) ·\n[in Binder]({binder})"


def minutes_of(source: str) -> float | None:
    """What a set-up cell says about its notebook."""
    found = re.search(r"set_up_notebook\(minutes=([\d.]+)\)", source)
    return float(found[1]) if found else None


def first_code(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """A notebook's first code cell: its set-up."""
    return next((cell for cell in notebook.cells if cell.cell_type == "code"), None)


def set_up_of(path: Path) -> str:
    """The source of a notebook's set-up cell; "" if there is none."""
    cell = first_code(nbformat.read(path, as_version=4))
    return "" if cell is None else cell.source


def running_times(paths: Sequence[Path]) -> str:
    """How long notebooks run, as their own set-up cells say: a table for the site."""
    rows = []
    for path in paths:
        rows.append([f"[{path.stem}](notebooks/{path.name})", f"{minutes_of(set_up_of(path)):g} min"])
    return markdown_table(["notebook", "all cells"], rows)


def with_links(text: str, line: str) -> str:
    """Markdown with `line` in place of the links that it has, or below its title."""
    if LINKS.search(text):
        return LINKS.sub(lambda old: line, text)
    title, _, rest = text.partition("\n")
    return f"{title}\n\n{line}\n\n{rest.lstrip()}" if rest.strip() else f"{title}\n\n{line}"


def refresh(path: Path, minutes: float | None = None) -> bool:
    """Write the set-up cell and the links of a notebook anew; returns whether the file changed.

    Raises ValueError where it is not known how long the notebook takes, or a first cell is missing.
    """
    notebook = nbformat.read(path, as_version=4)
    title = notebook.cells[0]
    cell = first_code(notebook)
    if title.cell_type != "markdown" or not title.source.startswith("# ") or cell is None:
        raise ValueError(f"{path.name} must begin with a heading, and have code: its first code cell is the set-up")
    minutes = minutes or minutes_of(cell.source)
    if minutes is None:
        raise ValueError(f"{path.name} does not say how long it takes: python docs/hosts.py --minutes N {path.name}")
    before = nbformat.writes(notebook)
    title.source = with_links(title.source, links(address(), path.name))
    source = set_up(address(), minutes)
    if source != cell.source:
        cell.source = source
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed(minutes))]
    if nbformat.writes(notebook) == before:
        return False
    write_whole(path, (nbformat.writes(notebook).rstrip("\n") + "\n").encode())
    return True


def written_address(path: Path) -> str | None:
    """The address in a notebook's set-up cell, which may be older than that in pyproject.toml."""
    found = re.search(r"%pip install -q git\+(\S+)", set_up_of(path))
    return found[1] if found else None


def readdress(paths: Sequence[Path], old: str, new: str) -> list[Path]:
    """Put an address in place of the old one wherever a text names it; returns the files that changed."""
    changed = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if (after := re.sub(rf"{re.escape(old)}(?![\w-])", new, text)) != text:
            write_whole(path, after.encode())
            changed.append(path)
    return changed


def printed(minutes: float) -> str:
    """What a set-up cell prints, with as many threads as torch takes by itself. Raises RuntimeError if it fails."""
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", f"import coneslab; coneslab.set_up_notebook(minutes={minutes:g})"]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the set-up cell does not run:\n{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb")))
    parser.add_argument("--minutes", type=float, help="how long the named notebook takes on two CPU cores")
    given = parser.parse_args()
    if given.minutes and len(given.notebooks) != 1:
        parser.error("--minutes says something about one notebook: name it")
    written = ("README.md", "CONTRIBUTING.md", "docs/*.md", "notebooks/*.ipynb", "coursework/source/*/*.ipynb")
    texts = [path for pattern in written for path in ROOT.glob(pattern)]
    old = written_address(NOTEBOOKS / FIRST)
    for path in readdress(texts, old, address()) if old else []:
        print(f"another address: {path}")
    for path in given.notebooks:
        if refresh(path, given.minutes):
            print(f"written: {path}")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if (new := with_links(text, links(address(), FIRST, "the tour "))) != text:
        write_whole(readme, new.encode())
        print(f"written: {readme}")


if __name__ == "__main__":
    main()
