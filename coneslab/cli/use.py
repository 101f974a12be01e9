"""Commands that use a model: `tour`, `find`, `generate`, `apply`, `decompose`, `ablate`, `doctor`.

Each imports what it needs when it runs: torch and diffusers take seconds, and --help should not. A command checks that
it can write its files before it draws or trains, and overwrites nothing unless told to.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConeslabError
from .options import (
    Arguments,
    add_common,
    add_json,
    add_judge,
    as_dose,
    as_seed,
    as_template,
    as_text,
    as_word,
    drawing_options,
    file_name,
    free_path,
    load_pipeline,
    positive,
    teller,
)

if TYPE_CHECKING:
    from ..diffusion.pipelines import Pipeline

ABLATIONS = ("model", "noise", "uce", "esd", "neurons", "prune")


# --- what commands share --------------------------------------------------------------------------------


def _subject(arguments: Arguments, pipe: Pipeline) -> Any:
    """A subject of the sticker world by name, or your own from a folder of pictures."""
    from ..world.subjects import subject

    if not Path(arguments.subject).is_dir():
        return subject(arguments.subject)
    if not arguments.class_word:
        raise ConeslabError(f"{arguments.subject} is a folder: say with --class-word what its pictures show, e.g. cat")
    token = {"token": arguments.token} if arguments.token else {}
    return _from_folder(arguments.subject, arguments.class_word, pipe, **token)


def _from_folder(folder: str, class_word: str, pipe: Pipeline, **options: Any) -> Any:
    """A subject with the folder's pictures in the pipeline's size."""
    from ..diffusion.encoding import latent_shape
    from ..world.subjects import subject_from_folder

    size = latent_shape(pipe)[1] * pipe.vae_scale_factor
    return subject_from_folder(folder, class_word, resolution=size, **options)


def _edits(paths: Sequence[Path]) -> list[Any]:
    from ..edits.base import load_edit

    return [load_edit(path) for path in paths]


def _about_edit(edit: Any, path: Path) -> dict[str, Any]:
    return {"file": str(path), "kind": type(edit).__name__, "bytes": path.stat().st_size}


# --- tour -----------------------------------------------------------------------------------------------


def _tour(arguments: Arguments) -> dict[str, Any]:
    from .. import world
    from ..diffusion.sampling import generate
    from ..edits.base import applied
    from ..neurons.controls import random_neurons
    from ..neurons.search import find_concept_neurons
    from ..show import plots

    say, folder = teller(arguments), arguments.out or Path("tour")
    subject = world.subject(arguments.subject)
    figure_file, edit_file = (
        free_path(folder / name, arguments) for name in ("tour.png", f"{subject.name}.safetensors")
    )
    pipe, start = load_pipeline(arguments), time.perf_counter()
    say(f"1. The subject: {len(subject.images)} pictures of “{subject.phrase}”, which the model has never seen.")
    found = find_concept_neurons(
        pipe, subject, rounds=arguments.rounds, seed=arguments.seed, progress=not arguments.quiet
    ).binary()
    seconds = time.perf_counter() - start
    say(f"2. Its concept neurons: {len(found):,} of {found.n:,} key and value weights, in {seconds:.0f} s.")
    edits = {"untouched": None, "random neurons": random_neurons(found, seed=arguments.seed), "concept neurons": found}
    rows = [list(subject.images[:4])]
    for edit in edits.values():
        with applied(edit, pipe):
            rows.append(generate(pipe, list(subject.prompts[:4]), seed=arguments.seed, **drawing_options(arguments)))
    figure = plots.picture_grid(
        rows, row_labels=["the subject", *edits], title=f"“{subject.prompt}” with neurons shut", size=1.4
    )
    figure_file.write_bytes(plots.to_png(figure))
    found.save(edit_file)
    say(
        f"3. Shut them and draw “{subject.prompts[0]}”, and others: {figure_file} has the pictures beside the controls."
    )
    say(f"   {edit_file} keeps the neurons: coneslab generate {subject.prompts[0]!r} --edit {edit_file}")
    say("4. Why it works, and whether it holds: notebooks/00_tour.ipynb (make lab).")
    return {
        "subject": subject.name,
        "neurons": found.n,
        "shut": len(found),
        "density": found.density,
        "seconds": seconds,
        "figure": str(figure_file),
        "edit": str(edit_file),
    }


# --- find -----------------------------------------------------------------------------------------------


def _find(arguments: Arguments) -> dict[str, Any]:
    from ..neurons.search import find_concept_neurons

    say, name = teller(arguments), file_name(Path(arguments.subject).name)
    path = free_path(arguments.out or Path(f"{name}.safetensors"), arguments)
    pipe = load_pipeline(arguments)
    subject, start = _subject(arguments, pipe), time.perf_counter()
    found = find_concept_neurons(
        pipe,
        subject,
        rounds=arguments.rounds,
        seed=arguments.seed,
        sampler_steps=arguments.sampler_steps,
        guidance_scale=arguments.guidance_scale,
        progress=not arguments.quiet,
    ).to(arguments.precision)
    seconds = time.perf_counter() - start
    found.save(path)
    say(found)
    say(f"written: {path}, {path.stat().st_size:,} bytes, in {seconds:.0f} s")
    say(f"try it:  coneslab generate {subject.prompts[0]!r} --edit {path}")
    layers = {row["layer"]: row["shut"] for row in found.per_layer()}
    return {
        "subject": subject.name,
        **_about_edit(found, path),
        "precision": arguments.precision,
        "neurons": found.n,
        "shut": len(found.shut()),
        "density": found.density,
        "shut by layer": layers,
        "seconds": seconds,
    }


# --- generate and apply ---------------------------------------------------------------------------------


def _generate(arguments: Arguments) -> dict[str, Any]:
    from PIL.PngImagePlugin import PngInfo

    from ..diffusion.sampling import generate

    say, folder = teller(arguments), arguments.out or Path("pictures")
    prompts = [prompt for prompt in arguments.prompts for _ in range(arguments.pictures)]
    seeds = [arguments.seed + number for _ in arguments.prompts for number in range(arguments.pictures)]
    files = [
        free_path(folder / f"{file_name(prompt)}_{seed}.png", arguments)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    if len(set(files)) < len(files):
        raise ConeslabError("a prompt was given twice, or two differ only in punctuation: give each once")
    edits, pipe = _edits(arguments.edit), load_pipeline(arguments)
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.applied(pipe, dose=arguments.dose))
        made = generate(pipe, prompts, seed=seeds, progress=not arguments.quiet, **drawing_options(arguments))
    written = []
    for picture, prompt, seed, file in zip(made, prompts, seeds, files, strict=True):
        facts = {"prompt": prompt, "seed": seed, "model": arguments.model, **drawing_options(arguments)}
        facts |= {"edits": [str(path) for path in arguments.edit], "dose": arguments.dose}
        note = PngInfo()
        note.add_itxt("coneslab", json.dumps(facts))
        picture.save(file, pnginfo=note)
        written.append({"file": str(file), **facts})
        say(f"written: {file}")
    return {"pictures": written}


def _apply(arguments: Arguments) -> dict[str, Any]:
    from ..diffusion.sampling import generate
    from ..show import plots

    say = teller(arguments)
    figure_file = free_path(arguments.out or Path("applied.png"), arguments)
    folder = arguments.save_model and free_path(arguments.save_model, arguments)
    edits, pipe = _edits(arguments.edits), load_pipeline(arguments)
    prompts = arguments.prompt or _prompts_of(edits)
    seeds = [arguments.seed + number for _ in prompts for number in range(arguments.pictures)]
    asked = [prompt for prompt in prompts for _ in range(arguments.pictures)]
    options = {"seed": seeds, "progress": not arguments.quiet, **drawing_options(arguments)}
    before = generate(pipe, asked, **options)
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.applied(pipe, dose=arguments.dose))
        after = generate(pipe, asked, **options)
        if folder:
            pipe.save_pretrained(folder)
    n = arguments.pictures
    rows = [before[i : i + n] + after[i : i + n] for i in range(0, len(asked), n)]
    heads = ["untouched", *[""] * (n - 1), "with the edit", *[""] * (n - 1)]
    labels = [f"“{prompt}”" for prompt in prompts]
    figure_file.write_bytes(plots.to_png(plots.picture_grid(rows, row_labels=labels, column_labels=heads)))
    say(f"written: {figure_file}")
    if folder:
        say(f"written: {folder}, a pipeline with the edit in its weights, for any program that reads diffusers folders")
    return {"figure": str(figure_file), "model": str(folder) if folder else None, "prompts": list(prompts)}


def _prompts_of(edits: Sequence[Any]) -> list[str]:
    """What to draw if nothing is asked for: prompts of the edits' subjects."""
    from ..world.subjects import SUBJECTS, subject

    names = [name for edit in edits for name in str(getattr(edit, "subject", "")).split("+") if name in SUBJECTS]
    if not names:
        raise ConeslabError("these edits do not say what to draw: give one or more with --prompt")
    return [prompt for name in dict.fromkeys(names) for prompt in subject(name).prompts[:2]]


