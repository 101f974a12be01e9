"""Options that commands share, and what they do."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .. import checks
from ..errors import ArgumentError, ConeslabError
from ..files import require_replaceable, require_writable, user_path

if TYPE_CHECKING:
    from ..diffusion.pipelines import Pipeline

Arguments = argparse.Namespace
EDIT = ".safetensors"  # what files of edits end in
PIPELINE = "model_index.json"  # the file that every pipeline folder has


# --- values -------------------------------------------------------------------------------------------


def checked(check: Callable[..., Any], read: Callable[[str], Any] = int, **options: Any) -> Callable[[str], Any]:
    """Parse a value for argparse, which tells what one of the `checks` says of it. options: its own."""

    def parse(text: str) -> Any:
        try:
            value = read(text)
        except ValueError:
            value = text
        try:
            return check("the value", value, **options)
        except ArgumentError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


positive = checked(checks.count)
positive_number = checked(checks.number, float, interval="(0, inf)")
as_seed = checked(checks.seed)
as_guidance_scale = checked(checks.number, float, interval=checks.GUIDED)
as_dose = checked(checks.dose, float)
as_text = checked(checks.text, str)
as_template = checked(checks.template, str)
as_word = checked(checks.word, str)


def several_positive(text: str) -> list[int]:
    """Parse positive whole numbers with commas between them, for argparse."""
    return [positive(part) for part in text.split(",")]


# --- options --------------------------------------------------------------------------------------------


class WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that ends in each option's default, where it has one and does not name it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default in (None, False, []) or "(default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


def add_command(
    commands: argparse._SubParsersAction, name: str, run: Callable[[Arguments], dict[str, Any]], what: str
) -> argparse.ArgumentParser:
    """Add a command that runs a function; what: what it does, for the list of commands and its own help."""
    made = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    made.set_defaults(run=run)
    return made


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json [FILE], and --force for it."""
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the results as JSON, to stdout or a file"
    )
    add_force(parser)


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add --force."""
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def add_judge(parser: argparse.ArgumentParser, default: str | None = "judge") -> None:
    """Add --judge; default None tells whether it was given."""
    parser.add_argument("--judge", default=default, help="a CLIP folder in the transformers format")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")


def add_common(parser: argparse.ArgumentParser, out: str, drawing: bool = True) -> None:
    """Add the options of every command that uses a pipeline. out: the help of --out; drawing: whether it draws."""
    parser.add_argument("--model", default="tiny", help='"tiny", a pipeline folder, or a hub id (default: tiny)')
    add_device(parser)
    parser.add_argument("--seed", type=as_seed, default=0, help="random seed (default: 0)")
    if drawing:
        parser.add_argument("--sampler-steps", type=positive, default=25, help="steps per picture (default: 25)")
        parser.add_argument(
            "--guidance-scale", type=as_guidance_scale, default=3.0, help="guidance scale (default: 3.0)"
        )
    parser.add_argument("--out", type=user_path, help=out)
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    add_json(parser)


# --- arguments ---------------------------------------------------------------------------------------


def require_text(arguments: list[str]) -> None:
    """Raise ConeslabError for an argument with bytes that are no text, which no prompt, name or report can hold."""
    for number, argument in enumerate(arguments, 1):
        if not _is_text(argument):
            raise ConeslabError(
                f"argument {number} has bytes that are no UTF-8 text ({ascii(argument)}): type it anew, or rename the "
                "file or folder"
            )


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def unused(arguments: Arguments, *names: str) -> str:
    """Those of these options that were given, with their dashes and commas between; empty if none was.

    They must have no default (`argparse.SUPPRESS`, None, False or an empty list), or all would count as given.
    """
    values = {name: getattr(arguments, name, None) for name in names}
    given = [name for name, value in values.items() if value is not None and value is not False and value != []]
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def refuse_unused(arguments: Arguments, where: str, *names: str) -> None:
    """Raise ConeslabError if one of these options was given, which has no effect here: where says where."""
    if given := unused(arguments, *names):
        raise ConeslabError(f"{given} has no effect {where}: leave it out")


# --- what they do ---------------------------------------------------------------------------------------


def teller(arguments: Arguments) -> Callable[..., None]:
    """A print function for messages: to stderr if the JSON object goes to stdout.

    When nobody reads what is printed any more, as after `| head`, the work goes on without.
    """
    stream = sys.stderr if getattr(arguments, "json", None) == "-" else sys.stdout

    def say(*words: Any) -> None:
        try:
            print(*words, file=stream, flush=True)
        except BrokenPipeError:
            silence(stream)

    return say


def silence(stream: TextIO) -> None:
    """Let a stream whose pipe is closed lead nowhere, or Python would complain at its end."""
    with suppress(OSError):  # it has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def load_pipeline(arguments: Arguments) -> Any:
    """The pipeline that --model names, on --device; with --quiet, without progress bars."""
    import diffusers
    import transformers

    from .. import diffusion

    if arguments.quiet:
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
    return diffusion.load(arguments.model, device=arguments.device)


def free_path(
    path: str | Path, arguments: Arguments, *, option: str = "--out", ending: str = "", mark: str = ""
) -> Path:
    """A path that may be written, checked before work begins.

    option: that names it; ending: that it must have; mark: for a folder that is written as a whole, see
    `files.require_replaceable`. Raises ConeslabError if it exists (and --force was not given), cannot be written, ends
    otherwise, or is to be written twice.
    """
    path = require_replaceable(path, mark) if mark else require_writable(path)
    if path.suffix.lower() != ending and ending:
        raise ConeslabError(f"{path} does not end in {ending}, as what is written there should: name another {option}")
    if (path.is_file() or path.is_dir() or path.is_symlink()) and not arguments.force:
        raise ConeslabError(f"{path} already exists: name another with {option}, or overwrite it with --force")
    if path.absolute() in (claimed := vars(arguments).setdefault("claimed", set())):
        raise ConeslabError(f"{path} would be written twice: name another with {option}")
    claimed.add(path.absolute())
    return path


_LONGEST = 60  # letters of a file's name


def file_name(text: str) -> str:
    """A text as a file name, without characters that some systems refuse; a long one is cut, and told from others."""
    name = re.sub(r"[^\w.]+", "-", text.strip()).strip("-.")
    return f"{name[:_LONGEST]}-{zlib.crc32(name.encode()):08x}" if len(name) > _LONGEST else name or "unnamed"


def command(arguments: Arguments, *words: Any) -> str:
    """A command to type for the same model, with everything quoted that a shell would take apart."""
    model = [] if arguments.model == "tiny" else ["--model", arguments.model]
    return shlex.join(["coneslab", *map(str, words), *model])


def drawing_options(arguments: Arguments) -> dict[str, Any]:
    """Options of `generate`."""
    return {"sampler_steps": arguments.sampler_steps, "guidance_scale": arguments.guidance_scale}


def is_folder(given: str, instead: str) -> bool:
    """Whether a folder is meant. Raises ConeslabError for a file, and for what reads as a folder that is not there."""
    path = user_path(given)
    if path.is_dir():
        return True
    if path.is_file():
        raise ConeslabError(f"{given} is a file: give a folder of pictures, or {instead}")
    inside = path.parent != Path(".") and path.parent.is_dir()  # as "a cat/dog" is not
    if given.startswith((".", "~")) or given.endswith(("/", os.sep)) or inside:
        raise ConeslabError(f"there is no folder {given}: check the name, or give {instead}")
    return False


def resolution(pipe: Pipeline) -> int:
    """The size of the pipeline's pictures, in pixels."""
    from ..diffusion.encoding import latent_shape

    return latent_shape(pipe)[1] * pipe.vae_scale_factor


def about_edit(edit: Any, path: Path) -> dict[str, Any]:
    """What --json says of an edit that was written."""
    return {"file": str(path), "kind": type(edit).__name__, "bytes": path.stat().st_size}


def say_if_nothing_is_shut(say: Callable[..., None], edit: Any) -> None:
    """Tell of a mask without neurons."""
    if hasattr(edit, "shut") and not len(edit.shut()):
        say("no neuron is shut, so the edit does nothing: search for more rounds")
