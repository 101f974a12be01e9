"""The command line: `coneslab pretrain ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .errors import ConeslabError


def _pretrain(arguments: argparse.Namespace) -> None:
    from . import pretrain  # torch and diffusers take seconds to import: not for --help

    if arguments.model == "vae":
        recipe = pretrain.DECODER if arguments.decoder_only else pretrain.VAE
        if arguments.minutes is not None:
            recipe = replace(recipe, minutes=arguments.minutes)
        pretrain.train_vae(arguments.runs, recipe, decoder_only=arguments.decoder_only)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="coneslab", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    pretrain = commands.add_parser("pretrain", help="train the shipped models from nothing")
    pretrain.add_argument("model", choices=("vae", "judge", "unet", "all"))
    pretrain.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints, logs and pictures (default: runs)")
    pretrain.add_argument("--minutes", type=float, help="time budget; the learning rate reaches 0 at its end")
    pretrain.add_argument("--decoder-only", action="store_true", help="vae: keep the encoder, go on with the decoder")
    pretrain.set_defaults(run=_pretrain)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that coneslab raises on purpose are printed without a traceback."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except ConeslabError as error:
        print(f"coneslab: {error}", file=sys.stderr)
        return 1
    return 0
