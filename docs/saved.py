"""What `make notebooks` saves: outputs without progress bars, which stand half-finished wherever no kernel runs.

    python docs/saved.py notebooks/*.ipynb

The widgets that a notebook still shows, and all that they are made of, stay as they are.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nbformat

from coneslab.files import write_whole
from notebooks import BAR, WIDGET

STATE = "application/vnd.jupyter.widget-state+json"


def without_bars(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same notebook, changed in place: no bars among the outputs, no widgets that nothing shows."""
    shown = set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_bar(output)]
            shown |= {output.data[WIDGET]["model_id"] for output in cell.outputs if WIDGET in output.get("data", {})}
    stored = notebook.metadata.get("widgets", {}).get(STATE, {})
    models, reached = stored.get("state", {}), set()
    while shown:
        reached |= shown
        made_of = json.dumps([models[name] for name in shown if name in models])
        shown = set(re.findall(r"IPY_MODEL_(\w+)", made_of)) - reached
    if models:
        stored["state"] = {name: model for name, model in models.items() if name in reached}
    return notebook


def _is_bar(output: nbformat.NotebookNode) -> bool:
    """A bar is a widget, or lines on stderr."""
    data = output.get("data", {})
    said = data.get("text/plain", "") if WIDGET in data else output.text if output.get("name") == "stderr" else ""
    return bool(BAR.search(said))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        notebook = without_bars(nbformat.read(name, as_version=4))
        write_whole(Path(name), (nbformat.writes(notebook) + "\n").encode())