# --- decompose ------------------------------------------------------------------------------------------


def _decompose(arguments: Arguments) -> dict[str, Any]:
    from ..measure.judge import load_judge
    from ..methods.conceptor.decomposition import decompose
    from ..methods.conceptor.image import decompose_image

    say, own = teller(arguments), Path(arguments.concept).is_dir()
    path = free_path(arguments.out or Path(f"{file_name(Path(arguments.concept).name)}.safetensors"), arguments)
    pipe = load_pipeline(arguments)
    judge = load_judge(arguments.judge, device=pipe.device)
    shown = _from_folder(arguments.concept, "thing", pipe).images if own else arguments.concept
    found = decompose(
        pipe,
        shown,
        judge,
        name=Path(arguments.concept).name if own else "",
        pictures=arguments.pictures,
        steps=arguments.steps,
        sampler_steps=arguments.sampler_steps,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    found.save(path)
    words = found.top(arguments.top)
    say("\n".join([f"{'word':16} share of the sum", *(f"{word:16} {share:.3f}" for word, share in words)]))
    say(f"written: {path}; {found.prompt!r} draws it: coneslab generate {found.prompt!r} --edit {path}")
    facts = {"concept": arguments.concept, **_about_edit(found, path), "prompt": found.prompt, "words": dict(words)}
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
    path = free_path(arguments.out or Path(f"without-{file_name(arguments.target)}.safetensors"), arguments)
    pipe, start = load_pipeline(arguments), time.perf_counter()
    edit = _ablated(arguments, pipe)
    seconds = time.perf_counter() - start
    edit.save(path)
    say(f"written: {path}, {path.stat().st_size:,} bytes, in {seconds:.0f} s")
    facts = {
        "target": arguments.target,
        "anchor": arguments.anchor,
        "method": arguments.method,
        "seconds": seconds,
        **_about_edit(edit, path),
    }
    if not arguments.check:
        say(f"is it gone? coneslab ablate {arguments.target!r} {arguments.anchor!r} --check ... draws and measures")
        return facts
    from ..measure.judge import load_judge
    from ..methods.ablation.report import attacks, evaluate_ablation

    judge = load_judge(arguments.judge, device=pipe.device)
    shown = (pipe, judge, edit, arguments.target, arguments.anchor)
    options = {"pictures": arguments.check_pictures, "seed": arguments.seed, **drawing_options(arguments)}
    report = evaluate_ablation(*shown, others={"other": arguments.other}, progress=not arguments.quiet, **options)
    say(report.pivot(index=["group", "prompt"], columns="measure", values="value").round(3).to_string())
    back = attacks(*shown, word=arguments.target.split()[-1], **options)
    say("\ndoes it come back? The share of pictures that show it, and its 95 % interval:")
    say(back.round(2).to_string(index=False))
    text = report.astype(object).where(report.notna(), None)  # JSON has no NaN
    return {**facts, "report": text.to_dict("records"), "attacks": back.to_dict("records")}


def _ablated(arguments: Arguments, pipe: Pipeline) -> Any:
    from .. import methods
    from ..methods.ablation.concept_ablation import ablate

    target, anchor, method = arguments.target, arguments.anchor, arguments.method
    quiet: dict[str, Any] = {"progress": not arguments.quiet}
    drawn: dict[str, Any] = {
        "pictures": arguments.pictures,
        "seed": arguments.seed,
        "sampler_steps": arguments.sampler_steps,
        "guidance_scale": arguments.guidance_scale,
    }
    templates = tuple(arguments.template) or ("{}",)
    if method == "uce":
        return methods.closed_form_edit(pipe, target, anchor, templates=templates, preserve=arguments.other)
    if method in ("esd", "neurons", "prune") and arguments.template:
        raise ConeslabError(f"--template is for the methods model, noise and uce; {method} takes the target as it is")
    if method == "esd":
        return methods.erase(pipe, target, steps=arguments.steps, **drawn, **quiet)
    if method == "neurons":
        return methods.ablating_neurons(pipe, target, anchor, rounds=arguments.steps, **drawn, **quiet).binary()
    if method == "prune":
        return methods.prune_feed_forward(pipe, target, anchor, **drawn)
    return ablate(
        pipe,
        target,
        anchor,
        objective=method,
        parameters=arguments.parameters,
        steps=arguments.steps,
        templates=templates,
        **drawn,
        **quiet,
    )


# --- doctor ---------------------------------------------------------------------------------------------


def _doctor(arguments: Arguments) -> dict[str, Any]:
    from . import doctor

    report = doctor.examine(device=arguments.device, timing=not arguments.no_timing)
    teller(arguments)(report)
    return report.to_dict()


# --- their options --------------------------------------------------------------------------------------


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add all commands, in the order in which they are listed."""

    def command(name: str, run: Callable[[Arguments], dict[str, Any]], what: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        made.set_defaults(run=run)
        return made

    doctor = command("doctor", _doctor, "check versions, device and shipped models, and say what will be slow")
    doctor.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    doctor.add_argument("--no-timing", action="store_true", help="skip the ten seconds of timing")
    add_json(doctor)

    tour = command("tour", _tour, "find the neurons of a subject, shut them and draw, beside controls")
    tour.add_argument("--subject", default="robot", help="a subject of the sticker world (default: robot)")
    tour.add_argument("--rounds", type=positive, default=60, help="rounds of the search (default: 60)")
    add_common(tour, "folder for the figure and the edit (default: tour)")

    find = command("find", _find, "find the concept neurons of a subject, and save them to a file")
    find.add_argument("subject", help='one of the sticker world, such as "cat", or a folder of 3 to 10 pictures')
    find.add_argument("--class-word", type=as_text, help="what the pictures of a folder show, such as cat")
    find.add_argument("--token", type=as_word, help="the rare word that stands for the subject of a folder")
    find.add_argument("--rounds", type=positive, default=60, help="rounds of the search (default: 60)")
    find.add_argument("--precision", choices=("float32", "float16", "quaternary", "binary"), default="binary")
    add_common(find, "output file (default: SUBJECT.safetensors)")

    generate = command("generate", _generate, "draw pictures for prompts, with or without edits")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument("--edit", type=Path, action="append", default=[], metavar="FILE", help="repeatable, in order")
    generate.add_argument("--dose", type=as_dose, default=1.0, help="dose of the edits (default: 1.0)")
    generate.add_argument("--pictures", type=positive, default=1, help="per prompt, with successive seeds (default: 1)")
    add_common(generate, "folder for the pictures (default: pictures)")

    apply = command("apply", _apply, "draw with and without edits, from the same noise; save the edited model")
    apply.add_argument("edits", type=Path, nargs="+", metavar="EDIT", help="edit files, applied in this order")
    apply.add_argument(
        "--prompt", action="append", type=as_text, help="what to draw, repeatable (default: the subjects' prompts)"
    )
    apply.add_argument("--dose", type=as_dose, default=1.0, help="dose of the edits (default: 1.0)")
    apply.add_argument("--pictures", type=positive, default=4, help="pictures per prompt (default: 4)")
    apply.add_argument("--save-model", type=Path, metavar="FOLDER", help="also save the pipeline with the edits in it")
    add_common(apply, "output figure (default: applied.png)")

    decompose = command("decompose", _decompose, "write a concept as a weighted sum of words (Conceptor)")
    decompose.add_argument("concept", type=as_text, help='a prompt, such as "a pet", or a folder of pictures')
    decompose.add_argument("--steps", type=positive, default=500, help="training steps (default: 500)")
    decompose.add_argument("--pictures", type=positive, default=100, help="pictures drawn for a prompt (default: 100)")
    decompose.add_argument("--top", type=positive, default=10, help="words to show (default: 10)")
    decompose.add_argument(
        "--picture", type=as_seed, metavar="SEED", help="also say which words this one picture needs"
    )
    add_judge(decompose)
    add_common(decompose, "output file (default: CONCEPT.safetensors)")

    ablate = command("ablate", _ablate, "make a model draw the anchor instead of the target, and check that it does")
    ablate.add_argument("target", type=as_text, help='what to remove, such as "a cat"')
    ablate.add_argument("anchor", type=as_text, help='what to draw instead, such as "a dog"')
    ablate.add_argument("--method", choices=ABLATIONS, default="model", help="(default: model)")
    ablate.add_argument(
        "--parameters",
        choices=("cross_attention_kv", "attention", "embedding", "all"),
        default="cross_attention_kv",
        help="what the methods model and noise train (default: cross_attention_kv)",
    )
    ablate.add_argument("--steps", type=positive, default=50, help="training steps; for neurons, rounds (default: 50)")
    ablate.add_argument("--pictures", type=positive, default=64, help="of the anchor, to train on (default: 64)")
    ablate.add_argument(
        "--template", action="append", type=as_template, default=[], help='a caption for both, such as "{} at night"'
    )
    ablate.add_argument(
        "--other", action="append", type=as_text, default=[], help="a prompt that should stay as it is, repeatable"
    )
    ablate.add_argument("--check", action="store_true", help="measure if it is gone, stays gone, and what else is lost")
    ablate.add_argument("--check-pictures", type=positive, default=16, help="per prompt of the check (default: 16)")
    add_judge(ablate)
    add_common(ablate, "output file (default: without-TARGET.safetensors)")
