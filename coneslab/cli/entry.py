"""The command line: `coneslab COMMAND ...`; `coneslab COMMAND --help` says what each takes."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import __version__
from ..errors import ArgumentError, ConeslabError, ConeslabWarning
from . import reproduce, use

_EPILOG = """\
Exit codes: 0 success; 1 something is wrong with the input, the files or the installation, and stderr says what;
2 the command was not understood, or a value in it makes no sense; 130 interrupted. --json prints one JSON object to
stdout, with messages on stderr, or writes it to a file.

  coneslab doctor                                    is everything there, and what will be slow?
  coneslab tour                                      find neurons, shut them, look: one minute
  coneslab find cat --out cat.safetensors
  coneslab generate "a sks cat in the snow" --edit cat.safetensors --out pictures
"""


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
    reproduce.add_commands(commands)
    return top


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Tell the package's own warnings as its errors are told, without the line of code that they came from."""
    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, ConeslabWarning):
                print(f"coneslab: {message}", file=sys.stderr)
            else:
                before(message, category, *where, **more)

        warnings.showwarning = show
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that coneslab raises on purpose are printed without a traceback."""
    options = parser().parse_args(arguments)
    try:
        with _warnings_in_one_line():
            found = options.run(options)
        where = getattr(options, "json", None)
        if where:
            text = json.dumps(found, indent=1) + "\n"
            if where == "-":
                sys.stdout.write(text)
            else:
                with open(where, "w", encoding="utf-8") as file:
                    file.write(text)
    except (ConeslabError, OSError) as error:
        print(f"coneslab: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    except KeyboardInterrupt:
        more = "; what was saved is kept, and the same command continues from there"
        print(f"coneslab: interrupted{more if getattr(options, 'resumes', False) else ''}", file=sys.stderr)
        return 130
    return int(not found["ok"]) if isinstance(found, dict) and "ok" in found else 0
