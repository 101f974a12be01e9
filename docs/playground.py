"""The page that draws in the browser, on the site: where it lies, and which of its states a lecture talks about."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import urlencode

import coneslab
from coneslab import ConeslabError
from coneslab.web import default_shelf, export_web, fetch_runtime

FOLDER = "playground"
KEPT = Path(__file__).resolve().parent.parent / "build" / "web"  # what was fetched and found, from one time to the next

#: lecture -> what its states show, and the states; names of edits are those of `coneslab.web.default_shelf`
STATES: dict[str, list[tuple[str, dict[str, str]]]] = {
    "00_tour": [
        ("the dog with its concept neurons shut", {"prompt": "a zwx dog on the beach", "edits": "dog"}),
    ],
    "03_finding_concept_neurons": [
        ("half the dose", {"prompt": "a zwx dog on the beach", "edits": "dog", "dose": "0.5"}),
        ("a mask at the subject’s words only", {"prompt": "a sks cat on the beach", "edits": "cat"}),
    ],
    "05_concatenating_concepts": [
        ("two subjects, their masks joined", {"prompt": "a sks cat and a vqz car on the grass", "edits": "cat,car"}),
    ],
    "07_ablating_concepts": [
        ("the cat that is drawn as a dog", {"prompt": "a cat on the grass", "edits": "cat-to-dog"}),
        ("what becomes of another word", {"prompt": "a rabbit on the grass", "edits": "cat-to-dog"}),
    ],
}


def address(state: dict[str, str]) -> str:
    """The address of a state, from a page of a folder beside the page's."""
    return f"../{FOLDER}/index.html#{urlencode(state, safe=',')}"


def links(stem: str) -> str:
    """A line for a lecture, with links to its states; empty if it has none."""
    shown = [f'<a href="{address(state)}">{text}</a>' for text, state in STATES.get(stem, [])]
    return f"*In your browser, with nothing installed:* {', '.join(shown)}." if shown else ""


def build(folder: Path, *, draft: bool = False) -> None:
    """Write the page into the site. Without a network it is written without what computes, and says so.

    draft: only a page in its place.
    """
    if draft:
        folder.mkdir(parents=True)
        (folder / "index.html").write_text(
            "<!doctype html><title>A draft</title><h1>A draft has no model.</h1>\n", "utf-8"
        )
        return
    try:
        runtime = fetch_runtime(KEPT)
    except ConeslabError as error:
        print(f"The page {FOLDER}/ cannot draw: {error}", file=sys.stderr)
        runtime = None
    pipe = coneslab.load("tiny", device="cpu")
    export_web(pipe, folder, default_shelf(pipe, KEPT, progress=False), runtime=runtime, home="../index.html")
