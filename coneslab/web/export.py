"""A model for the browser, as a folder of static files: graphs, keys and values, words, edits, and the page."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .. import __version__, checks, world
from ..diffusion.checks import require_editable
from ..diffusion.encoding import encode_images, latent_shape, to_tensor
from ..diffusion.kvspace import KVSpace
from ..diffusion.pipelines import Pipeline, pipeline_fingerprint
from ..edits.weights import model_fingerprint
from ..errors import ArgumentError, ConeslabError
from ..files import replacing_folder, require_replaceable
from ..pictures import as_pictures
from .graphs import PRECISIONS, Graph, Precision, graphs
from .runtime import FILES, Runtime
from .sampling_table import sampling_table
from .shelf import Shelved, plain

MANIFEST = "manifest.json"
FORMAT = "coneslab.web/1"
PAGE = files("coneslab.web") / "page"
MOST_STEPS = 30
_CHECKED = "a cat"
_FITTED = 48  # pictures from which the small previews are fitted


def export_web(
    pipe: Pipeline,
    folder: str | Path,
    shelf: Sequence[Shelved] = (),
    *,
    precision: Precision = "float16",
    sampler_steps: int = 10,
    guidance_scale: float = 3.0,
    runtime: Runtime | None = None,
    home: str = "",
) -> dict[str, Any]:
    """Write the page and everything it needs into a folder, as a whole; returns the manifest.

    shelf: the edits that the page offers. precision: of the graphs' weights (`graphs`); keys and values are always
    float16, or float32 with "float32". sampler_steps, guidance_scale: where the page starts. runtime: see
    `fetch_runtime`; without one the page says that it was built without. home: the address of a site around the page.
    The manifest has: the fingerprints of the model, shapes, the sampler as numbers (`sampling_table`) for every number
    of steps that the page offers, the layout of the K-V matrices, the tokenizer, words to suggest, and every file's
    bytes and SHA-256.
    Raises ConeslabError for a pipeline or edit that a page cannot draw with, WriteError if the folder holds other
    things.
    """
    require_editable(pipe)
    require_replaceable(folder, MANIFEST)
    shelf = checks.items("shelf", shelf, Shelved, least=0)
    checks.choice("precision", precision, PRECISIONS)
    most = min(MOST_STEPS, pipe.scheduler.config.num_train_timesteps)
    sampler_steps = checks.count("sampler_steps", sampler_steps, most=most)
    guidance_scale = checks.number("guidance_scale", guidance_scale, checks.GUIDANCE)
    checks.text("home", home, blank=True)
    if runtime is not None:
        checks.of_kind("runtime", runtime, Runtime)
    names = [one.name for one in shelf]
    if len(set(names)) < len(names):
        raise ArgumentError(f"the names of edits are {', '.join(names)}: give each another one")
    plained = {one.name: plain(one.edit, pipe) for one in shelf}
    made = graphs(pipe, precision=precision, prompt=_CHECKED)
    contents: dict[str, bytes] = {f"{name}.onnx": graph.data for name, graph in made.items()}
    space = KVSpace(pipe)
    wide = precision == "float32"
    contents["keys_and_values.bin"] = (
        space.gather().cpu().to(torch.float32 if wide else torch.float16).numpy().tobytes()
    )
    edits = []
    for one in shelf:
        data, parts = plained[one.name]
        contents[f"edits/{one.name}.bin"] = data
        entry = {"name": one.name, "title": one.title, "prompt": one.prompt, "phrase": one.phrase}
        edits.append(entry | {"file": f"edits/{one.name}.bin", "parts": parts})
    if runtime is not None:
        contents |= {f"runtime/{name}": data for name, data in runtime.files.items()}
    channels, height, width = latent_shape(pipe)
    manifest = {
        "format": FORMAT,
        "coneslab": __version__,
        "model": pipeline_fingerprint(pipe),
        "keys_and_values": model_fingerprint(pipe),
        "precision": precision,
        "latents": [channels, height, width],
        "picture": [height * pipe.vae_scale_factor, width * pipe.vae_scale_factor],
        "layers": [
            {"label": layer.label, **row} for layer, row in zip(space.layout, space.layout.as_json(), strict=True)
        ],
        "tokenizer": _tokenizer(pipe),
        "words": _words(pipe),
        "preview": _preview(pipe),
        "check": _check(made),
        "start": {"sampler_steps": sampler_steps, "guidance_scale": guidance_scale},
        "sampler": [sampling_table(pipe, steps) for steps in range(1, most + 1)],
        "edits": edits,
        "runtime": None if runtime is None else {"version": runtime.version, "files": FILES},
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()
        },
    }
    with replacing_folder(folder, MANIFEST) as unfinished:
        for name, data in contents.items():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).write_bytes(data)
        for source in PAGE.iterdir():
            if source.is_file():
                (unfinished / source.name).write_bytes(_at_home(source.read_bytes(), home))
        (unfinished / MANIFEST).write_text(json.dumps(manifest, separators=(",", ":")) + "\n", encoding="utf-8")
    return manifest


def _at_home(page: bytes, home: str) -> bytes:
    """A file of the page, with a link to the site around it."""
    link = f'<p class="home"><a href="{html.escape(home)}">coneslab</a></p>' if home else ""
    return page.replace(b"<!-- home -->", link.encode())


def _check(made: Mapping[str, Graph]) -> dict[str, Any]:
    """A few numbers that a page must get from the start noise of seed 0: no graphics card is believed without."""
    unet, decoder = made["unet"], made["decoder"]
    shown = {"output": unet.outputs["output"][1], "pixels": decoder.outputs["pixels"][0]}
    numbers = {
        name: [float(f"{value:.6g}") for value in part.ravel()[:: part.size // 32]] for name, part in shown.items()
    }
    return {"prompt": _CHECKED, "timestep": float(unet.inputs["timestep"][0]), **numbers}


def _tokenizer(pipe: Pipeline) -> dict[str, Any]:
    """What a byte-pair tokenizer of CLIP's kind needs. Raises ConeslabError for one of another kind."""
    tokenizer = pipe.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != "</w>":
        raise ConeslabError(
            f"the tokenizer is a {type(tokenizer).__name__}, expected CLIP's, of byte pairs: a page can read with no "
            "other"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = [
        {"content": token.content, "id": number, "single_word": token.single_word, "special": token.special}
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
    ]
    return {
        "length": tokenizer.model_max_length,
        "begin": tokenizer.bos_token_id,
        "end": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
        "vocabulary": model["vocab"],
        "merges": merges,
        "added": added,
    }


def _words(pipe: Pipeline) -> list[dict[str, str]]:
    """Words to offer as one types, with what they are, as far as the tokenizer has them whole."""
    kinds: dict[str, list[str]] = {
        "thing": list(world.CLASSES),
        "place": [phrases[0] for phrases in world.SCENES.values()],
        "art style": [word for words in world.STYLE_WORDS.values() for word in words],
        "colour": list(world.COLOURS),
        "marking": list(world.MARKINGS),
        "rare token": list(world.RARE_TOKENS),
        "word": sorted(world.WORDS),
    }
    found: dict[str, str] = {}
    for kind, words in kinds.items():
        for word in words:
            if len(pipe.tokenizer(word, add_special_tokens=False).input_ids) == len(word.split()):
                found.setdefault(word, kind)
    return [{"word": word, "kind": kind} for word, kind in found.items()]


@torch.no_grad()
def _preview(pipe: Pipeline) -> list[list[float]]:
    """Red, green and blue in [-1, 1] of each latent pixel as a linear function of its latent: (3, channels + 1).

    Fitted to pictures of the sticker world; the last number is the constant. Good enough to watch a picture come.
    """
    pictures = as_pictures(list(world.sample(_FITTED, seed=0).images))
    latents = encode_images(pipe, pictures).float().cpu()
    size = (latents.shape[-2], latents.shape[-1])
    pixels = F.adaptive_avg_pool2d(to_tensor(np.stack([np.asarray(picture) for picture in pictures])), size)
    inputs = latents.movedim(1, -1).flatten(0, -2)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double()
    found = torch.linalg.lstsq(inputs, pixels.movedim(1, -1).flatten(0, -2).double(), driver="gelsd").solution.T
    return [[float(f"{value:.6g}") for value in row] for row in found.tolist()]
