"""Commands that take concepts apart and remove them: `decompose`, `ablate`. As in `use`, each imports what it needs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import ConeslabError
from ..files import user_path
from .options import (
    EDIT,
    Arguments,
    about_edit,
    add_command,
    add_common,
    add_judge,
    as_seed,
    as_template,
    as_text,
    command,
    drawing_options,
    file_name,
    free_path,
    is_folder,
    load_pipeline,
    positive,
    refuse_unused,
    resolution,
    say_if_nothing_is_shut,
    teller,
    unused,
)

if TYPE_CHECKING:
    from ..diffusion.pipelines import Pipeline

ABLATIONS = ("model", "noise", "uce", "esd", "neurons", "prune", "unlearn")


# --- decompose ------------------------------------------------------------------------------------------


def _decompose(arguments: Arguments) -> dict[str, Any]:
    from ..measure.judge import judge_source, load_judge
    from ..methods.conceptor.image import decompose_image
    from ..methods.conceptor.learning import decompose
    from ..world.subjects import subject_from_folder

    say, own = teller(arguments), is_folder(arguments.concept, "a prompt")
    judge_source(arguments.judge)
    name = user_path(arguments.concept).resolve().name if own else ""
    if own:
        subject_from_folder(arguments.concept, "thing")  # refuses a folder that holds no pictures
    path = free_path(arguments.out or f"{file_name(name or arguments.concept)}{EDIT}", arguments, ending=EDIT)
    if own and (given := unused(arguments, "pictures")):
        say(f"{given} has no effect: the pictures of the folder are used")
    pipe = load_pipeline(arguments)
    judge = load_judge(arguments.judge, device=pipe.device)
    size = resolution(pipe)
    shown = subject_from_folder(arguments.concept, "thing", resolution=size).images if own else arguments.concept
    found = decompose(
        pipe,
        shown,
        judge,
        name=name,
        pictures=100 if arguments.pictures is None else arguments.pictures,
        steps=arguments.steps,
        sampler_steps=arguments.sampler_steps,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    found.save(path)
    words = found.top(arguments.top)
    say("\n".join([f"{'word':16} share of the sum", *(f"{word:16} {share:.3f}" for word, share in words)]))
    again = command(arguments, "generate", found.prompt, "--edit", path)
    say(f"written: {path}; “{found.prompt}” draws it: {again}")
    facts = {"concept": arguments.concept, **about_edit(found, path), "prompt": found.prompt, "words": dict(words)}
    if arguments.picture is not None:
        one = decompose_image(
            pipe,
            found,
            judge,
            seed=arguments.picture,
            sampler_steps=arguments.sampler_steps,
            guidance_scale=arguments.guidance_scale,
            progress=not arguments.quiet,
        )
        needed = f"{', '.join(one.words)} (similarity {one.similarity:.3f})"
        say(f"the picture from seed {arguments.picture} needs: {needed}")
        facts["picture"] = {"seed": arguments.picture, "words": list(one.words), "similarity": one.similarity}
    return facts


# --- ablate ---------------------------------------------------------------------------------------------


def _ablate(arguments: Arguments) -> dict[str, Any]:
    say = teller(arguments)
    _require_belonging(arguments, say)
    path = free_path(arguments.out or f"without-{file_name(arguments.target)}{EDIT}", arguments, ending=EDIT)
    if arguments.check:
        from ..measure.judge import judge_source, load_judge

        judge_source(arguments.judge or "judge")
    pipe = load_pipeline(arguments)
    judge = load_judge(arguments.judge or "judge", device=pipe.device) if arguments.check else None
    start = time.perf_counter()
    edit = _ablated(arguments, pipe)
    seconds = time.perf_counter() - start
    edit.save(path)
    say_if_nothing_is_shut(say, edit)
    say(f"written: {path}, {path.stat().st_size:,} bytes, in {seconds:.0f} s")
    facts = {
        "target": arguments.target,
        "anchor": arguments.anchor,
        "method": arguments.method,
        "seconds": seconds,
        **about_edit(edit, path),
    }
    if judge is None:
        say("is it gone? The same command with --check --force draws and measures")
        return facts
    from ..finetuning.samples import generate_once
    from ..methods.ablation.profile import KINDS, Profile, usual_probes
    from ..methods.ablation.report import evaluate_ablation
    from ..seeds import derived

    shown = (pipe, judge, edit, arguments.target, arguments.anchor)
    pictures = 16 if arguments.check_pictures is None else arguments.check_pictures
    options = {"pictures": pictures, "seed": arguments.seed, **drawing_options(arguments)}
    drawn = {**drawing_options(arguments), "seed": derived(arguments.seed, "pictures of the target")}
    own = generate_once(pipe, [arguments.target] * pictures, **drawn)
    word = arguments.target.split()[-1]
    probes = usual_probes(arguments.target, arguments.anchor, own, word=word, budget={"seed": arguments.seed})
    others = {"other": arguments.other}
    report = evaluate_ablation(*shown, others=others, probes=probes, progress=not arguments.quiet, **options)
    profile = Profile.of(report)
    prompts = report[~report.group.isin(KINDS)]
    say(prompts.pivot(index=["group", "prompt"], columns="measure", values="value").round(3).to_string())
    say(f"\nis it gone, or only avoided? {profile}")
    text = report.astype(object).where(report.notna(), None)  # JSON has no NaN
    return {**facts, "report": text.to_dict("records"), "verdict": profile.verdict}


def _require_belonging(arguments: Arguments, say: Callable[..., None]) -> None:
    """Raise ConeslabError for options that another method takes; say which others have no effect on this one."""
    method = arguments.method
    where = f"on the method {method}"
    if method not in ("model", "noise"):
        refuse_unused(arguments, f"{where}: it is for the methods model and noise", "parameters")
    if method not in ("model", "noise", "uce", "unlearn") and arguments.template:
        raise ConeslabError(
            f"--template is for the methods model, noise, uce and unlearn; {method} takes the target as it is"
        )
    if method not in ("uce", "unlearn") and not arguments.check:
        refuse_unused(arguments, f"{where} without --check: only uce and unlearn hold on to other prompts", "other")
    if not arguments.check:
        refuse_unused(arguments, "without --check", "judge", "check_pictures")
    idle = {"uce": ("steps", "pictures"), "prune": ("steps",)}.get(method, ())
    if given := unused(arguments, *idle):
        say(f"{given} has no effect {where}: nothing is trained")
    if method == "esd" and not arguments.check:
        say(f"the anchor has no effect {where}: it takes none")


def _ablated(arguments: Arguments, pipe: Pipeline) -> Any:
    from .. import methods
    from ..methods.ablation.concept_ablation import ablate
    from ..methods.ablation.prompts import one_pair

    target, anchor, method = arguments.target, arguments.anchor, arguments.method
    quiet: dict[str, Any] = {"progress": not arguments.quiet}
    steps = (100 if method == "unlearn" else 50) if arguments.steps is None else arguments.steps
    drawn: dict[str, Any] = {
        "pictures": 64 if arguments.pictures is None else arguments.pictures,
        "seed": arguments.seed,
        "sampler_steps": arguments.sampler_steps,
        "guidance_scale": arguments.guidance_scale,
    }
    templates = tuple(arguments.template) or ("{}",)
    if method == "uce":
        return methods.closed_form_edit(pipe, target, anchor, templates=templates, preserve=arguments.other)
    one_pair(pipe, target, anchor)
    if method == "unlearn":
        targets, anchors = ([text.format(one) for text in templates] for one in (target, anchor))
        return methods.unlearn(pipe, targets, anchors, preserve=arguments.other, steps=steps, **drawn, **quiet)
    if method == "esd":
        return methods.erase(pipe, target, steps=steps, **drawn, **quiet)
    if method == "neurons":
        return methods.ablating_neurons(pipe, target, anchor, rounds=steps, **drawn, **quiet).binary()
    if method == "prune":
        return methods.prune_feed_forward(pipe, target, anchor, **drawn)
    return ablate(
        pipe,
        target,
        anchor,
        objective=method,
        parameters=arguments.parameters or "cross_attention_kv",
        steps=steps,
        templates=templates,
        **drawn,
        **quiet,
    )


# --- their options --------------------------------------------------------------------------------------


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add both commands."""
    add = partial(add_command, commands)
    decompose = add("decompose", _decompose, "write a concept as a weighted sum of words (Conceptor)")
    decompose.add_argument("concept", type=as_text, help='a prompt, such as "a pet", or a folder of pictures')
    decompose.add_argument("--steps", type=positive, default=500, help="training steps (default: 500)")
    decompose.add_argument("--pictures", type=positive, help="pictures drawn for a prompt (default: 100)")
    decompose.add_argument("--top", type=positive, default=10, help="words to show (default: 10)")
    decompose.add_argument(
        "--picture", type=as_seed, metavar="SEED", help="also say which words this one picture needs"
    )
    add_judge(decompose)
    add_common(decompose, "output file (default: CONCEPT.safetensors)")

    ablate = add("ablate", _ablate, "make a model draw the anchor instead of the target, and check that it does")
    ablate.add_argument("target", type=as_text, help='what to remove, such as "a cat"')
    ablate.add_argument("anchor", type=as_text, help='what to draw instead, such as "a dog"')
    ablate.add_argument(
        "--method", choices=ABLATIONS, default="model", help="(default: model; unlearn trains the whole U-Net)"
    )
    ablate.add_argument(
        "--parameters",
        choices=("cross_attention_kv", "attention", "embedding", "all"),
        help="what the methods model and noise train (default: cross_attention_kv)",
    )
    ablate.add_argument("--steps", type=positive, help="training steps; for neurons, rounds (default: 50, unlearn 100)")
    ablate.add_argument("--pictures", type=positive, help="of the anchor, to train on (default: 64)")
    ablate.add_argument(
        "--template", action="append", type=as_template, default=[], help='a caption for both, such as "{} at night"'
    )
    ablate.add_argument(
        "--other", action="append", type=as_text, default=[], help="a prompt that should stay as it is, repeatable"
    )
    ablate.add_argument("--check", action="store_true", help="measure if it is gone, stays gone, and what else is lost")
    ablate.add_argument("--check-pictures", type=positive, help="per prompt of the check (default: 16)")
    add_judge(ablate, default=None)
    add_common(ablate, "output file (default: without-TARGET.safetensors)")
