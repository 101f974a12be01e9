"""Files: where coneslab's data is, paths as people write them, whole writes, and checksums of what is read back.

What the package keeps has a SHA-256 of its contents, so that damage is noticed when it is read: tensors in the metadata
of their safetensors file, tables and JSON in a file beside them, `NAME.csv.sha256`, as the program sha256sum writes it,
so that they stay plain for everybody else. Tables and JSON without one are taken for hand-made, and read after a check
of their form alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import secrets
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import shown
from .errors import ArgumentError, ConeslabError, FileFormatError, MissingFileError, WriteError

if TYPE_CHECKING:  # they take seconds to import: left until a file is read or written
    import pandas
    from torch import Tensor

SUMS = "SHA256SUMS.json"  # the checksums of a model's folder
SUM = ".sha256"  # the ending of the file with the checksum of a table or of JSON
_AGAIN = "delete it, and it is made again"


@cache
def data_folder() -> Path:
    """The folder with `world/` and `models/`: inside the package in a wheel, beside it in a checkout.

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


# --- paths ----------------------------------------------------------------------------------------------


def user_path(path: str | Path) -> Path:
    """A path with "~" as the home folder. Raises ArgumentError for anything that is no path."""
    if not isinstance(path, str | os.PathLike) or "\0" in os.fspath(path):
        raise ArgumentError(f"a path is {shown(path)}: give a text or a pathlib.Path")
    return Path(os.path.expanduser(path))


def require_writable(path: str | Path, *, folder: bool = False) -> Path:
    """Check that a file, or files in a folder, can be written there, before there is something to lose; returns it.

    Missing folders are allowed and not made yet. Raises WriteError if a folder has the file's name or the other way
    round, or the place cannot be written.
    """
    path = user_path(path)
    try:
        if path.exists() and path.is_dir() != folder:
            raise WriteError(f"{path} is a {'file' if folder else 'folder'}: {_name_another(folder)}")
        if path.exists() and not os.access(path, os.W_OK):
            raise WriteError(f"{path} is write-protected: {_name_another(folder)}")
        if not folder and _is_stream(path):
            return path
        place = path if folder else Path(os.path.realpath(path)).parent
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise WriteError(f"{place} is not a folder, so there can be no {path}: {_name_another(folder)}")
        trial = place / _unfinished()
        trial.touch(exist_ok=False)
        trial.unlink()
    except WriteError:
        raise
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def _is_stream(path: Path) -> bool:
    """Whether this is written as it is: a device, or an open pipe such as /dev/stdout.

    Raises WriteError for a pipe on the disk, at which one might wait for ever.
    """
    target = Path(os.path.realpath(path))
    if not path.exists() or target.is_file() or target.is_dir():
        return False
    if target.exists() and not target.is_char_device():
        raise WriteError(f"{path} is no ordinary file: {_name_another(False)}")
    return True


def _name_another(folder: bool) -> str:
    return f"name another {'folder' if folder else 'file'}"


def _unfinished() -> str:
    """A name for what is being written: no pattern such as *.safetensors finds it, and no two writers share it."""
    return f".{secrets.token_hex(8)}.part"


def _unwritable(path: Path, error: Exception) -> WriteError:
    reason = getattr(error, "strerror", None) or str(error)
    told = WriteError(
        f"{path} could not be written ({reason}), and what was there before is unchanged: free some space, or choose "
        "another place"
    )
    told.errno = getattr(error, "errno", None)
    return told


