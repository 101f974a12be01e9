"""Short copies of the notebooks, in which every cell runs, with fewer rounds, steps and pictures.

    python tests/short_notebooks.py build/short             all notebooks: `make test` runs the copies with nbmake
    python tests/short_notebooks.py build/short 04          those whose name begins with 04

A notebook's metadata say how it is shortened (JupyterLab: Property Inspector, Advanced Tools):

    "short": {"text": {"ROUNDS = 60": "ROUNDS = 2"},
              "defaults": {"coneslab.generate": {"sampler_steps": 2}}}

`text` is replaced wherever it stands in the code; `defaults` are what functions and settings use when called without
these options. Whatever is named must exist, so a notebook that changes cannot grow long again unnoticed.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SET_DEFAULTS = """\
# --- only in the short copy: what functions take by default, from this notebook's metadata
import importlib

for name, options in {defaults!r}.items():
    module, _, called = name.rpartition(".")
    function = getattr(importlib.import_module(module), called)
    known = (function.__init__ if isinstance(function, type) else function).__kwdefaults__
    if not options.keys() <= known.keys():
        raise KeyError(f"{{name}} does not take all of {{sorted(options)}}: see the metadata, short")
    known.update(options)"""


def shortened(notebook: Any) -> Any:
    """A copy of a notebook without outputs, shortened as its metadata say.

    Raises ValueError if they say nothing, or name a text that no code cell has.
    """
    how = notebook.metadata.get("short")
    if how is None:
        raise ValueError('the notebook does not say how it is shortened: give its metadata "short"')
    if unknown := how.keys() - {"text", "defaults"}:
        raise ValueError(f'the metadata "short" have {sorted(unknown)}: expected "text" and "defaults"')
    copy = nbformat.from_dict(notebook)
    code = [cell for cell in copy.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    if texts := how.get("text", {}):
        found, any_of = set(), re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
        for cell in code:
            found |= {*any_of.findall(cell.source)}
            cell.source = any_of.sub(lambda old: texts[old[0]], cell.source)
        if missing := sorted(texts.keys() - found):
            raise ValueError(
                f'no code cell has {missing[0]!r}, which the metadata "short" replace: change them as well'
            )
    if defaults := how.get("defaults"):
        parameters = next(cell for cell in code if "parameters" in cell.metadata.get("tags", []))
        parameters.source += "\n\n" + SET_DEFAULTS.format(defaults=dict(defaults))
    return copy


def write(path: Path, folder: Path) -> Path:
    """Write the short copy of a notebook into a folder."""
    try:
        copy = shortened(nbformat.read(path, as_version=4))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(copy, folder / path.name)
    return folder / path.name


def main(target: str, *beginnings: str) -> None:
    folder = Path(target)
    shutil.rmtree(folder, ignore_errors=True)
    for path in NOTEBOOKS:
        if path.name.startswith(beginnings or ""):
            write(path, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
