"""Options that commands share, and what they do."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import checks
from ..errors import ArgumentError, ConeslabError

Arguments = argparse.Namespace


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json [FILE]."""
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the results as JSON, to stdout or a file"
    )


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Add --judge."""
    parser.add_argument("--judge", default="judge", help="a CLIP folder in the transformers format")


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
as_seed = checked(checks.seed)
as_guidance_scale = checked(checks.number, float, interval=checks.GUIDANCE)
as_dose = checked(checks.dose, float)
as_text = checked(checks.text, str)
as_template = checked(checks.template, str)
as_word = checked(checks.word, str)


def teller(arguments: Arguments) -> Callable[..., None]:
    """A print function for messages: to stderr if the JSON object goes to stdout."""
    stream = sys.stderr if arguments.json == "-" else sys.stdout
    return lambda *words: print(*words, file=stream, flush=True)


def add_common(parser: argparse.ArgumentParser, out: str, drawing: bool = True) -> None:
    """Add the options of every command that uses a pipeline. out: the help of --out; drawing: whether it draws."""
    parser.add_argument("--model", default="tiny", help='"tiny", a pipeline folder, or a hub id (default: tiny)')
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--seed", type=as_seed, default=0, help="random seed (default: 0)")
    if drawing:
        parser.add_argument("--sampler-steps", type=positive, default=25, help="steps per picture (default: 25)")
        parser.add_argument(
            "--guidance-scale", type=as_guidance_scale, default=3.0, help="guidance scale (default: 3.0)"
        )
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    add_json(parser)


def load_pipeline(arguments: Arguments) -> Any:
    """The pipeline that --model names, on --device; with --quiet, without progress bars."""
    import diffusers
    import transformers

    from .. import diffusion

    if arguments.quiet:
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
    return diffusion.load(arguments.model, device=arguments.device)


def free_path(path: Path, arguments: Arguments) -> Path:
    """A path that may be written; creates its folder. Raises ConeslabError if the path already exists."""
    if path.exists() and not arguments.force:
        raise ConeslabError(f"{path} already exists: name another with --out, or overwrite it with --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def file_name(text: str) -> str:
    """A text as a file name, without characters that some systems refuse."""
    return re.sub(r"[^\w.]+", "-", text.strip()).strip("-.")[:60] or "unnamed"


def drawing_options(arguments: Arguments) -> dict[str, Any]:
    """Options of `generate`."""
    return {"sampler_steps": arguments.sampler_steps, "guidance_scale": arguments.guidance_scale}