# --- whole writes ---------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a path to write to; that file replaces `path` when the block ends, and is removed if it fails.

    Missing folders are created, links followed; what is no file, such as /dev/stdout, is written directly. Raises
    WriteError, with what was there unchanged, if the file cannot be written.
    """
    path = user_path(path)
    target = Path(os.path.realpath(path))
    if _is_stream(path):
        yield path
        return
    with _replacing(path, target) as unfinished:
        yield unfinished
        os.replace(unfinished, target)


def require_replaceable(folder: str | Path, mark: str) -> Path:
    """Check that a folder can be written as a whole: there is none, or it is empty or has a file named `mark`.

    Raises WriteError for a folder that holds anything else, which would be lost, or that cannot be written.
    """
    folder = require_writable(folder, folder=True)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise WriteError(f"{folder} holds other things, which would be lost: {_name_another(True)}")
    return folder


@contextmanager
def replacing_folder(folder: str | Path, mark: str) -> Iterator[Path]:
    """Gives a new empty folder; it replaces `folder` when the block ends, and is removed if it fails.

    mark: a file that such folders have, see `require_replaceable`. Raises WriteError, with what was there unchanged, if
    it cannot be written.
    """
    folder = require_replaceable(folder, mark)
    target = Path(os.path.realpath(folder))
    with _replacing(folder, target) as unfinished:
        unfinished.mkdir()
        yield unfinished
        before = target.with_name(_unfinished())
        if target.exists():
            os.rename(target, before)
        try:
            os.rename(unfinished, target)
        except OSError:
            if before.exists():
                os.rename(before, target)
            raise
        shutil.rmtree(before, ignore_errors=True)


@contextmanager
def _replacing(path: Path, target: Path) -> Iterator[Path]:
    from safetensors import SafetensorError  # how safetensors reports a full disk

    unfinished = target.with_name(_unfinished())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write a file atomically: an interruption or a full disk leaves the old file, or none, never half of a new one.

    Missing folders are created. Raises WriteError if it cannot be written.
    """
    with replacing(path) as unfinished:
        unfinished.write_bytes(data)
    return user_path(path)


# --- reading --------------------------------------------------------------------------------------------


def read_whole(path: str | Path) -> bytes:
    """The bytes of a file. Raises MissingFileError if there is none, FileFormatError if it cannot be read."""
    path = require_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


def require_file(path: str | Path) -> Path:
    """A path to an existing file. Raises MissingFileError if there is none, FileFormatError for a folder or a pipe."""
    path = user_path(path)
    try:
        if path.is_file():
            return path
        if not path.exists():
            link = f"{path} is a link to nothing" if path.is_symlink() else f"there is no file {path}"
            raise MissingFileError(f"{link}: check the name, or make it first")
        kind = "a folder" if path.is_dir() else "no ordinary file"
    except MissingFileError:
        raise
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise MissingFileError(f"there is no file {path} ({error.strerror}): check the name") from error
    raise FileFormatError(f"{path} is {kind}, expected a file: check the name")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file. Raises FileFormatError if it is damaged."""
    try:
        return tomllib.loads(read_whole(path).decode())
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML
        raise FileFormatError(f"{path} is no complete TOML file ({error}): correct or restore it") from error


# --- checksums: tensors ---------------------------------------------------------------------------------


def file_sum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_sum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256, in hex, of tensors on the CPU with their names, dtypes and shapes, and of metadata."""
    import torch

    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a safetensors file, with a checksum of it and of the tensors."""
    return {**metadata, "checksum": tensor_sum(tensors, metadata)}


def read_tensors(
    path: str | Path, format: str, *, what: str = "safetensors file", remedy: str = _AGAIN
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that was written with `sealed` metadata, whose "format" is `format`.

    what, remedy: for the error, what the file should be and what to do. Raises FileFormatError if the file is
    truncated, damaged or of another format, MissingFileError if there is none.
    """
    tensors, metadata = safetensors_in(path, what=what, remedy=remedy)
    require_sum(path, tensors, metadata, format, remedy=remedy)
    return tensors, metadata


def require_sum(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], format: str, *, remedy: str = _AGAIN
) -> None:
    """Take the checksum out of the metadata. Raises FileFormatError unless it is right, and the format that one."""
    if metadata.get("format") != format:
        raise FileFormatError(
            f"{path} is a safetensors file, but not a {format.split('/')[0].replace('.', ' ')}: its format is "
            f"{metadata.get('format')!r}, expected {format!r}; name another file"
        )
    if metadata.pop("checksum", "") != tensor_sum(tensors, metadata):
        raise FileFormatError(f"{path} is damaged: its contents do not match their checksum; {remedy}")


