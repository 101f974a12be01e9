"""The command that publishes a model: `export-web`, a page that draws in a reader's browser."""

from __future__ import annotations

import argparse
from typing import Any

from ..files import user_path
from .options import (
    Arguments,
    add_command,
    add_device,
    add_json,
    as_guidance_scale,
    drawing_options,
    free_path,
    load_pipeline,
    positive,
    refuse_unused,
    teller,
)


def _export_web(arguments: Arguments) -> dict[str, Any]:
    from .. import web

    say = teller(arguments)
    folder = free_path(arguments.folder, arguments, option="another DIR", mark=web.MANIFEST)
    if arguments.edits:
        refuse_unused(arguments, "with --edits: nothing is searched for", "rounds")
    runtime = None if arguments.without_runtime else web.fetch_runtime(arguments.kept)
    pipe = load_pipeline(arguments)
    if arguments.edits:
        shelf = web.shelf_of(pipe, arguments.edits)
    else:
        rounds = {} if arguments.rounds is None else {"rounds": arguments.rounds}
        shelf = web.default_shelf(pipe, arguments.kept, progress=not arguments.quiet, **rounds)
    options = {"precision": arguments.precision, **drawing_options(arguments)}
    manifest = web.export_web(pipe, folder, shelf, runtime=runtime, **options)
    sizes = {name: file["bytes"] for name, file in manifest["files"].items()}
    for one in shelf:
        say(f"on the shelf: {one.title}, {sizes[f'edits/{one.name}.bin']:,} bytes")
    say(f"written: {folder}, for any host of static files: python -m http.server --bind 127.0.0.1 --directory {folder}")
    return {"folder": str(folder), "edits": [one.name for one in shelf], "bytes": sizes}


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    what = "write a page that draws with a model in a browser, with nothing installed"
    export = add_command(commands, "export-web", _export_web, what)
    export.add_argument("folder", metavar="DIR", type=user_path, help="where to: files for any static host")
    export.add_argument("--model", default="tiny", help='"tiny", a pipeline folder, or a hub id (default: tiny)')
    export.add_argument(
        "--edits",
        nargs="+",
        type=user_path,
        metavar="PATH",
        help="files of edits, or folders of them, that the page offers (default: three subjects' concept neurons, "
        "which are searched for, and an ablation)",
    )
    export.add_argument("--rounds", type=positive, help="rounds of each of these searches (default: 40)")
    export.add_argument(
        "--kept", type=user_path, default="runs/web", help="where what is found and fetched is kept (default: runs/web)"
    )
    export.add_argument(
        "--precision",
        choices=("float32", "float16", "int8"),
        default="float16",
        help="of the weights in the files (default: float16)",
    )
    export.add_argument("--sampler-steps", type=positive, default=10, help="where the page starts (default: 10)")
    export.add_argument("--guidance-scale", type=as_guidance_scale, default=3.0, help="likewise (default: 3.0)")
    export.add_argument("--without-runtime", action="store_true", help="leave out ONNX Runtime, and fetch nothing")
    add_device(export)
    export.add_argument("--quiet", action="store_true", help="show no progress bars")
    add_json(export)
