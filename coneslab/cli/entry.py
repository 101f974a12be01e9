"""The command line: `coneslab COMMAND ...`; `coneslab COMMAND --help` says what each takes."""

from __future__ import annotations

import argparse
import codecs
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import __version__
from ..errors import ConeslabError, ConeslabWarning
from ..files import write_json, write_whole
from . import concepts, publish, reproduce, use
from .options import free_path, require_text, silence

_EPILOG = """\
Exit codes: 0 success; 1 the command ran, and what it found is bad (doctor); 2 it could not be done as asked, and stderr
says in a sentence what was given, what was expected and what to do; 130 interrupted; 141 nobody read on. --json prints
one JSON object to stdout, with messages on stderr, or writes it to a file. CONESLAB_TRACEBACK=1 shows where an error
came from.

  coneslab doctor                                    is everything there, and what will be slow?
  coneslab tour                                      find neurons, shut them, look: one minute
  coneslab find cat --out cat.safetensors
  coneslab generate "a sks cat in the snow" --edit cat.safetensors --out pictures
"""
_CLOSED = 141  # as a shell reports a program that wrote to a closed pipe
_IN_ASCII = {"→": "->", "“": '"', "”": '"', "…": "...", "×": "x", "–": "-", "−": "-", "·": "*", "Δ": "d"}  # noqa: RUF001


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="coneslab",
        description="Find, shut, take apart and remove concepts in text-to-image diffusion models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"coneslab {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    use.add_commands(commands)
    concepts.add_commands(commands)
    publish.add_commands(commands)
    reproduce.add_commands(commands)
    return top


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Tell the package's own warnings as its errors are told, without the line of code that they came from."""
    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, ConeslabWarning):
                _told(str(message))
            else:
                before(message, category, *where, **more)

        warnings.showwarning = show
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors are told in one sentence, without a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    resumes = False
    try:
        _print_anything()
        require_text(given)
        options = parser().parse_args(given)
        resumes = getattr(options, "resumes", False)
        return _run(options)
    except BrokenPipeError:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            silence(stream)
        return _CLOSED
    except KeyboardInterrupt:
        more = "; what was saved is kept, and the same command continues from there"
        return _told(f"interrupted{more if resumes else ''}", 130)
    except (ConeslabError, OSError) as error:
        _trace()
        return _told(str(error), 2)
    except Exception as error:
        _trace()
        return _told(f"something unforeseen went wrong ({type(error).__name__}: {error}); please report it", 2)
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:  # nobody reads on, or the disk is full
                silence(stream)


def _run(options: argparse.Namespace) -> int:
    where = getattr(options, "json", None)
    file = free_path(where, options, option="--json") if where and where != "-" else None
    with _warnings_in_one_line():
        found: Any = options.run(options)
    if file is not None and getattr(options, "read_again", False):
        write_json(file, found)
    elif where:
        text = json.dumps(found, indent=1) + "\n"
        sys.stdout.write(text) if file is None else write_whole(file, text.encode())
    return int(not found["ok"]) if isinstance(found, dict) and "ok" in found else 0


def _told(sentence: str, code: int = 0) -> int:
    print(f"coneslab: {' '.join(sentence.split())}", file=sys.stderr)
    return code


def _trace() -> None:
    """Let the error through, with its traceback, if that is wanted."""
    if os.environ.get("CONESLAB_TRACEBACK"):
        raise


def _print_anything() -> None:
    """Let terminals that know ASCII alone show something like what they cannot show, instead of an error."""
    codecs.register_error("coneslab", _like)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="coneslab")


def _like(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return "".join(_IN_ASCII.get(letter, ascii(letter)[1:-1]) for letter in letters), error.end
