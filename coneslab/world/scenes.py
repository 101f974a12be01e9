"""The drawn scenes of the sticker world: backgrounds, painted with simple shapes, seeded.

A scene is painted at four times its size and scaled down, so edges are smooth. Painting is slow (milliseconds),
so the world paints `VARIANTS` of each scene once and reuses them, mirrored at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SCALE = 4
VARIANTS = 32
_S = SIZE * SCALE

Colour = tuple[int, int, int]


def _shade(random: Random, colour: Colour, spread: int = 10) -> Colour:
    shift = random.randint(-spread, spread)
    r, g, b = (min(255, max(0, c + shift)) for c in colour)
    return r, g, b


def _gradient(top: Colour, bottom: Colour) -> Image.Image:
    ramp = np.linspace(0, 1, _S)[:, None, None]
    pixels = (1 - ramp) * np.array(top) + ramp * np.array(bottom)
    return Image.fromarray(np.broadcast_to(pixels, (_S, _S, 3)).astype(np.uint8).copy())


def _hills(draw: ImageDraw.ImageDraw, random: Random, base: float, height: float, colour: Colour) -> None:
    """Fill everything under a smooth line at `base` (share of the picture's height) that rises by `height`."""
    phase, waves = random.uniform(0, 2 * math.pi), random.uniform(0.6, 1.4)
    line = [
        (x, _S * (base - height * (0.5 + 0.5 * math.sin(phase + waves * 2 * math.pi * x / _S))))
        for x in range(0, _S + 8, 8)
    ]
    draw.polygon([*line, (_S, _S), (0, _S)], fill=colour)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    draw.ellipse([_S * (x - radius), _S * (y - radius), _S * (x + radius), _S * (y + radius)], fill=colour)


def _cloud(draw: ImageDraw.ImageDraw, random: Random, colour: Colour = (255, 255, 255)) -> None:
    x, y, r = random.uniform(0.1, 0.9), random.uniform(0.08, 0.25), random.uniform(0.04, 0.07)
    for dx, k in ((-1.2, 0.8), (0, 1.1), (1.2, 0.75)):
        _disc(draw, x + dx * r, y, k * r, colour)


def _grass(random: Random) -> Image.Image:
    image = _gradient(_shade(random, (120, 196, 246)), (206, 236, 252))
    draw = ImageDraw.Draw(image)
    for _ in range(random.randint(1, 2)):
        _cloud(draw, random)
    _hills(draw, random, 0.52, 0.06, _shade(random, (126, 200, 92)))
    _hills(draw, random, 0.66, 0.05, _shade(random, (92, 176, 68)))
    return image


def _sea(random: Random) -> Image.Image:
    image = _gradient(_shade(random, (64, 190, 222)), (14, 76, 150))
    draw = ImageDraw.Draw(image)
    _hills(draw, random, 0.92, 0.05, (214, 190, 130))
    for _ in range(random.randint(2, 3)):
        x, height = random.random() * _S, random.uniform(0.18, 0.34) * _S
        bend = [(x + 10 * math.sin(i * 0.9 + x), _S * 0.95 - height * i / 9) for i in range(10)]
        draw.line(bend, fill=(32, 142, 96), width=12, joint="curve")
    for _ in range(random.randint(3, 6)):
        _disc(draw, random.random(), random.uniform(0.05, 0.6), random.uniform(0.012, 0.026), (190, 236, 248))
    return image


def _night(random: Random) -> Image.Image:
    image = _gradient((14, 18, 58), _shade(random, (48, 52, 110)))
    draw = ImageDraw.Draw(image)
    for _ in range(26):
        _disc(draw, random.random(), random.uniform(0, 0.7), random.uniform(0.006, 0.012), (250, 246, 214))
    x = random.uniform(0.12, 0.88)
    _disc(draw, x, 0.15, 0.09, (252, 240, 190))
    _disc(draw, x + 0.045, 0.13, 0.08, (20, 24, 66))
    _hills(draw, random, 0.78, 0.06, (22, 40, 44))
    return image


def _city(random: Random) -> Image.Image:
    image = _gradient((176, 206, 230), (226, 232, 236))
    draw = ImageDraw.Draw(image)
    x = -random.random() * 0.1
    while x < 1:
        width, top = random.uniform(0.13, 0.22), random.uniform(0.14, 0.45)
        wall = _shade(random, random.choice([(128, 138, 158), (158, 134, 126), (108, 122, 148)]), 8)
        draw.rectangle([_S * x, _S * top, _S * (x + width), _S * 0.8], fill=wall)
        for row in np.arange(top + 0.04, 0.72, 0.085):
            for column in np.arange(x + 0.025, x + width - 0.04, 0.06):
                lit = (252, 232, 150) if random.random() < 0.4 else (86, 98, 122)
                draw.rectangle([_S * column, _S * row, _S * (column + 0.032), _S * (row + 0.045)], fill=lit)
        x += width + 0.008
    draw.rectangle([0, _S * 0.78, _S, _S], fill=(92, 94, 102))
    for i in range(5):
        left = (i * 0.24 - random.random() * 0.02) * _S
        draw.rectangle([left, _S * 0.88, left + 0.12 * _S, _S * 0.9], fill=(236, 232, 214))
    return image


def _white(random: Random) -> Image.Image:
    return Image.new("RGB", (_S, _S), (255, 255, 255))


def _desert(random: Random) -> Image.Image:
    image = _gradient((250, 216, 140), (254, 238, 196))
    draw = ImageDraw.Draw(image)
    _disc(draw, random.uniform(0.15, 0.85), 0.15, 0.08, (255, 250, 226))
    _hills(draw, random, 0.58, 0.12, _shade(random, (232, 180, 104)))
    _hills(draw, random, 0.76, 0.12, _shade(random, (216, 156, 80)))
    return image


def _snow(random: Random) -> Image.Image:
    image = _gradient(_shade(random, (150, 178, 206)), (214, 226, 238))
    draw = ImageDraw.Draw(image)
    for _ in range(2):
        x, w = random.uniform(0, 1) * _S, random.uniform(0.18, 0.3) * _S
        peak = random.uniform(0.22, 0.34) * _S
        draw.polygon([(x - w, 0.66 * _S), (x, peak), (x + w, 0.66 * _S)], fill=(126, 146, 176))
        draw.polygon([(x - w * 0.3, peak + 0.12 * _S), (x, peak), (x + w * 0.3, peak + 0.12 * _S)], fill=(255,) * 3)
    _hills(draw, random, 0.64, 0.06, (246, 249, 253))
    for _ in range(20):
        _disc(draw, random.random(), random.random() * 0.9, random.uniform(0.008, 0.016), (255, 255, 255))
    return image


def _beach(random: Random) -> Image.Image:
    image = _gradient((110, 200, 250), (196, 234, 250))
    draw = ImageDraw.Draw(image)
    _disc(draw, random.uniform(0.12, 0.88), 0.14, 0.08, (255, 232, 110))
    draw.rectangle([0, _S * 0.42, _S, _S], fill=_shade(random, (38, 142, 196)))
    _hills(draw, random, 0.64, 0.05, (232, 248, 250))
    _hills(draw, random, 0.67, 0.05, _shade(random, (242, 216, 154), 6))
    return image


def _forest(random: Random) -> Image.Image:
    image = _gradient((160, 200, 150), (92, 146, 96))
    draw = ImageDraw.Draw(image)
    for depth, colour in ((0.56, (72, 124, 84)), (0.68, (40, 92, 60))):
        for i in range(6):
            x = (i / 5 + random.uniform(-0.07, 0.07)) * _S
            top, w = random.uniform(0.06, 0.2) * _S, random.uniform(0.09, 0.13) * _S
            draw.polygon([(x - w, depth * _S), (x, top), (x + w, depth * _S)], fill=_shade(random, colour, 6))
    _hills(draw, random, 0.68, 0.03, _shade(random, (84, 76, 44), 6))
    return image


def _room(random: Random) -> Image.Image:
    wall = random.choice([(238, 206, 186), (226, 200, 214), (240, 220, 180)])
    image = Image.new("RGB", (_S, _S), _shade(random, wall, 5))
    draw = ImageDraw.Draw(image)
    x = random.choice([0.06, 0.62]) * _S
    draw.rectangle([x, 0.1 * _S, x + 0.32 * _S, 0.42 * _S], fill=(250, 250, 250))
    draw.rectangle([x + 8, 0.1 * _S + 8, x + 0.32 * _S - 8, 0.42 * _S - 8], fill=(150, 208, 244))
    draw.rectangle([x + 0.155 * _S, 0.1 * _S, x + 0.165 * _S, 0.42 * _S], fill=(250, 250, 250))
    draw.rectangle([0, 0.7 * _S, _S, _S], fill=_shade(random, (164, 110, 68), 8))
    draw.rectangle([0, 0.68 * _S, _S, 0.71 * _S], fill=(246, 238, 228))
    for y in (0.79, 0.89):
        draw.line([(0, y * _S), (_S, y * _S)], fill=(136, 88, 52), width=3)
    return image


def _space(random: Random) -> Image.Image:
    image = _gradient((8, 6, 20), (30, 14, 52))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        _disc(draw, random.random(), random.random(), random.uniform(0.005, 0.011), (236, 236, 255))
    for _ in range(2):
        colour = random.choice([(196, 112, 84), (106, 146, 206), (176, 148, 200), (206, 182, 120)])
        x, y, r = random.random(), random.choice([0.1, 0.88]), random.uniform(0.07, 0.13)
        _disc(draw, x, y, r, colour)
        if random.random() < 0.5:
            box = [_S * (x - 1.7 * r), _S * (y - 0.35 * r), _S * (x + 1.7 * r), _S * (y + 0.35 * r)]
            draw.ellipse(box, outline=(226, 210, 190), width=5)
    return image


def _sunset(random: Random) -> Image.Image:
    image = _gradient(_shade(random, (96, 52, 120)), (252, 150, 70))
    draw = ImageDraw.Draw(image)
    _disc(draw, random.uniform(0.2, 0.8), 0.62, 0.15, (255, 220, 110))
    draw.rectangle([0, _S * 0.68, _S, _S], fill=(74, 36, 82))
    for i in range(5):
        y, x = 0.72 + 0.055 * i, random.uniform(0.2, 0.6)
        draw.line([(x * _S, y * _S), ((x + 0.25) * _S, y * _S)], fill=(238, 132, 84), width=5)
    return image


PAINTERS: dict[str, Callable[[Random], Image.Image]] = {
    "grass": _grass,
    "sea": _sea,
    "night": _night,
    "city": _city,
    "white": _white,
    "desert": _desert,
    "snow": _snow,
    "beach": _beach,
    "forest": _forest,
    "room": _room,
    "space": _space,
    "sunset": _sunset,
}


@cache
def backgrounds(scene: str) -> np.ndarray:
    """Return the scene's painted variants, uint8 (VARIANTS, 64, 64, 3)."""
    number = list(PAINTERS).index(scene)
    return np.stack(
        [
            np.asarray(PAINTERS[scene](Random(1000 * number + i)).resize((SIZE, SIZE), Image.Resampling.BOX))
            for i in range(VARIANTS)
        ]
    )
