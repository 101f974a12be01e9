"""Model cards of the shipped models, written from their training logs, never by hand."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..errors import ConeslabError
from ..files import replacing, write_whole
from .loop import Log

_TITLES = {
    "vae": "Autoencoder",
    "decoder": "Decoder alone, encoder kept",
    "unet": "U-Net and text encoder",
    "judge": "Judge",
}
_ABOUT = {
    "tiny": (
        "coneslab tiny",
        "A complete latent text-to-image diffusion model for the sticker world of coneslab: 64x64 pictures of emoji on "
        "drawn scenes. Trained from scratch, for teaching and research on a laptop. It is a plain diffusers "
        "`StableDiffusionPipeline`:\n\n```python\nfrom diffusers import StableDiffusionPipeline\n\n"
        'pipe = StableDiffusionPipeline.from_pretrained("data/models/tiny", safety_checker=None)\n'
        'pipe("a cat on the beach", num_inference_steps=25, guidance_scale=3.0).images[0]\n```',
        "`coneslab.world.sample`: pictures composed on the fly from Fluent Emoji (3D and flat), Noto Emoji "
        "(today's and the first), and EmojiOne, with captions in the world's grammar; every object varies in hue, "
        "saturation, lightness, size and angle. Twemoji and the drawings of the near subjects are held out: no part of "
        "this model has seen them. Licences and attribution of the art are in `data/licences`.",
        "Teaching and experiments in this small world. It knows the words of `coneslab.world.WORDS` and no others, "
        "and it knows the planted biases of that world on purpose (`coneslab.world.FACTS`).",
    ),
    "judge": (
        "coneslab judge",
        "A small CLIP model that measures pictures of the sticker world: a plain transformers `CLIPModel` with its "
        "`CLIPProcessor`. It is used only to measure and was trained separately from the diffusion model.",
        "`coneslab.world.sample` with all six art sets and all drawings, slightly blurred, noised and brightened "
        "at random; captions in the world's grammar and captions that are wrong in one thing.",
        "Text and image alignment, classification and feature distances on pictures of this world. Not meant for "
        "photographs.",
    ),
}


def loss_curve(logs: Mapping[str, Log]) -> Figure:
    """Training loss over minutes on a logarithmic axis, one panel per run, as logged (means over 20 steps)."""
    if not logs:
        raise ConeslabError("no training log was given, expected at least one: train a model first")
    figure = Figure(figsize=(4.5 * len(logs), 3.0), layout="constrained")
    axes = figure.subplots(1, len(logs), squeeze=False)[0]
    for axis, (stage, log) in zip(axes, logs.items(), strict=True):
        minutes = [row["seconds"] / 60 for row in log.rows]
        axis.plot(minutes, [row["loss"] for row in log.rows], color="#0072B2", linewidth=1)
        axis.set(xlabel="training time (minutes)", ylabel="loss (mean of 20 steps)", title=_TITLES.get(stage, stage))
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    return figure


def caption_sheet(drawn: Sequence[Image.Image], real: Sequence[Image.Image], captions: Sequence[str]) -> Figure:
    """Drawn pictures beside real ones with the same captions, four pairs per row, enlarged: for the eye to judge."""
    if not len(drawn) == len(real) == len(captions) > 0:
        raise ConeslabError(
            f"got {len(drawn)} drawn and {len(real)} real pictures and {len(captions)} captions: give as many of each"
        )
    rows = -(-len(captions) // 4)
    figure = Figure(figsize=(13, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, one, other, caption in zip(axes, drawn, real, captions, strict=False):
        gap = np.full((one.height, max(1, one.width // 16), 3), 255, np.uint8)
        axis.imshow(np.concatenate([np.asarray(one), gap, np.asarray(other)], 1), interpolation="nearest")
        axis.set_title("\n".join(wrap(caption, 42)), fontsize=8)
    figure.suptitle("Drawn (left) and real (right) pictures of sixteen random captions", fontsize=10)
    return figure


def _run_table(stage: str, log: Log) -> list[str]:
    recipe: dict[str, Any] = log.facts.get("recipe", {})
    last = {key: value for key, value in log.rows[-1].items() if key not in ("step", "seconds", "rate")}
    muon = "Muon for inner matrices, AdamW for the rest" if recipe.get("muon") else "AdamW"
    facts = {key: log.facts.get(key, "?") for key in ("device", "precision", "torch", "commit")}
    rows = {
        "weights": f"{log.facts.get('weights', 0) / 1e6:.2f} M",
        "steps": f"{log.steps:,} of {recipe.get('batch_size', '?')} pictures",
        "seconds": f"{log.seconds:,.0f}",
        "optimiser": f"{muon}, rate {recipe.get('learning_rate', '?')}, weight decay "
        f"{recipe.get('weight_decay', '?')}, average of weights {recipe.get('averages', ['?'])[0]}",
        "pictures": f"{log.steps * recipe.get('batch_size', 0):,} of {recipe.get('pictures', 0):,}",
        "machine": f"{facts['device']}, {facts['precision']}, torch {facts['torch']}",
        "commit": f"`{facts['commit']}`",
        "at the end": ", ".join(f"{key} {value:.4f}" for key, value in last.items()),
    }
    if log.measures:
        held_out = {key: value for key, value in log.measures[-1].items() if key not in ("step", "seconds")}
        rows["on held-out pictures"] = ", ".join(f"{key} {value:.4f}" for key, value in held_out.items())
    return [
        f"### {_TITLES.get(stage, stage)}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {_cell(k)} | {_cell(v)} |" for k, v in rows.items()),
        "",
    ]


def _cell(text: Any) -> str:
    """A text in a Markdown table, as it is: no HTML, one line, one column."""
    return " ".join(html.escape(str(text), quote=False).replace("|", "\\|").split())


def write_model_card(
    folder: Path,
    logs: Mapping[str, Log],
    figures: Mapping[str, Any] | None = None,
    *,
    sheet: Figure | None = None,
    name: str = "",
) -> Path:
    """Write folder/README.md and folder/loss.png from training logs, stage by stage.

    figures: what was measured, name -> value or formatted text; None leaves the table for later. sheet: of captions
    (`caption_sheet`), saved as captions.png. name: of the model, if it is not the folder's.
    Raises ConeslabError for what is not one of the shipped models, or without logs.
    """
    name = name or folder.name
    if name not in _ABOUT:
        raise ConeslabError(f"{name} is not a shipped model: expected a folder named {' or '.join(_ABOUT)}")
    title, what, data, use = _ABOUT[name]
    kind = ["library_name: diffusers", "pipeline_tag: text-to-image"]
    if name == "judge":
        kind = ["library_name: transformers", "pipeline_tag: zero-shot-image-classification"]
    lines = ["---", "license: apache-2.0", *kind, "---", "", f"# {title}", "", what, "", "## Data", "", data, ""]
    lines += ["## Use", "", use, "", "## Training", ""]
    for stage, log in logs.items():
        lines += _run_table(stage, log)
    lines += [
        f"![Training loss of {title} over time, falling on a logarithmic axis](loss.png)",
        "",
        "## Figures",
        "",
    ]
    if figures:
        lines += ["| | |", "|---|---|"]
        lines += [f"| {_cell(k)} | {_cell(f'{v:.3f}' if isinstance(v, float) else v)} |" for k, v in figures.items()]
    else:
        lines += ["Not measured yet: `coneslab evaluate-model` prints them."]
    if sheet is not None:
        _save(sheet, folder / "captions.png", dpi=110)
        lines += ["", "![Sixteen captions, each with the model's picture and a real one](captions.png)"]
    _save(loss_curve(logs), folder / "loss.png", dpi=80)
    return write_whole(folder / "README.md", ("\n".join(lines) + "\n").encode())


def _save(figure: Figure, path: Path, *, dpi: int) -> None:
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=dpi)
