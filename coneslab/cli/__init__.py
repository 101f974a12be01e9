"""The command line: `coneslab COMMAND ...`, which `make lab` installs beside Python.

`use` has the commands that find neurons and draw, `concepts` those that take concepts apart and remove them, `publish`
the one that puts a model on a page, `reproduce` those that make what ships or is reported. Builds on everything else;
each command imports what it needs when it runs.
"""

from __future__ import annotations

from .entry import main, parser

__all__ = [
    "main",
    "parser",
]
