"""Commands that make what coneslab ships or reports: `pretrain`, `evaluate-model`, `experiment`, `compare`, ..."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from .. import checks
from ..errors import ArgumentError, ConeslabError
from ..files import data_folder, require_writable, user_path
from .options import (
    WithDefaults,
    add_device,
    add_force,
    add_json,
    add_judge,
    as_guidance_scale,
    as_seed,
    checked,
    free_path,
    positive,
    positive_number,
    refuse_unused,
    several_positive,
    teller,
)


def _pretrain(arguments: argparse.Namespace) -> None:
    import signal

    from .. import pretraining  # torch and diffusers take seconds to import, which --help should not
    from ..measure.judge import judge_source
    from ..pretraining.recipe import load_recipe

    stages = _stages(arguments)
    for sign in (signal.SIGINT, signal.SIGTERM):  # a run under nohup would ignore SIGINT; both save a checkpoint
        signal.signal(sign, signal.default_int_handler)
    say, exports = teller(arguments), arguments.model in ("export", "all")
    recipe = load_recipe(arguments.set)
    if arguments.judge:
        judge_source(arguments.judge)
    if exports:
        require_writable(arguments.models or data_folder() / "models", folder=True)
    pretraining.train(arguments.runs, stages, recipe=recipe, minutes=arguments.minutes)
    if arguments.trial:
        say(pretraining.note_trial(arguments.trial, arguments.runs, stages[-1], arguments.set, judge=arguments.judge))
    if exports:
        say(f"written: {pretraining.export(arguments.runs, arguments.models)}")


_STAGES = {
    "vae": ("vae",),
    "decoder": ("decoder",),
    "unet": ("unet",),
    "judge": ("judge",),
    "export": (),
    "all": ("vae", "unet", "judge", "decoder"),
}


def _stages(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The stages to train. Raises ConeslabError for options that have no effect on them."""
    model = arguments.model
    where, stages = f"with pretrain {model}", _STAGES[model]
    if model not in ("vae", "decoder"):
        refuse_unused(arguments, where, "decoder_only")
    elif arguments.decoder_only:
        stages = ("decoder",)
    if model not in ("export", "all"):
        refuse_unused(arguments, where, "models")
    if model == "export":
        refuse_unused(arguments, where, "minutes", "set")
    if len(stages) != 1:
        refuse_unused(arguments, f"{where}: a trial is of one stage", "trial")
    if not arguments.trial or stages != ("unet",):
        refuse_unused(arguments, f"{where}: it is asked about trials of the U-Net", "judge")
    read = {*stages, *(["vae"] if "decoder" in stages else [])}
    for text in arguments.set:
        section = text.partition(".")[0].strip()
        if section in _STAGES and section not in read:
            raise ConeslabError(f"--set {text} has no effect {where}, which reads {' and '.join(sorted(read))}")
    return stages


def _add_pretrain(commands: argparse._SubParsersAction) -> None:
    """`coneslab pretrain MODEL`: train the shipped models from scratch."""
    pretrain = commands.add_parser("pretrain", help="train the shipped models from scratch, or resume")
    pretrain.add_argument(
        "model",
        choices=("vae", "decoder", "unet", "judge", "all", "export"),
        help="decoder: train only the autoencoder's decoder further, its latents stay the same; export: copy the "
        "trained models to the folder of shipped models; all: everything in turn",
    )
    pretrain.add_argument("--runs", type=user_path, default="runs", help="checkpoints, logs, pictures (default: runs)")
    pretrain.add_argument("--models", type=user_path, help="where to export to (default: the package's data/models)")
    pretrain.add_argument(
        "--minutes", type=positive_number, help="time budget per model; its learning rate ends at 0 then"
    )
    pretrain.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace a value of the recipe, such as unet.training.pictures=40000 (data/pretraining/recipe.toml)",
    )
    pretrain.add_argument("--trial", metavar="NAME", help="add the measurements to data/pretraining/trials.csv")
    pretrain.add_argument("--judge", help="with --trial, asked about some pictures as well")
    pretrain.add_argument("--decoder-only", action="store_true", help="with vae: the same as decoder")
    pretrain.set_defaults(run=_pretrain, resumes=True)


def _add_asking(parser: argparse.ArgumentParser, *, seeds: int, kid: int | None) -> None:
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
    add_device(parser)


