"""Saved notebooks as the site shows them: without what only a kernel can use, every picture with its alt text."""

from __future__ import annotations

import base64
import html
import io
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from PIL import Image

WIDGET = "application/vnd.jupyter.widget-view+json"
BAR = re.compile(r"it/s\]|\d+%\|")  # a progress bar
LIVE = re.compile(rf"{BAR.pattern}|^\w+\(")  # that, or the repr of a widget: says nothing to a reader
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
THUMBNAIL = (640, 360)


@dataclass(frozen=True)
class Card:
    """What the gallery shows of a notebook; the picture is one of its outputs, as the bytes of an image file."""

    title: str
    picture: bytes
    alt: str


def card(path: Path) -> Card:
    """The card of a notebook: its heading, and the output picture with the most to see.

    A cell tagged `thumbnail` settles which; otherwise it is the largest file. Raises ValueError if there is none.
    """
    notebook = nbformat.read(path, as_version=4)
    heading = re.search(r"(?m)^# (.+)$", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in cells if "thumbnail" in cell.metadata.get("tags", [])]
    found = [picture for cell in tagged or cells for picture in pictures(cell)]
    if heading is None or not found:
        raise ValueError(f"{path.name} has no heading or no saved picture: run `make notebooks`")
    picture, alt = max(found, key=lambda each: len(each[0]))
    return Card(heading[1], picture, alt)


def pictures(cell: nbformat.NotebookNode) -> list[tuple[bytes, str]]:
    """The pictures that a cell shows, each with its alt text."""
    shown = []
    for output in cell.outputs:
        page = BeautifulSoup(output.get("data", {}).get("text/html", ""), "html.parser")
        for image in page.find_all("img", src=re.compile("^data:image/")):
            shown.append((base64.b64decode(image["src"].partition(",")[2]), image.get("alt", "")))
    return shown


def thumbnail(picture: bytes) -> bytes:
    """A PNG of one size for all cards: the upper left part, as wide as it can be."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    width, height = THUMBNAIL
    scale = max(width / image.width, height / image.height)
    large = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    large.crop((0, 0, width, height)).save(file, "PNG", optimize=True)
    return file.getvalue()


def cleaned(path: Path, more: str = "") -> str:
    """The notebook for the site, as JSON; the file itself is not changed. more: what is said below its first text."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    numbers = {other.name.partition("_")[0] for other in path.parent.glob("*.ipynb")}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if more:
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(more, id="in-your-browser"))
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(lambda link: _link(link, numbers), cell.source)
    for cell in code:
        cell.outputs = [shown for output in cell.outputs if (shown := _output(output, cell.source))]
        _fold(cell, set_up=cell is code[0])
    return nbformat.writes(notebook)


def _link(link: re.Match[str], numbers: set[str]) -> str:
    """Links to an anchor of the same notebook as HTML, which keeps to its ids; links to what is to come as text."""
    if link["target"].startswith("#"):
        return f'<a href="{html.escape(link["target"])}">{link["text"]}</a>'
    chapter = re.match(r"(\d\d[a-z]?)_\w+\.ipynb", link["target"])
    return link["text"] if chapter and chapter[1] not in numbers else link[0]


def _output(output: nbformat.NotebookNode, source: str) -> nbformat.NotebookNode | None:
    """An output to show, or None."""
    data = output.get("data", {})
    if data.pop(WIDGET, None) is not None and LIVE.search("".join(data.get("text/plain", ""))):
        return None
    image = next((kind for kind in ("image/png", "image/jpeg") if kind in data), None)
    if image is not None and "text/html" not in data:
        alt = html.escape(f"The picture that this cell shows: {source.strip().splitlines()[-1]}", quote=True)
        data["text/html"] = f'<img alt="{alt}" src="data:{image};base64,{data[image].strip()}">'
    for kind in [kind for kind in data if kind.startswith("image/")]:
        del data[kind]
    return output


def _fold(cell: nbformat.NotebookNode, *, set_up: bool) -> None:
    """Fold what is folded in the notebook, and the set-up, which a reader of the site does not need."""
    folded = cell.metadata.get("jupyter", {})
    hidden = {
        (True, True): "hide-cell",
        (True, False): "hide-input",
        (False, True): "hide-output",
    }.get((set_up or bool(folded.get("source_hidden")), bool(folded.get("outputs_hidden"))))
    if hidden:
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), hidden]
