"""Commands that make what coneslab ships or reports: `pretrain`, `evaluate-model`, `experiment`, `compare`, ..."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .. import checks
from ..errors import ConeslabError
from .options import add_json, add_judge, as_guidance_scale, as_seed, checked, positive, teller


def _pretrain(arguments: argparse.Namespace) -> None:
    import signal

    from .. import pretraining  # torch and diffusers take seconds to import, which --help should not
    from ..pretraining.recipe import load_recipe

    for sign in (signal.SIGINT, signal.SIGTERM):  # a run under nohup would ignore SIGINT; both save a checkpoint
        signal.signal(sign, signal.default_int_handler)
    stages = {
        "vae": ("vae",),
        "decoder": ("decoder",),
        "unet": ("unet",),
        "judge": ("judge",),
        "export": (),
        "all": ("vae", "unet", "judge", "decoder"),
    }[arguments.model]
    if arguments.decoder_only:
        stages = ("decoder",)
    pretraining.train(arguments.runs, stages, recipe=load_recipe(arguments.set), minutes=arguments.minutes)
    if arguments.trial:
        print(pretraining.note_trial(arguments.trial, arguments.runs, stages[-1], arguments.set, judge=arguments.judge))
    if arguments.model in ("export", "all"):
        print(f"written: {pretraining.export(arguments.runs, arguments.models)}")


def _add_pretrain(commands: argparse._SubParsersAction) -> None:
    """`coneslab pretrain MODEL`: train the shipped models from scratch."""
    pretrain = commands.add_parser("pretrain", help="train the shipped models from scratch, or resume")
    pretrain.add_argument(
        "model",
        choices=("vae", "decoder", "unet", "judge", "all", "export"),
        help="decoder: train only the autoencoder's decoder further, its latents stay the same; export: copy the "
        "trained models to the folder of shipped models; all: everything in turn",
    )
    pretrain.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints, logs, pictures (default: runs)")
    pretrain.add_argument("--models", type=Path, help="where to export to (default: the package's data/models)")
    pretrain.add_argument(
        "--minutes",
        type=checked(checks.number, float, interval="(0, inf)"),
        help="time budget per model; its learning rate ends at 0 then",
    )
    pretrain.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace a value of the recipe, such as unet.training.pictures=40000 (data/pretraining/recipe.toml)",
    )
    pretrain.add_argument("--trial", metavar="NAME", help="add the measurements to data/pretraining/trials.csv")
    pretrain.add_argument("--judge", help="of the new world: with --trial, asked about some pictures as well")
    pretrain.add_argument("--decoder-only", action="store_true", help="with vae: the same as decoder")
    pretrain.set_defaults(run=_pretrain, resumes=True)


def _add_asking(parser: argparse.ArgumentParser, *, seeds: int, kid: int) -> None:
    """Add the options of commands that ask a judge about a pipeline's pictures. seeds, kid: their defaults."""
    parser.add_argument("--seeds", type=positive, default=seeds, help="pictures per prompt, each in a different scene")
    parser.add_argument(
        "--limit", type=positive, help="at most this many classes, pairs, threes and fours: a quick look"
    )
    parser.add_argument(
        "--kid",
        type=checked(checks.count, least=0),
        default=kid,
        metavar="N",
        help="also the KID of N pictures and real ones",
    )
    parser.add_argument(
        "--world",
        choices=("shipped", "new"),
        default="shipped",
        help="new: the world with variety, which the next model is trained on",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")


def _world(arguments: argparse.Namespace) -> Any:
    from .. import new_world, world

    return new_world if arguments.world == "new" else world


def _evaluate_model(arguments: argparse.Namespace) -> dict[str, Any]:
    from .. import diffusion, measure

    place = _world(arguments)
    judge = measure.load_judge(arguments.judge)
    report = (
        measure.judge_accuracy(judge, seeds=arguments.seeds, limit=arguments.limit, seed=arguments.seed, world=place)
        if arguments.folder == "judge"
        else measure.evaluate_model(
            diffusion.load(arguments.folder, device=arguments.device),
            judge,
            seeds=arguments.seeds,
            sampler_steps=arguments.sampler_steps,
            guidance_scale=arguments.guidance_scale,
            limit=arguments.limit,
            extras=not arguments.bars_only,
            kid_pictures=arguments.kid,
            world=place,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
        )
    )
    teller(arguments)(report)
    return report.to_dict()


def _add_evaluate_model(commands: argparse._SubParsersAction) -> None:
    """`coneslab evaluate-model FOLDER`: the table of what a pipeline draws right."""
    evaluate = commands.add_parser(
        "evaluate-model",
        help="draw every class, pairs, threes and fours with a pipeline and print what the judge finds",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate.add_argument("folder", help='pipeline folder, hub id or "tiny"; "judge": the judge on real pictures')
    add_judge(evaluate)
    _add_asking(evaluate, seeds=8, kid=0)
    evaluate.add_argument("--sampler-steps", type=positive, default=25, help="sampler steps per picture")
    evaluate.add_argument("--guidance-scale", type=as_guidance_scale, default=3.0)
    evaluate.add_argument("--bars-only", action="store_true", help="leave out art style and colour")
    evaluate.add_argument("--batch-size", type=positive, default=16)
    evaluate.add_argument("--seed", type=as_seed, default=0)
    add_json(evaluate)
    evaluate.set_defaults(run=_evaluate_model)


def _experiment(arguments: argparse.Namespace) -> None:
    from .. import diffusion, experiments, measure

    setting = experiments.Setting(
        diffusion.load(arguments.model, device=arguments.device),
        measure.load_judge(arguments.judge),
        rounds=arguments.rounds,
        finetune_steps=arguments.finetune_steps,
        pictures=arguments.pictures,
        masks=arguments.masks,
    )
    subjects = arguments.subjects.split(",") if arguments.subjects else None
    table = experiments.run_experiment(
        arguments.name, setting, subjects=subjects, seeds=arguments.seeds, path=arguments.out
    )
    print(experiments.summarise(table).round(4).to_string(index=False))


def _add_experiment(commands: argparse._SubParsersAction) -> None:
    """`coneslab experiment NAME`: the tables behind the notebooks."""
    experiment = commands.add_parser(
        "experiment",
        help="make one of the notebooks' tables over subjects and seeds; continues an existing table",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = (
        "controls, precision, storage, damage, density, references, agreement, finders, together, conceptor, "
        "ablation, collateral"
    )
    experiment.add_argument("name", help=f"one of {names}")
    experiment.add_argument("--model", default="tiny", help="pipeline folder or hub id")
    add_judge(experiment)
    experiment.add_argument("--subjects", help="comma-separated names, such as cat, cat+car, hypernym:pet, object:cat")
    experiment.add_argument("--seeds", type=positive, default=3)
    experiment.add_argument("--rounds", type=positive, default=60, help="rounds of a search")
    experiment.add_argument("--finetune-steps", type=positive, default=100, help="steps of K-V fine-tuning (controls)")
    experiment.add_argument("--pictures", type=positive, default=1, help="pictures per prompt")
    experiment.add_argument("--masks", type=Path, default=Path("runs/masks"), help="where found neurons are kept")
    experiment.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")
    experiment.add_argument("--out", type=Path, help="the table (default: its place in data/results)")
    experiment.set_defaults(run=_experiment, resumes=True)


def _compare(arguments: argparse.Namespace) -> None:
    from .. import experiments
    from ..experiments.methods import METHODS

    try:
        settings = dict(json.loads(arguments.settings))
    except (ValueError, TypeError) as error:
        raise ConeslabError(f'--settings is {arguments.settings!r}: give JSON such as {{"steps": 50}}') from error
    methods = arguments.methods.split(";") if arguments.methods else tuple(METHODS)
    common = {
        "methods": methods,
        "model": arguments.model,
        "judge": arguments.judge,
        "folder": arguments.kept,
    }
    print(f"{arguments.scheduler or f'{arguments.workers} worker(s) with {arguments.threads} threads each'}")
    with experiments.dask_client(arguments.scheduler, workers=arguments.workers, threads=arguments.threads) as client:
        if arguments.tune:
            print(json.dumps(experiments.tune_methods(client=client, **common), indent=1))
            return
        table = experiments.compare_methods(
            arguments.out,
            counts=arguments.counts,
            seeds=arguments.seeds,
            subjects=arguments.subjects.split(",") if arguments.subjects else None,
            pictures=arguments.pictures,
            settings=settings,
            client=client,
            **common,
        )
    print(experiments.paper_table(table).to_string())
    if "error" in table and table.error.notna().any():
        raise ConeslabError(f"{int(table.error.notna().sum())} cells failed; the same command retries them")


def _counts(text: str) -> list[int]:
    """Parse numbers of subjects, such as 1,2, for argparse."""
    return [positive(one) for one in text.split(",")]


def _add_compare(commands: argparse._SubParsersAction) -> None:
    """`coneslab compare`: methods x subjects x seeds, the paper's table."""
    compare = commands.add_parser(
        "compare",
        help="methods x subjects and combinations x seeds, on Dask; continues an existing table",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    compare.add_argument("--methods", help="semicolon-separated names from coneslab.experiments.METHODS (default: all)")
    compare.add_argument("--tune", action="store_true", help="choose each method's settings on the tuning subjects")
    compare.add_argument("--counts", type=_counts, default="1,2,3,4", help="numbers of subjects in a picture")
    compare.add_argument("--subjects", help='comma-separated names and combinations, such as "cat,dog+house"')
    compare.add_argument("--seeds", type=positive, default=3)
    compare.add_argument("--pictures", type=positive, default=2, help="pictures per prompt")
    compare.add_argument("--model", default="tiny", help="pipeline folder or hub id")
    add_judge(compare)
    compare.add_argument("--scheduler", help="address of a Dask scheduler (default: a cluster on this machine)")
    compare.add_argument("--workers", type=positive, default=1, help="processes of the cluster on this machine")
    compare.add_argument("--threads", type=positive, default=2, help="threads in each process")
    compare.add_argument("--settings", default="{}", help='settings of all methods, as JSON, such as {"steps": 50}')
    compare.add_argument("--kept", type=Path, default=Path("runs/kept"), help="where edits of single subjects are kept")
    compare.add_argument("--out", type=Path, help="the table (default: data/results/methods.csv)")
    compare.set_defaults(run=_compare, resumes=True)


def _compare_samplers(arguments: argparse.Namespace) -> None:
    from .. import diffusion, measure

    choices = []
    for text in arguments.sampler:
        name, *numbers = text.split(",")
        try:
            steps, scale, first, last = [float(n) for n in numbers] + [3.0, 0.0, 1.0][len(numbers) - 1 :]
        except ValueError as error:
            raise ConeslabError(
                f"--sampler is {text!r}: give NAME,STEPS[,GUIDANCE[,FROM,TO]], such as UniPC,10,3,0,0.8"
            ) from error
        whole: Any = int(steps) if steps.is_integer() else steps
        choices.append(measure.Sampler(name, whole, scale, (first, last)))
    table = measure.compare_samplers(
        diffusion.load(arguments.folder, device=arguments.device),
        measure.load_judge(arguments.judge),
        choices,
        seeds=arguments.seeds,
        limit=arguments.limit,
        kid_pictures=arguments.kid,
        world=_world(arguments),
        out=arguments.out,
    )
    print(table.to_string(index=False))


def _add_compare_samplers(commands: argparse._SubParsersAction) -> None:
    """`coneslab compare-samplers FOLDER`: how few network calls a picture needs."""
    compare = commands.add_parser(
        "compare-samplers",
        help="how few network calls a picture needs: samplers compared on the same questions",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    compare.add_argument("folder", help='pipeline folder, hub id or "tiny"')
    add_judge(compare)
    compare.add_argument(
        "--sampler",
        action="append",
        required=True,
        metavar="NAME,STEPS[,GUIDANCE[,FROM,TO]]",
        help='repeatable; names: "DDIM", "DPM-Solver++ 2M", "UniPC"; FROM, TO: shares of the schedule with guidance',
    )
    _add_asking(compare, seeds=2, kid=512)
    compare.add_argument("--out", type=Path, help="the table, written after each sampler")
    compare.set_defaults(run=_compare_samplers, resumes=False)


def _build_stickers(arguments: argparse.Namespace) -> None:
    from ..new_world import DATA, atlas

    print(f"written: {atlas.build_atlas(arguments.node_modules, DATA)}")


def _add_build_stickers(commands: argparse._SubParsersAction) -> None:
    """`coneslab build-stickers NODE_MODULES`: the sprite atlas, for maintainers."""
    build = commands.add_parser("build-stickers", help="for maintainers: draw the sprite atlas from the emoji packages")
    build.add_argument("node_modules", type=Path, help="the node_modules folder that holds the art packages")
    build.set_defaults(run=_build_stickers)


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add all commands, in the order in which they are listed."""
    _add_compare(commands)
    _add_experiment(commands)
    _add_evaluate_model(commands)
    _add_compare_samplers(commands)
    _add_pretrain(commands)
    _add_build_stickers(commands)