def safetensors_in(path: str | Path, *, what: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of any safetensors file, unchecked.

    Raises FileFormatError for any other file, MissingFileError if there is none.
    """
    from safetensors import safe_open

    path = require_file(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # safetensors raises different errors for different damage
        raise FileFormatError(
            f"{path} is not a complete {what} ({error}): it may be truncated, or of another format; {remedy}"
        ) from error


# --- checksums: folders ---------------------------------------------------------------------------------


def seal_folder(folder: Path) -> Path:
    """Write the checksums of all files of a model's folder into it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    sums = {path.relative_to(folder).as_posix(): file_sum(path) for path in files}
    return write_whole(folder / SUMS, (json.dumps(sums, indent=1) + "\n").encode())


def require_folder(folder: Path) -> None:
    """Check a folder against the checksums in it, if it has any. Raises FileFormatError for files that differ."""
    if not (folder / SUMS).is_file():
        return
    sums = read_json(folder / SUMS, remedy="restore the folder or save the model again")
    wrong = [
        name for name, digest in sums.items() if not (folder / name).is_file() or file_sum(folder / name) != digest
    ]
    if wrong:
        raise FileFormatError(
            f"{folder} is damaged: {', '.join(wrong)} does not match {SUMS} in it. Restore it or save the model again; "
            f"if you changed it on purpose, delete {SUMS}"
        )


# --- checksums: JSON and tables ------------------------------------------------------------------------------


def write_json(path: str | Path, value: Mapping[str, Any]) -> Path:
    """Write an object as JSON, whole, and its checksum beside it. Raises WriteError if it cannot be written."""
    return _write_text(path, (json.dumps(dict(value), indent=1) + "\n").encode())


def read_json(path: str | Path, *, remedy: str = _AGAIN) -> dict[str, Any]:
    """Read an object that `write_json` wrote, or one without a checksum. remedy: for the error, what to do.

    Raises FileFormatError if the file is damaged, MissingFileError if there is none.
    """
    try:
        found = json.loads(_read_text(path, remedy).decode())
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON
        raise FileFormatError(f"{path} is not complete JSON ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} holds a {type(found).__name__}, expected a JSON object: {remedy}")
    return found


def write_table(path: str | Path, table: pandas.DataFrame) -> Path:
    """Write a table as CSV, whole, and its checksum beside it.

    Raises WriteError if it cannot be written; the old table is then as it was.
    """
    return _write_text(path, table.to_csv(index=False, lineterminator="\n").encode())


def read_table(path: str | Path, **options: Any) -> pandas.DataFrame:
    """Read a table that `write_table` wrote, or one without a checksum, made by hand. options: of `pandas.read_csv`.

    Raises FileFormatError if it does not match its checksum, or if one without is no complete CSV: no UTF-8, empty,
    rows of different lengths, a torn last line. Raises MissingFileError if there is none.
    """
    import pandas

    data = _read_text(path, "restore it, or delete it and measure again")
    try:
        _require_rectangle(data.decode())
        return pandas.read_csv(io.BytesIO(data), **options)
    except (ValueError, csv.Error) as error:  # pandas' errors of parsing are ValueErrors
        raise FileFormatError(f"{path} is not a complete table ({error}): correct, restore or delete it") from error


def _write_text(path: str | Path, data: bytes) -> Path:
    """Write a file, and beside it its checksum: first that of old and new, as a kill may leave either."""
    path = user_path(path)
    new, before = _sum_line(path, data), _sum_line(path, path.read_bytes()) if path.is_file() else ""
    write_whole(_beside(path), (before + new).encode())
    try:
        write_whole(path, data)
    except WriteError:
        if not before:
            _beside(path).unlink(missing_ok=True)
        raise
    write_whole(_beside(path), new.encode())
    return path


def _read_text(path: str | Path, remedy: str) -> bytes:
    """Read a file and compare it with the checksum beside it, if there is one."""
    path = require_file(path)
    data, beside = read_whole(path), _beside(path)
    if beside.exists() and _sum_line(path, data).encode() not in read_whole(beside).splitlines(keepends=True):
        raise FileFormatError(
            f"{path} does not match its checksum in {beside.name}, one of the two is damaged: {remedy}; if you changed "
            f"it on purpose, delete {beside.name}"
        )
    return data


def _beside(path: Path) -> Path:
    return path.with_name(path.name + SUM)


def _sum_line(path: Path, data: bytes) -> str:
    """As sha256sum writes it. Line ends do not count: git changes them on some systems."""
    unix = data.replace(b"\r\n", b"\n")
    return f"{hashlib.sha256(unix).hexdigest()}  {path.name}\n"


def _require_rectangle(text: str) -> None:
    if not text.endswith("\n"):
        raise ValueError("its last line has no end" if text else "it is empty")
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    if not rows or len(set(rows[0])) < len(rows[0]):
        raise ValueError("its columns need names, each once")
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise ValueError(f"row {number} has {len(row)} entries, the first one {len(rows[0])}")
