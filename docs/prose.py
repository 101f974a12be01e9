"""coneslab's docstrings, which are plain prose, as reStructuredText.

They are written to be read in a terminal: names in single backticks, formulas in Unicode, arguments explained in
running text ("rounds: K. threshold: τ as an absolute value"), examples indented. Here names become links, arguments
and examples code, and everything else stays the words that it is.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import sys
from functools import cache
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.autodoc.preserve_defaults import update_default_value

import coneslab

ROOM = 108  # characters of a line in the package's longest-indented docstrings
MARKUP = re.compile(r"[\\*|_]")  # what reStructuredText would read something into
PIECES = re.compile(
    r"`(?P<code>[^`]+)`"
    r"|arXiv (?P<arxiv>\d{4}\.\d{4,5})"
    r"|\b(?P<error>[A-Z][a-z]\w+Error)\b"
    r"|(?<![\w.])(?P<arguments>[a-z]\w*(?:, [a-z]\w*)*)(?=:\s)"
)


@cache
def modules() -> tuple[str, ...]:
    """Full names of all modules and rooms, rooms first."""
    names = [module.name for module in pkgutil.walk_packages(coneslab.__path__, "coneslab.")]
    names.remove("coneslab.__main__")  # runs the command line, and has nothing to read
    return tuple(sorted(names, key=lambda name: (name.count("."), name)))


def module_named(name: str, home: ModuleType) -> str | None:
    """The full name of a module that `home` calls `name`: one of its own room, or one elsewhere ("show.plots").

    None if there is none.
    """
    room = home.__name__ if hasattr(home, "__path__") else home.__name__.rpartition(".")[0]
    own = f"{room}.{name}"
    return own if own in modules() else next((full for full in modules() if full.endswith(f".{name}")), None)


def full_name(name: str, home: ModuleType) -> str:
    """Where `name` is documented, looked up as the module that mentions it would: "KVGradient", "plots.show"."""
    name = name.removesuffix("()").removeprefix("coneslab.")
    first = name.partition(".")[0]
    found = getattr(home, first, None) or getattr(coneslab, first, None)
    if found is None or inspect.ismodule(found):
        for part in _from_the_longest(name):  # "world.subjects.subject": the module is the longest part that is one
            module = module_named(part, home)
            if module and ("." in name or module == f"coneslab.{name}"):  # a word alone is a room's name, or a word
                return offered(f"{module}{name.removeprefix(part)}")
    if getattr(found, "__module__", "").startswith("coneslab.") and hasattr(found, "__qualname__"):
        return f"{found.__module__}.{name}"
    return name


def offered(name: str) -> str:
    """The full name under which something is documented that a room offers: its own module's, where that has one."""
    module = next(part for part in _from_the_longest(name) if part in modules())
    rest = name[len(module) + 1 :]
    found = getattr(sys.modules.get(module), rest.partition(".")[0], None) if rest else None
    if getattr(found, "__module__", "").startswith("coneslab.") and hasattr(found, "__qualname__"):
        return f"{found.__module__}.{rest}"
    return name


def code(text: str, home: ModuleType = coneslab) -> str:
    """What stood between backticks: a link to a module or an object where it names one, else a literal."""
    if re.fullmatch(r"[\w/]+\.py", text) and (module := module_named(text[:-3].replace("/", "."), home)):
        return f":py:mod:`{text} <{module}>`"
    if re.fullmatch(r"[A-Za-z][\w.]*(\(\))?", text):
        return f":py:obj:`{text} <{full_name(text, home)}>`"
    return f"``{text}``"


def inline(text: str, arguments: frozenset[str] = frozenset(), home: ModuleType = coneslab) -> str:
    """One paragraph or line of prose, with nothing in it that could be mistaken for markup."""
    parts, end = [], 0
    for found in PIECES.finditer(text):
        parts.append(MARKUP.sub(r"\\\g<0>", text[end : found.start()]))
        parts.append(_piece(found, arguments, home))
        end = found.end()
    return "".join([*parts, MARKUP.sub(r"\\\g<0>", text[end:])])


def _piece(found: re.Match[str], arguments: frozenset[str], home: ModuleType) -> str:
    if found["code"] in arguments:
        shown = f"``{found['code']}``"
    elif found["code"]:
        shown = code(found["code"].replace("\n", " "), home)
    elif found["arxiv"]:
        shown = f"`arXiv {found['arxiv']} <https://arxiv.org/abs/{found['arxiv']}>`__"
    elif found["error"]:
        shown = f":py:exc:`{found['error']} <coneslab.errors.{found['error']}>`"
    elif set(names := found["arguments"].split(", ")) <= arguments:
        shown = ", ".join(f"**{name}**" for name in names)
    else:
        return MARKUP.sub(r"\\\g<0>", found[0])
    before, after = found.string[: found.start()][-1:], found.string[found.end() :][:1]
    return ("\\ " if before.strip() else "") + shown + ("\\ " if after.isalnum() else "")


def paragraphs(block: str) -> list[str]:
    """Parts that begin on a line of their own although there was room on the line before: so they were meant."""
    parts: list[list[str]] = [[]]
    for line in block.split("\n"):
        if parts[-1] and len(parts[-1][-1]) + 1 + len(line.split(" ")[0]) <= ROOM:
            parts.append([])
        parts[-1].append(line)
    return ["\n".join(part) for part in parts]


def to_rst(text: str, arguments: frozenset[str] = frozenset(), home: ModuleType = coneslab) -> str:
    """A docstring as reStructuredText: indented blocks and doctests stay code, other blocks are prose."""
    blocks = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if block.startswith("    "):
            blocks += ["::", block]
        elif block.startswith(">>> "):
            blocks.append(block)
        else:
            blocks += [inline(paragraph, arguments, home) for paragraph in paragraphs(block)]
    return "\n\n".join(blocks)


def arguments_of(thing: Any) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return frozenset()


def rewrite(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    home = sys.modules[next(part for part in _from_the_longest(name) if part in sys.modules)]
    lines[:] = [*to_rst("\n".join(lines), arguments_of(thing), home).split("\n"), ""]


def _from_the_longest(name: str) -> list[str]:
    """For "a.b.c": a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def defaults_as_written(app: Sphinx, thing: Any, bound_method: bool) -> None:
    """What `autodoc_preserve_defaults` does, but for functions that say themselves what their signature is.

    Their source lacks some of its parameters (`coneslab.settings.takes`), where Sphinx would look for the defaults.
    """
    if not hasattr(thing, "__signature__"):
        update_default_value(thing, bound_method)


def readable_defaults(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, arguments: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """`= <factory>` of a dataclass is no Python, and a signature with it would be shown unparsed."""
    return (arguments and arguments.replace("<factory>", "..."), result)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", rewrite)
    app.connect("autodoc-before-process-signature", defaults_as_written)
    app.connect("autodoc-process-signature", readable_defaults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
