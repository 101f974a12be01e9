"""Train the shipped models from scratch on the sticker world: autoencoder, U-Net with its text encoder, judge.

    coneslab pretrain all --runs runs        # then `coneslab pretrain export --runs runs`

Everything is kept under one `runs` folder and resumes where it was interrupted. Settings are data
(`coneslab.pretraining.recipe`). All parts are stock classes of diffusers and transformers, so the exported folder is a
plain `StableDiffusionPipeline`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from PIL import Image

from .. import checks, world
from ..diffusion.pipelines import load, write_sums
from ..diffusion.sampling import generate
from ..errors import ConeslabError, FileFormatError
from ..files import (
    SUMS,
    data_folder,
    read_json,
    read_table,
    replacing_folder,
    require_folder,
    require_writable,
    user_path,
    write_table,
    write_whole,
)
from ..measure.evaluation import evaluate_model
from ..measure.judge import load_judge
from .autoencoder import load_autoencoder, train_vae
from .judge import train_judge
from .loop import Log
from .model_cards import caption_sheet, write_model_card
from .recipe import Recipe, load_recipe
from .unet import build_tokenizer, train_unet

STAGES = ("vae", "unet", "judge", "decoder")
SHEET_SEED = 2026  # of the sixteen captions in the model card


def train(
    runs: Path, stages: Sequence[str], *, recipe: dict[str, Any] | None = None, minutes: float | None = None
) -> None:
    """Train stages ("vae", "unet", "judge", "decoder") in turn; a finished one is only saved again.

    U-Net and decoder build on runs/vae. recipe: as `load_recipe` returns it. minutes: a time budget for each stage.
    Raises ConeslabError for another stage, a budget of 0 or less, or without the autoencoder that a stage builds on.
    """
    stages = checks.texts("stages", stages, least=0)
    recipe = load_recipe() if recipe is None else recipe
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ConeslabError(f"{', '.join(unknown)}: no stage of the training; choose from {', '.join(STAGES)}")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise ConeslabError(f"minutes is {minutes}: give a positive number, or None for the recipe's budget alone")
    runs = require_writable(runs, folder=True)
    for stage in stages:
        settings = recipe[stage]
        options = settings["training"] | ({} if minutes is None else {"minutes": minutes})
        own = Recipe(**options | {"averages": tuple(options["averages"])})
        if stage in ("unet", "decoder") and not (runs / "vae" / "model").is_dir():
            raise ConeslabError(f"there is no autoencoder in {runs / 'vae'}: train it first (coneslab pretrain vae)")
        if stage == "unet":
            train_unet(runs, settings, own)
        elif stage == "judge":
            train_judge(runs, build_tokenizer(), settings, own)
        else:
            train_vae(runs, recipe["vae"], own, decoder=settings if stage == "decoder" else None)


TRIALS = data_folder() / "pretraining" / "trials.csv"


def note_trial(
    name: str, runs: Path, stage: str, changed: Sequence[str], *, judge: str | None = None
) -> dict[str, Any]:
    """Add the results of a short run as a row of `data/pretraining/trials.csv`; a row with that name is replaced.

    changed: what differed from the recipe. judge: if given, asked about a few pictures of a U-Net.
    Raises ConeslabError for a judge with another stage.
    """
    changed = checks.texts("changed", changed, least=0)
    if judge and stage != "unet":
        raise ConeslabError(f"a judge is asked about pictures of the U-Net, the stage is {stage!r}: leave it out")
    log = Log.load(runs / stage / "log.json")
    row: dict[str, Any] = {
        "trial": name,
        "stage": stage,
        "changed": " ".join(changed),
        "pictures": log.steps * log.facts["recipe"]["batch_size"],
        "minutes": round(log.seconds / 60, 1),
        "machine": f"{log.facts['device']}, {log.facts['precision']}",
        "weights": log.facts["weights"],
        **{key: round(value, 5) for key, value in log.measures[-1].items() if key not in ("step", "seconds")},
    }
    if judge:
        pipe = load(runs / "unet" / "model", device="cpu")
        report = evaluate_model(
            pipe,
            load_judge(judge),
            seeds=1,
            sampler_steps=12,
            kid_pictures=256,
            progress=False,
            beside_real=False,
        )
        row |= {share.name: round(share.interval.estimate, 3) for share in report.shares}
        row["KID"] = round(report.settings["KID"], 4)
    table = read_table(TRIALS, dtype={"trial": str}) if TRIALS.is_file() else pandas.DataFrame({"trial": []})
    table = pandas.concat([table[table.trial != name], pandas.DataFrame([row])], ignore_index=True)
    write_table(TRIALS, table)
    return row


def export(runs: Path, models: Path | None = None) -> Path:
    """Export the models trained under `runs` to the folder of shipped models, with model cards and checksums.

    The cards' figures are those in `results/evaluation_tiny.json` and `evaluation_judge.json` beside that folder, which
    `coneslab evaluate-model --json` writes.

    The U-Net's weights are stored in float16, everything else in float32. The autoencoder comes from runs/decoder if
    there is one, else from runs/vae. Raises ConeslabError if the U-Net or the judge is missing.
    """
    runs, models = user_path(runs), require_writable(models or data_folder() / "models", folder=True)
    for stage in ("unet", "judge"):
        if not (runs / stage / "model").is_dir():
            raise ConeslabError(f"there is no trained model in {runs / stage}: run coneslab pretrain {stage} first")
    pipe, decoder = load(runs / "unet" / "model", device="cpu"), runs / "decoder" / "model"
    pipe.vae = load_autoencoder(decoder if decoder.is_dir() else runs / "vae" / "model")
    require_folder(runs / "judge" / "model")
    pipe.unet.half().float()  # drawn with the weights that are stored
    logs = {
        stage: Log.load(runs / stage / "log.json")
        for stage in ("vae", "decoder", "unet")
        if (runs / stage / "log.json").is_file()
    }
    by_model = {"judge": {"judge": Log.load(runs / "judge" / "log.json")}, "tiny": logs}
    figures = {name: _evaluated(models.parent / "results" / f"evaluation_{name}.json") for name in by_model}
    pictures = world.sample(16, seed=SHEET_SEED)
    real = [Image.fromarray(image) for image in pictures.images]
    sheet = caption_sheet(generate(pipe, pictures.captions, seed=SHEET_SEED), real, pictures.captions)
    pipe.unet.half()
    with replacing_folder(models / "tiny", "model_index.json") as folder:
        pipe.save_pretrained(folder, safe_serialization=True)
        for config in folder.rglob("*.json"):
            text = config.read_text(encoding="utf-8")  # the folder it was trained in means nothing elsewhere
            write_whole(config, re.sub(r'\n *"_name_or_path": "[^"]*",', "", text).encode())
        write_model_card(folder, by_model["tiny"], figures["tiny"], sheet=sheet, name="tiny")
    with replacing_folder(models / "judge", "config.json") as folder:
        shutil.copytree(runs / "judge" / "model", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SUMS))
        write_model_card(folder, by_model["judge"], figures["judge"], name="judge")
    write_sums(models)
    return models


def _evaluated(file: Path) -> dict[str, str] | None:
    """What `coneslab evaluate-model --json FILE` found, one line of text per share; None if it has not been run."""
    if not file.is_file():
        return None
    remedy = "restore it, or make it again with coneslab evaluate-model"
    found = read_json(file, remedy=remedy)
    try:
        return dict(map(_told, found["shares"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{file} is not what coneslab evaluate-model writes ({error!r}): {remedy}") from error


def _told(row: dict[str, Any]) -> tuple[str, str]:
    bar = "" if row["bar"] is None else f"; bar {row['bar']:g}: {'met' if row['met'] else 'missed'}"
    real = "" if row["real"] is None else f"; on real pictures {row['real']['estimate']:.3f}"
    interval = f"{row['estimate']:.3f} [{row['low']:.3f}, {row['high']:.3f}], n = {row['values']}"
    return row["name"], interval + bar + real
