"""The sprites of the atlas: recoloured, marked, with a hat, and drawn at any size, angle and hue."""

from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from ..pictures import open_picture
from .captions import Plan
from .catalogue import ATLAS, COLOURS, DATA, FOLDER, HATS, MARKINGS, STYLES, full_drawing, known

TILE: int = ATLAS["tile"]


@cache
def _atlas(style: str) -> dict[str, np.ndarray]:
    columns = ATLAS["columns"]
    sheet = np.asarray(open_picture(FOLDER / f"{style}.png").convert("RGBA"))
    places = ((i // columns * TILE, i % columns * TILE) for i in range(len(ATLAS["sprites"][style])))
    return {
        name: sheet[y : y + TILE, x : x + TILE] for name, (y, x) in zip(ATLAS["sprites"][style], places, strict=True)
    }


_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def recoloured(pixels: np.ndarray, colour: str, *, darkest: float = 0.35) -> np.ndarray:
    """Map a sprite's brightness onto a ramp from black through a named colour to white; uint8 (h, w, 4).

    Outlines stay dark and highlights light. darkest: lower bound for the median brightness.
    """
    rgb, alpha = pixels[..., :3].astype(np.float32) / 255, pixels[..., 3:]
    light = rgb @ _LUMA
    pivot = float(np.clip(np.median(light[alpha[..., 0] > 127]), darkest, 0.8))
    dark = np.clip(light / pivot, 0, 1)[..., None]
    bright = np.clip((light - pivot) / (1 - pivot), 0, 1)[..., None]
    tint = np.array(DATA["colours"][colour], np.float32) / 255
    ramp = dark * tint * (1 - bright) + bright
    return np.concatenate([(255 * ramp).astype(np.uint8), alpha], -1)


@cache
def _pattern(marking: str) -> np.ndarray:
    """How much of a marking's tone lies on each pixel of a tile, float32 (64, 64, 1) in [0, 1], edges smooth."""
    kind, period = DATA["markings"][marking]["kind"], DATA["markings"][marking]["period"]
    y, x = np.mgrid[:TILE, :TILE].astype(np.float32) * (2 * math.pi / period)
    wave = np.sin((x + y) / math.sqrt(2)) - 0.3 if kind == "stripes" else np.sin(x) * np.sin(y) * 2 - 0.6
    return np.clip(0.5 + 2.5 * wave, 0, 1)[..., None].astype(np.float32)


def _marked(pixels: np.ndarray, marking: str) -> np.ndarray:
    """Lay a marking on a sprite: dark on a light one, light on a dark one."""
    rgb, alpha = pixels[..., :3].astype(np.float32), pixels[..., 3:]
    light = float((rgb[alpha[..., 0] > 127] @ _LUMA).mean())
    tone = rgb * 0.4 if light > 110 else 255 - (255 - rgb) * 0.4
    mixed = rgb + (tone - rgb) * _pattern(marking)
    return np.concatenate([mixed.astype(np.uint8), alpha], -1)


def _with_hat(pixels: np.ndarray, style: str, colour: str) -> np.ndarray:
    """A person in a hat of that colour: the sprite is shrunk, and the hat placed on its head."""
    tile = Image.new("RGBA", (TILE, TILE))
    tile.alpha_composite(Image.fromarray(pixels).resize((46, 46), Image.Resampling.LANCZOS), (9, 18))
    hat = Image.fromarray(recoloured(_atlas(style)["hat"], colour, darkest=0.15))
    tile.alpha_composite(hat.resize((36, 26), Image.Resampling.LANCZOS), (14, 0))
    return np.asarray(tile)


def sprite(
    name: str, style: str, colour: str | None = None, *, marking: str | None = None, hat: str | None = None
) -> np.ndarray:
    """Return one sprite of the atlas, uint8 RGBA (64, 64, 4): recoloured, marked or with a hat if asked.

    name: a class ("cat": its first drawing) or a drawing ("cat/whole"). Raises WorldError for what a style lacks.
    """
    drawing = full_drawing(name)
    pixels = _atlas(known(style, STYLES, "style"))[known(drawing, ATLAS["sprites"][style], f"sprite in {style!r}")]
    if colour is not None:
        pixels = recoloured(pixels, known(colour, COLOURS, "colour"))
    if marking is not None:
        pixels = _marked(pixels, known(marking, MARKINGS, "marking"))
    return pixels if hat is None else _with_hat(pixels, style, known(hat, HATS, "colour of a hat"))


_SCALES = (32, 40, 48, 64)  # sizes of cached sprites: from the next larger one, bilinear resampling suffices


@lru_cache(maxsize=12000)
def _kept(
    drawing: str, style: str, colour: str | None, marking: str | None, hat: str | None, side: int
) -> tuple[Image.Image, float, float]:
    """A sprite scaled to `side` pixels, premultiplied, with the width and height of its visible part."""
    pixels = sprite(drawing, style, colour, marking=marking, hat=hat)
    image = Image.fromarray(pixels).convert("RGBa").resize((side, side), Image.Resampling.BOX)
    alpha = pixels[..., 3] > 8
    return image, float(alpha.any(0).sum()) * side / TILE, float(alpha.any(1).sum()) * side / TILE


def colour_matrix(hue: float, saturation: float, lightness: float) -> np.ndarray:
    """Turn hue by degrees at equal brightness, scale saturation and lightness: float32 (3, 3), for rows of RGB.

    The hue matrix is that of Filter Effects Module 1 (W3C), feColorMatrix hueRotate; grey stays grey in it.
    """
    c, s = math.cos(math.radians(hue)) * saturation, math.sin(math.radians(hue)) * saturation
    grey = np.array([[0.213, 0.715, 0.072]] * 3)
    cosine = np.array([[0.787, -0.715, -0.072], [-0.213, 0.285, -0.072], [-0.213, -0.715, 0.928]])
    sine = np.array([[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]])
    return (lightness * (grey + c * cosine + s * sine)).T.astype(np.float32)


def rendered(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Premultiplied colour uint16 (h, w, 3) and alpha uint16 (h, w, 1) of a planned object, at its size and angle."""
    side = next(one for one in _SCALES if one >= min(plan.size, TILE))
    image, width, height = _kept(plan.drawing, plan.style, plan.colour, plan.marking, plan.hat, side)
    scale = plan.size / side
    cosine, sine = math.cos(math.radians(plan.angle)), math.sin(math.radians(plan.angle))
    w = math.ceil(scale * (width * abs(cosine) + height * abs(sine))) + 1
    h = math.ceil(scale * (width * abs(sine) + height * abs(cosine))) + 1
    flip = -1.0 if plan.mirrored else 1.0
    a, b, d, e = flip * cosine / scale, -flip * sine / scale, sine / scale, cosine / scale  # picture -> sprite
    c, f = side / 2 - a * w / 2 - b * h / 2, side / 2 - d * w / 2 - e * h / 2
    turned = np.asarray(image.transform((w, h), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR))
    alpha = turned[..., 3:]
    matrix = colour_matrix(plan.hue, plan.saturation, plan.lightness)
    colour = (turned[..., :3].reshape(-1, 3).astype(np.float32) @ matrix).reshape(h, w, 3)
    return np.clip(colour, 0, alpha).astype(np.uint16), alpha.astype(np.uint16)
