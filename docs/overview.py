"""The picture on the page "How it hangs together": python docs/overview.py writes docs/overview.svg.

Three rows: what makes an edit, the pipeline that both ways use, and what an edit is used for. It brings its own white
ground, as figures do, so that it can be read on a light page and on a dark one.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from coneslab.files import write_whole

FILE = Path(__file__).with_name("overview.svg")
WIDTH, HEIGHT = 980, 484
BOX = (206, 104)  # width and height of a box
COLUMNS = (18, 264, 510, 756)  # left edges
ROWS = (52, 216, 340)  # upper edges
# Ground and edge of a box: what goes in, what is computed, the edit, what comes out; dark text is readable on all.
COLOURS = {"in": ("#fff4d6", "#b07d00"), "step": ("#e3f0fa", "#0072b2"), "edit": ("#ffe6d5", "#d55e00")}
COLOURS["out"] = ("#def3ea", "#00795a")

BOXES = [  # column, row, colour, title, lines, rooms
    (0, 0, "in", "Prompts and pictures", ("a subject's references,", "captions and class word"), "world"),
    (1, 0, "step", "Latents, embeddings", ("VAE and text encoder;", "noise is added"), "diffusion"),
    (2, 0, "step", "Losses, gradients", ("how well the U-Net", "predicts the noise"), "finetuning"),
    (3, 0, "edit", "An edit", ("weights, masks or tokens,", "in a safetensors file"), "neurons, methods, edits"),
    (3, 2, "step", "Pictures", ("drawn with the edit on,", "and without it"), "diffusion"),
    (2, 2, "step", "Measurements", ("alignment, classes, KID,", "with intervals"), "measure"),
    (1, 2, "out", "Tables", ("subjects × seeds ×", "conditions, as CSV"), "experiments"),
    (0, 2, "out", "Figures and widgets", ("in notebooks, on a page,", "from the command line"), "show, cli"),
]
PIPELINE = "One plain diffusers StableDiffusionPipeline"
PIPELINE_NOTE = "the shipped tiny model, which pretraining makes from scratch, or any other Stable Diffusion"


def box(column: int, row: int, colour: str, title: str, lines: tuple[str, ...], rooms: str) -> str:
    """One box: a bold title, two lines of explanation, and the folders of coneslab that do it."""
    x, y, (width, height), (ground, edge) = COLUMNS[column], ROWS[row], BOX, COLOURS[colour]
    middle = x + width / 2
    texts = [
        text(middle, y + 26, title, "title"),
        *(text(middle, y + 48 + 17 * i, line) for i, line in enumerate(lines)),
    ]
    return "\n".join([rectangle(x, y, width, height, ground, edge), *texts, text(middle, y + 91, rooms, "room")])


def rectangle(x: float, y: float, width: float, height: float, ground: str, edge: str) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} rx="10" fill="{ground}" stroke="{edge}" stroke-width="1.6"/>'


def text(x: float, y: float, words: str, kind: str = "line") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>'


def arrow(start: tuple[float, float], end: tuple[float, float], kind: str = "flow") -> str:
    return f'<path class="{kind}" d="M{start[0]:g} {start[1]:g}L{end[0]:g} {end[1]:g}" marker-end="url(#head)"/>'


def arrows() -> list[str]:
    """Along the upper row to the edit, down through the pipeline, and back along the lower row."""
    (width, height), made = BOX, []
    for left, right in zip(COLUMNS, COLUMNS[1:], strict=False):
        made.append(arrow((left + width + 4, ROWS[0] + height / 2), (right - 5, ROWS[0] + height / 2)))
        made.append(arrow((right - 4, ROWS[2] + height / 2), (left + width + 5, ROWS[2] + height / 2)))
    bottom, top = ROWS[0] + height, ROWS[1]
    for column in (1, 2):  # the pipeline's parts are what encodes and what predicts
        middle = COLUMNS[column] + width / 2
        made.append(arrow((middle, top - 4), (middle, bottom + 5), "uses"))
    middle = COLUMNS[3] + width / 2
    made.append(arrow((middle, bottom + 4), (middle, top - 5)))
    made.append(arrow((middle, top + 68), (middle, ROWS[2] - 5)))
    return made


SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
<style>
text {{ font: 14px 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; fill: #1a1a1a; text-anchor: middle }}
.title {{ font-size: 16px; font-weight: 700 }}
.head {{ font-size: 15px; font-style: italic; fill: #555 }}
.room, .code {{ font: 13px 'SF Mono', Consolas, 'DejaVu Sans Mono', monospace }}
.left {{ text-anchor: start }}
.flow, .uses {{ fill: none; stroke: #333; stroke-width: 2 }}
.uses {{ stroke-dasharray: 4 4 }}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0 0L8 4L0 8z" fill="#333"/></marker></defs>
<rect width="{width}" height="{height}" rx="12" fill="#ffffff"/>
{parts}
</svg>
"""


def svg() -> str:
    """The whole picture."""
    left, top = COLUMNS[0], ROWS[1]
    parts = [
        text(WIDTH / 2, 30, "Making an edit", "head"),
        text(WIDTH / 2, ROWS[2] + BOX[1] + 28, "Using an edit", "head"),
        rectangle(left, top, WIDTH - 2 * left, 64, "#f1f1f1", "#666666"),
        text(left + 16, top + 27, PIPELINE, "title left"),
        text(left + 16, top + 48, PIPELINE_NOTE, "line left"),
        text(COLUMNS[3] + BOX[0] / 2, top + 38, "with edit.applied(pipe):", "code"),
    ]
    parts += [*(box(*each) for each in BOXES), *arrows()]
    return SVG.format(width=WIDTH, height=HEIGHT, parts="\n".join(parts))


if __name__ == "__main__":
    write_whole(FILE, svg().encode())
    print(f"written: {FILE}")
