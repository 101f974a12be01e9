r"""Build the sprite atlas in `data/world/` from openly licensed emoji art (for maintainers).

Nothing here runs when coneslab is used: the world reads the finished atlas. To rebuild it, install the art with npm
into a folder and pass that folder's `node_modules`:

    npm install @lobehub/fluent-emoji-3d @iconify-json/fluent-emoji-flat @iconify-json/noto @iconify-json/noto-v1 \
        @iconify-json/emojione emoji-datasource-google emoji-datasource-twitter
    pip install 'coneslab[stickers]'
    coneslab build-stickers node_modules
"""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ConeslabError, FileFormatError
from ..files import data_folder, read_whole, replacing, require_writable, user_path, write_json
from ..pictures import open_picture

TILE = 64  # pixels; the longer side of every sprite fills it
COLUMNS = 12

SOURCES = {
    "3d": "@lobehub/fluent-emoji-3d",
    "flat": "@iconify-json/fluent-emoji-flat",
    "cartoon": "emoji-datasource-google",
    "vintage": "@iconify-json/noto-v1",
    "bold": "@iconify-json/emojione",
    "twemoji": "emoji-datasource-twitter",
}
_NAMES = "@iconify-json/noto"  # Iconify's newest list of code points; its older sets take their names from it


def sprite_codes(world: dict) -> dict[str, str]:
    """Map every sprite ("cat/face", "doctor/man", "hat") to its Unicode code points, in the order of the atlas."""
    codes = {
        f"{name}/{drawing}": code
        for classes in world["classes"].values()
        for name, entry in classes.items()
        for drawing, code in entry["drawings"].items()
    }
    return codes | {"hat": world["hat"]["code"]}


@cache
def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(read_whole(path).decode()))
    except (ValueError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{path} is not complete JSON ({error}): install the art packages again") from error


def _drawn(package: Path, name: str) -> Image.Image:
    """Render an Iconify icon 256 pixels wide. Raises KeyError if the set lacks it."""
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise ConeslabError(
            "resvg-py, which draws SVG art, is not installed: pip install 'coneslab[stickers]'"
        ) from error
    icons = _json(package / "icons.json")
    alias: dict[str, Any] = {"parent": name}
    while "parent" in alias:
        name, alias = alias["parent"], icons.get("aliases", {}).get(alias["parent"], {})
    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    view = f"{left} {top} {width} {height}"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}">{icon["body"]}</svg>'
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256)))).convert("RGBA")


def _read_art(node_modules: Path, style: str, code: str) -> Image.Image:
    """One sprite as it is in the package. Raises FileNotFoundError or KeyError if the set lacks it."""
    package = node_modules / SOURCES[style]
    if style == "3d":
        return open_picture(package / "assets" / f"{code}.webp").convert("RGBA")
    if style in ("cartoon", "twemoji"):
        folder = "google" if style == "cartoon" else "twitter"
        return open_picture(package / "img" / folder / "64" / f"{code}.png").convert("RGBA")
    names = _json((package if style == "flat" else node_modules / _NAMES) / "chars.json")
    return _drawn(package, names.get(code) or names[code.replace("-fe0f", "")])


def _fit(art: Image.Image) -> Image.Image:
    """Trim transparent borders and scale so that the longer side fills a tile, centred."""
    box = art.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    art = art.crop(box)
    scale = TILE / max(art.size)
    size = (max(1, round(art.width * scale)), max(1, round(art.height * scale)))
    art = art.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    tile = Image.new("RGBA", (TILE, TILE))
    tile.paste(art, ((TILE - art.width) // 2, (TILE - art.height) // 2))
    return tile


def build_atlas(node_modules: Path | str, world: dict, folder: Path | None = None) -> Path:
    """Write one atlas picture per style and `atlas.json`, which lists what each holds, in reading order.

    Returns the folder. A set may lack a drawing. Raises ConeslabError, and writes nothing, if a package is missing
    from `node_modules`, or a drawing from every set.
    """
    node_modules = user_path(node_modules)
    folder = require_writable(folder or data_folder() / "world", folder=True)
    codes = sprite_codes(world)
    for package in (*SOURCES.values(), _NAMES):
        if not (node_modules / package / "package.json").exists():
            raise ConeslabError(
                f"{node_modules} holds no {package}: install the art packages with npm "
                f"(see {Path(__file__).name}) and pass their node_modules folder"
            )
    sources, sprites, sheets = {}, {}, {}
    for style, package in SOURCES.items():
        sources[style] = {"package": package, "version": _json(node_modules / package / "package.json")["version"]}
        tiles: dict[str, Image.Image] = {}
        for name, code in codes.items():
            try:
                tiles[name] = _fit(_read_art(node_modules, style, code))
            except (FileNotFoundError, KeyError):
                continue
        atlas = Image.new("RGBA", (COLUMNS * TILE, -(-len(tiles) // COLUMNS) * TILE))
        for i, tile in enumerate(tiles.values()):
            atlas.paste(tile, (i % COLUMNS * TILE, i // COLUMNS * TILE))
        sheets[style], sprites[style] = atlas, list(tiles)
    nowhere = [name for name in codes if not any(name in own for own in sprites.values())]
    if nowhere:
        raise ConeslabError(f"no package has art for {', '.join(nowhere)}: choose other code points")
    for style, atlas in sheets.items():
        with replacing(folder / f"{style}.png") as unfinished:
            atlas.save(unfinished, "PNG", optimize=True)
    index = {"tile": TILE, "columns": COLUMNS, "sprites": sprites, "sources": sources}
    write_json(folder / "atlas.json", index)
    return folder
