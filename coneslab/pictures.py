"""Pictures as people have them, made RGB, upright and eight bits deep: of PIL in any mode, files, arrays, tensors.

Nothing is guessed: what could be meant in two ways is refused. It needs no torch.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .checks import items, shown, warn
from .errors import ArgumentError, ConeslabError, FileFormatError
from .files import read_whole, user_path

if TYPE_CHECKING:
    from torch import Tensor

Picture: TypeAlias = "Image.Image | str | Path | np.ndarray | Tensor"
Images: TypeAlias = "Picture | Iterable[Picture]"  # one or several, see `as_pictures`

_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
_ORIENTATION = 0x0112  # the EXIF tag
_NOT_MEANT = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx"}  # systems put these into any folder


def as_pictures(given: Images, *, name: str = "pictures") -> list[Image.Image]:
    """One picture or several as RGB pictures, upright, on white where they are transparent.

    A picture is a PIL picture of any mode; the path of a file; or an array or tensor (height, width), (height, width,
    channels) or (channels, height, width) of 1, 3 or 4 channels, in which several are stacked (n, ...). A folder's path
    stands for its pictures, in the order of their names. Numbers are uint8, uint16, bool, other integers from 0 to 255,
    or floats from 0 to 1 or from 0 to 255. name: what messages call them.
    Raises ArgumentError for anything else and for no picture, FileFormatError for a file that cannot be read,
    MissingFileError for one that is not there.
    """
    single = isinstance(given, str | Path | Image.Image) or _is_array(given)
    made = [picture for one in ([given] if single else items(name, given)) for picture in _made(one, name)]
    if not made:
        raise ArgumentError(f"got no {name}: give at least one")
    return made


def read_picture(file: str | Path) -> Image.Image:
    """The picture in a file: RGB, upright. Raises FileFormatError if it is damaged, MissingFileError if missing."""
    with _damage_told(file):
        return _from_pil(open_picture(file), str(file))


def open_picture(file: str | Path) -> Image.Image:
    """The picture in a file as it is, of any mode. Raises FileFormatError if damaged, MissingFileError if missing."""
    data = io.BytesIO(read_whole(file))
    with _damage_told(file):
        picture = Image.open(data)
        picture.load()
        return picture


@contextmanager
def _damage_told(file: str | Path) -> Iterator[None]:
    try:
        yield
    except ConeslabError:
        raise
    except Exception as error:  # each of Pillow's readers has its own ways to say "damaged"
        reason = "none that is known" if isinstance(error, UnidentifiedImageError) else error
        raise FileFormatError(f"{file} cannot be read as a picture ({reason}): remove or replace it") from error


def key_of(facts: Sequence[Any], pictures: Iterable[Image.Image]) -> str:
    """16 hex digits for what is made from these facts and pictures: their sizes and pixels, in their order."""
    held = b"".join(repr(picture.size).encode() + picture.tobytes() for picture in pictures)
    return hashlib.sha256(repr(facts).encode() + held).hexdigest()[:16]


def picture_files(folder: str | Path) -> list[Path]:
    """The files of a folder that hold pictures, in the order of their names.

    Hidden files and what systems put into any folder are passed over; warns of all else that is left out.
    Raises ArgumentError if there is no picture, FileFormatError if the folder cannot be read.
    """
    folder = user_path(folder)
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    try:
        there = sorted(folder.iterdir())
    except OSError as error:
        raise FileFormatError(f"{folder} cannot be read ({error.strerror}): check its permissions") from error
    meant = [one for one in there if not one.name.startswith(".") and one.name.lower() not in _NOT_MEANT]
    files = [one for one in meant if one.suffix.lower() in endings and one.is_file()]
    names = [one.name for one in meant if one not in files]
    others = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    if not files:
        held = f", only {others}" if others else ""
        raise ArgumentError(f"{folder} holds no picture that can be read{held}: put PNG or JPEG files there")
    if others:
        warn(f"{others}: left out of {folder}, being no pictures that can be read here (PNG and JPEG can, HEIC cannot)")
    return files


# --- one thing after the other --------------------------------------------------------------------------


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def _made(one: Any, name: str) -> Iterator[Image.Image]:
    """The pictures that one entry of a list stands for."""
    if isinstance(one, Image.Image):
        yield _from_pil(one, name)
    elif isinstance(one, str | Path):
        for file in picture_files(one) if user_path(one).is_dir() else [one]:
            yield read_picture(file)
    elif _is_array(one):
        yield from _from_array(one, name)
    else:
        raise ArgumentError(
            f"got a {type(one).__name__} among the {name}, expected PIL pictures, paths, arrays or tensors"
        )


def _from_pil(picture: Image.Image, name: str) -> Image.Image:
    if not all(picture.size):
        raise ArgumentError(f"{name}: a picture of {picture.size[0]} by {picture.size[1]} pixels shows nothing")
    if picture.getexif().get(_ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGB" and "transparency" not in picture.info:
        picture.load()
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":  # PIL itself would clip them to white
        picture = Image.fromarray(_bytes(np.asarray(picture), name))
    if picture.mode in ("La", "RGBa"):  # multiplied by their transparency, which not every mode can be made from
        picture = picture.convert({"La": "LA", "RGBa": "RGBA"}[picture.mode])
    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    page = Image.new("RGBA", layer.size, "white")  # transparent pixels become white, not black
    page.alpha_composite(layer)
    return page.convert("RGB")


def _from_array(given: Any, name: str) -> Iterator[Image.Image]:
    values, first = given, False
    if hasattr(given, "detach"):  # a tensor: channels come first there, where both could be meant
        values, first = _numpy(given, name), True
    expected = (
        "(height, width, channels) or (channels, height, width) of 1, 3 or 4 channels, or several of them stacked"
    )
    shape = values.shape
    at = [place for place in ((-3, -1) if first else (-1, -3)) if len(shape) > 2 and shape[place] in _CHANNELS]
    if len(shape) not in (2, 3, 4) or (len(shape) > 2 and not at) or not values.size:
        raise ArgumentError(f"{name} are {shown(given)}: give {expected}")
    if len(shape) == 2:
        values, at = values[..., None], [-1]
    values = _bytes(np.moveaxis(values, at[0], -1), name)
    for pixels in values.reshape(-1, *values.shape[-3:]):
        yield _from_pil(Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[-1] > 1 else pixels[..., 0])), name)


def _numpy(tensor: Any, name: str) -> np.ndarray:
    try:
        values = tensor.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()
    except Exception as error:  # without values (meta), sparse, quantised
        raise ArgumentError(f"{name} are {shown(tensor)} whose numbers cannot be read: {error}") from error


def _bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Numbers of pictures as uint8; what is 1 or 65535 as 255 is decided for all of them together."""
    kind, wide = values.dtype.kind, values.dtype.itemsize > 1
    if kind not in "buif" or (kind == "f" and not np.isfinite(values).all()):
        raise ArgumentError(
            f"{name} hold {'NaN or infinity' if kind == 'f' else values.dtype}: give numbers from 0 to 255"
        )
    low, high = float(values.min()), float(values.max())
    if kind == "b":
        return values.astype(np.uint8) * 255
    if kind == "f" and low >= -1e-3 and high <= 1 + 1e-3:
        return np.rint(values.clip(0, 1).astype(np.float32) * 255).astype(np.uint8)
    if kind == "u" and wide and 0 < high <= 255:
        raise ArgumentError(
            f"{name} are {values.dtype} with no value above {high:g}: if they are 8 bits deep, give them as uint8"
        )
    if kind in "ui" and 255 < high <= 65535 and low >= 0:
        return np.rint(values / 257).astype(np.uint8)
    if low < 0 or high > 255:
        raise ArgumentError(
            f"{name} hold numbers from {low:g} to {high:g}: give uint8, uint16, or floats from 0 to 1 or from 0 to 255"
        )
    return np.rint(values).astype(np.uint8)
