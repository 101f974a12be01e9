r"""Build the sprite atlas in `data/stickers/` from openly licensed emoji art (a maintainer's command).

Nothing here runs when coneslab is used: the world reads the finished atlas. To build it anew, fetch the art
with npm into a folder and name that folder's `node_modules`:

    npm install @lobehub/fluent-emoji-3d @iconify-json/fluent-emoji-flat \
        emoji-datasource-google emoji-datasource-twitter
    pip install 'coneslab[stickers]'
    coneslab build-stickers node_modules
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from .errors import ConeslabError
from .paths import data_folder

TILE = 64  # pixels; the longer side of every sprite fills it
COLUMNS = 11

SOURCES = {
    "3d": "@lobehub/fluent-emoji-3d",
    "flat": "@iconify-json/fluent-emoji-flat",
    "cartoon": "emoji-datasource-google",
    "twemoji": "emoji-datasource-twitter",
}


def sprite_codes(world: dict) -> dict[str, str]:
    """Map every sprite name ("cat", "doctor/man") to its Unicode code points, in the order of the atlas."""
    codes = {}
    for classes in world["classes"].values():
        for name, entry in classes.items():
            if "code" in entry:
                codes[name] = entry["code"]
            else:
                codes[f"{name}/man"], codes[f"{name}/woman"] = entry["man"], entry["woman"]
    return codes


def _read_art(node_modules: Path, style: str, code: str) -> Image.Image:
    package = node_modules / SOURCES[style]
    if style == "3d":
        return Image.open(package / "assets" / f"{code}.webp").convert("RGBA")
    if style == "flat":
        import resvg_py

        names = json.loads((package / "chars.json").read_text())
        icons = json.loads((package / "icons.json").read_text())
        icon = icons["icons"][names.get(code) or names[code.replace("-fe0f", "")]]
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256)))).convert("RGBA")
    folder = "google" if style == "cartoon" else "twitter"
    return Image.open(package / "img" / folder / "64" / f"{code}.png").convert("RGBA")


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


def build_atlas(node_modules: Path | str, world: dict) -> Path:
    """Write one atlas picture a style and `atlas.json` (sprite names in reading order); returns the folder.

    Raises ConeslabError if a package or a sprite is missing from `node_modules`.
    """
    node_modules = Path(node_modules)
    folder = data_folder() / "stickers"
    codes = sprite_codes(world)
    versions = {}
    for style, package in SOURCES.items():
        manifest = node_modules / package / "package.json"
        if not manifest.exists():
            raise ConeslabError(
                f"{node_modules} holds no {package}: install the four art packages with npm "
                "(see coneslab/stickers.py) and name their node_modules folder"
            )
        versions[style] = {"package": package, "version": json.loads(manifest.read_text())["version"]}
        rows = -(-len(codes) // COLUMNS)
        atlas = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
        for i, (name, code) in enumerate(codes.items()):
            try:
                tile = _fit(_read_art(node_modules, style, code))
            except (FileNotFoundError, KeyError) as error:
                raise ConeslabError(f"{package} has no art for {name} ({code}): choose another class") from error
            atlas.paste(tile, (i % COLUMNS * TILE, i // COLUMNS * TILE))
        atlas.save(folder / f"{style}.png", optimize=True)
    index = {"tile": TILE, "columns": COLUMNS, "sprites": list(codes), "sources": versions}
    (folder / "atlas.json").write_text(json.dumps(index, indent=1) + "\n")
    return folder
