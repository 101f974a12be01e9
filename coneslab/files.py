"""Where coneslab's data is, in a checkout and in an installed wheel; atomic writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from .errors import ConeslabError


@cache
def data_folder() -> Path:
    """The folder with `stickers/` and `models/`: inside the package in a wheel, beside it in a checkout.

    Raises ConeslabError if neither exists: the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent
    candidates = [package / "data"]
    if (checkout / "pyproject.toml").is_file():  # never take a stray `data` folder in site-packages for ours
        candidates.append(checkout / "data")
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise ConeslabError(
        f"coneslab's data folder is missing: looked for {' and '.join(str(folder) for folder in candidates)}. "
        "Install coneslab from its wheel or from a complete checkout (where data/ is beside the package)."
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to; that file replaces `path` when the block ends, and is removed if it fails.

    Missing folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write a file atomically: an interruption leaves the old file, or none, never half of a new one.

    Missing folders are created.
    """
    path = Path(path)
    with replacing(path) as unfinished:
        unfinished.write_bytes(data)
    return path
