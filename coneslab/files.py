"""Where coneslab's own data lies: the same folder in a checkout and in an installed wheel."""

from functools import cache
from pathlib import Path

from .errors import ConeslabError


@cache
def data_folder() -> Path:
    """The folder with `stickers/` and `models/`: inside the package in a wheel, beside it in a checkout.

    Raises ConeslabError if neither is there, which means the installation is incomplete.
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
        "Install coneslab from its wheel or from a whole checkout (data/ lies beside the package there)."
    )