def _evaluate_model(arguments: argparse.Namespace) -> dict[str, Any]:
    from .. import diffusion, measure
    from ..diffusion.pipelines import source_of

    if arguments.folder == "judge":
        names = ("sampler_steps", "guidance_scale", "bars_only", "kid", "batch_size", "device")
        refuse_unused(arguments, "on the judge, for which nothing is drawn", *names)
    if arguments.folder != "judge":
        source_of(arguments.folder)
    judge = measure.load_judge(arguments.judge)
    report = (
        measure.judge_accuracy(judge, seeds=arguments.seeds, limit=arguments.limit, seed=arguments.seed)
        if arguments.folder == "judge"
        else measure.evaluate_model(
            diffusion.load(arguments.folder, device=arguments.device),
            judge,
            seeds=arguments.seeds,
            sampler_steps=getattr(arguments, "sampler_steps", 25),
            guidance_scale=getattr(arguments, "guidance_scale", 3.0),
            limit=arguments.limit,
            extras=not arguments.bars_only,
            kid_pictures=arguments.kid or 0,
            batch_size=getattr(arguments, "batch_size", 16),
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
        formatter_class=WithDefaults,
    )
    evaluate.add_argument("folder", help='pipeline folder, hub id or "tiny"; "judge": the judge on real pictures')
    add_judge(evaluate)
    _add_asking(evaluate, seeds=8, kid=None)
    unset = argparse.SUPPRESS
    evaluate.add_argument("--sampler-steps", type=positive, default=unset, help="steps per picture (default: 25)")
    evaluate.add_argument(
        "--guidance-scale", type=as_guidance_scale, default=unset, help="guidance scale (default: 3.0)"
    )
    evaluate.add_argument("--bars-only", action="store_true", help="leave out art style and colour")
    evaluate.add_argument("--batch-size", type=positive, default=unset, help="pictures at a time (default: 16)")
    evaluate.add_argument("--seed", type=as_seed, default=0)
    add_json(evaluate)
    evaluate.set_defaults(run=_evaluate_model, read_again=True)


def _experiment(arguments: argparse.Namespace) -> None:
    from .. import experiments

    cluster, subjects = _cluster(arguments), _listed(arguments.subjects)
    experiments.require_experiment(arguments.name, subjects, arguments.out)
    require_writable(arguments.masks, folder=True)
    setting = experiments.Setting.named(
        arguments.model,
        arguments.judge,
        device=arguments.device,
        rounds=arguments.rounds,
        finetune_steps=arguments.finetune_steps,
        pictures=arguments.pictures,
        masks=arguments.masks.absolute(),
    )
    with cluster as client:
        table = experiments.run_experiment(
            arguments.name, setting, subjects=subjects, seeds=arguments.seeds, path=arguments.out, client=client
        )
    teller(arguments)(experiments.summarise(table).round(4).to_string(index=False))


def _cluster(arguments: argparse.Namespace) -> AbstractContextManager[Any]:
    """A Dask client of what was asked for, or of what is usual; nothing where a process usually computes alone.

    It starts with the block: what has no effect is refused now.
    """
    workers, threads = arguments.usual_cluster
    workers, threads = getattr(arguments, "workers", workers), getattr(arguments, "threads", threads)
    if arguments.scheduler:
        refuse_unused(arguments, "with --scheduler, which has its own workers", "workers", "threads")
    elif workers is None:
        refuse_unused(arguments, "without --workers: this process takes the threads that torch has", "threads")
        return nullcontext()
    return _started(teller(arguments), arguments.scheduler, workers, threads)


@contextmanager
def _started(say: Callable[[str], None], scheduler: str | None, workers: int, threads: int) -> Iterator[Any]:
    from ..experiments import dask_client

    say(scheduler or f"{workers} worker(s) with {threads} threads each")
    with dask_client(scheduler, workers=workers, threads=threads) as client:
        yield client


def _add_cluster(parser: argparse.ArgumentParser, *, workers: int | None, threads: int) -> None:
    """Add --scheduler, --workers and --threads, and what is usual without them; no workers: this process alone."""
    add, unset = parser.add_argument, argparse.SUPPRESS  # so that those without effect are known to have been given
    add("--scheduler", help="address of a Dask scheduler, in place of processes on this machine")
    usual = workers or "this process alone"
    add("--workers", type=positive, default=unset, help=f"processes on this machine (default: {usual})")
    add("--threads", type=positive, default=unset, help=f"threads in each of them (default: {threads})")
    parser.set_defaults(usual_cluster=(workers, threads))


def _listed(text: str | None) -> list[str] | None:
    """The entries of a comma-separated list, or None if it was not given."""
    return None if text is None else [part.strip() for part in text.split(",")]


def _add_experiment(commands: argparse._SubParsersAction) -> None:
    """`coneslab experiment NAME`: the tables behind the notebooks."""
    experiment = commands.add_parser(
        "experiment",
        help="make one of the notebooks' tables over subjects and seeds; continues an existing table",
        formatter_class=WithDefaults,
    )
    names = (
        "controls, precision, storage, damage, parts, sharing, density, references, agreement, finders, together, "
        "doses, conceptor, ablation, many-concepts, collateral"
    )
    experiment.add_argument("name", help=f"one of {names}")
    experiment.add_argument("--model", default="tiny", help="pipeline folder or hub id")
    add_judge(experiment)
    experiment.add_argument("--subjects", help="comma-separated names, such as cat, cat+car, hypernym:pet, object:cat")
    experiment.add_argument("--seeds", type=positive, default=3)
    experiment.add_argument("--rounds", type=positive, default=60, help="rounds of a search")
    experiment.add_argument("--finetune-steps", type=positive, default=100, help="steps of K-V fine-tuning (controls)")
    experiment.add_argument("--pictures", type=positive, default=1, help="pictures per prompt")
    experiment.add_argument("--masks", type=user_path, default="runs/masks", help="where found neurons are kept")
    _add_cluster(experiment, workers=None, threads=1)
    add_device(experiment)
    experiment.add_argument("--out", type=user_path, help="the table (default: its place in data/results)")
    experiment.set_defaults(run=_experiment, resumes=True)


def _compare(arguments: argparse.Namespace) -> None:
    from .. import experiments
    from ..diffusion.pipelines import source_of
    from ..experiments.methods import METHODS
    from ..measure.judge import judge_source

    say, settings = teller(arguments), _settings(getattr(arguments, "settings", "{}"))
    if arguments.tune:
        names = ("counts", "subjects", "seeds", "pictures", "sampler_steps", "settings", "out")
        refuse_unused(arguments, "with --tune, which has subjects and a table of its own", *names)
    if arguments.subjects:
        refuse_unused(arguments, "with --subjects, which names the combinations as well", "counts")
    cluster = _cluster(arguments)
    counts = getattr(arguments, "counts", (1, 2, 3, 4))
    methods = arguments.methods.split(";") if arguments.methods else tuple(METHODS)
    subjects = _listed(arguments.subjects)
    experiments.require_comparison(arguments.out, methods, counts, subjects, arguments.kept, settings)
    source_of(arguments.model)
    judge_source(arguments.judge)
    common = {
        "methods": methods,
        "model": arguments.model,
        "judge": arguments.judge,
        "folder": arguments.kept,
    }
    with cluster as client:
        if arguments.tune:
            say(json.dumps(experiments.tune_methods(client=client, **common), indent=1))
            return
        table = experiments.compare_methods(
            arguments.out,
            counts=counts,
            seeds=getattr(arguments, "seeds", 3),
            subjects=subjects,
            pictures=getattr(arguments, "pictures", 2),
            sampler_steps=getattr(arguments, "sampler_steps", 12),
            settings=settings,
            client=client,
            **common,
        )
    failed = table[table.error.notna()] if "error" in table else table[:0]
    if len(failed) < len(table):
        say(experiments.paper_table(table).to_string())
    if len(failed):
        which = f"{len(failed)} cells" if len(failed) < len(table) else f"all {len(table)} cells"
        raise ConeslabError(f"{which} failed, the first with “{failed.error.iloc[0]}”; the same command tries again")


def _settings(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConeslabError(f'--settings is {text!r}: give JSON such as {{"steps": 50}}') from error
    if not isinstance(found, dict):
        raise ConeslabError(f'--settings is {text!r}: give a JSON object such as {{"steps": 50}}')
    return found


def _add_compare(commands: argparse._SubParsersAction) -> None:
    """`coneslab compare`: methods x subjects x seeds, the paper's table."""
    compare = commands.add_parser(
        "compare",
        help="methods x subjects and combinations x seeds, on Dask; continues an existing table",
        formatter_class=WithDefaults,
    )
    compare.add_argument("--methods", help="semicolon-separated names from coneslab.experiments.METHODS (default: all)")
    compare.add_argument("--tune", action="store_true", help="choose each method's settings on the tuning subjects")
    unset = argparse.SUPPRESS  # so that those without effect are known to have been given
    compare.add_argument(
        "--counts", type=several_positive, default=unset, help="numbers of subjects in a picture (default: 1,2,3,4)"
    )
    compare.add_argument("--subjects", help='comma-separated names and combinations, such as "cat,dog+house"')
    compare.add_argument("--seeds", type=positive, default=unset, help="seeds per subject (default: 3)")
    compare.add_argument("--pictures", type=positive, default=unset, help="pictures per prompt (default: 2)")
    compare.add_argument("--sampler-steps", type=positive, default=unset, help="steps of each picture (default: 12)")
    compare.add_argument("--model", default="tiny", help="pipeline folder or hub id")
    add_judge(compare)
    _add_cluster(compare, workers=1, threads=2)
    compare.add_argument(
        "--settings", default=unset, help='settings of all methods, as JSON, such as {"steps": 50} (default: none)'
    )
    compare.add_argument("--kept", type=user_path, default="runs/kept", help="where edits of single subjects are kept")
    compare.add_argument("--out", type=user_path, help="the table (default: data/results/methods.csv)")
    compare.set_defaults(run=_compare, resumes=True)


def _compare_samplers(arguments: argparse.Namespace) -> None:
    from .. import diffusion, measure
    from ..diffusion.pipelines import source_of

    choices = []
    for text in arguments.sampler:
        name, *numbers = text.split(",")
        try:
            scale, first, last = [float(n) for n in numbers[1:]] + [3.0, 0.0, 1.0][len(numbers[1:]) :]
            steps = positive(numbers[0])
        except (ValueError, IndexError, argparse.ArgumentTypeError) as error:
            raise ArgumentError(
                f"--sampler is {text!r}: give NAME,STEPS[,GUIDANCE[,FROM,TO]], such as UniPC,10,3,0,0.8"
            ) from error
        choices.append(measure.Sampler(name, steps, scale, (first, last)))
    out = None if arguments.out is None else free_path(arguments.out, arguments, ending=".csv")
    source_of(arguments.folder)
    pipe = diffusion.load(arguments.folder, device=arguments.device)
    table = measure.compare_samplers(
        pipe,
        measure.load_judge(arguments.judge, device=pipe.device),
        choices,
        seeds=arguments.seeds,
        limit=arguments.limit,
        kid_pictures=arguments.kid,
        out=out,
    )
    teller(arguments)(table.to_string(index=False))


def _add_compare_samplers(commands: argparse._SubParsersAction) -> None:
    """`coneslab compare-samplers FOLDER`: how few network calls a picture needs."""
    compare = commands.add_parser(
        "compare-samplers",
        help="how few network calls a picture needs: samplers compared on the same questions",
        formatter_class=WithDefaults,
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
    compare.add_argument("--out", type=user_path, help="the table, written after each sampler")
    add_force(compare)
    compare.set_defaults(run=_compare_samplers, resumes=False)


def _build_stickers(arguments: argparse.Namespace) -> None:
    from ..world import DATA, atlas

    teller(arguments)(f"written: {atlas.build_atlas(arguments.node_modules, DATA)}")


def _add_build_stickers(commands: argparse._SubParsersAction) -> None:
    """`coneslab build-stickers NODE_MODULES`: the sprite atlas, for maintainers."""
    build = commands.add_parser("build-stickers", help="for maintainers: draw the sprite atlas from the emoji packages")
    build.add_argument("node_modules", type=user_path, help="the node_modules folder that holds the art packages")
    build.set_defaults(run=_build_stickers)


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add all commands, in the order in which they are listed."""
    _add_compare(commands)
    _add_experiment(commands)
    _add_evaluate_model(commands)
    _add_compare_samplers(commands)
    _add_pretrain(commands)
    _add_build_stickers(commands)
