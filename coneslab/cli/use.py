"""Commands that find neurons and draw: `doctor`, `tour`, `find`, `generate`, `apply`.

Each imports what it needs when it runs: torch and diffusers take seconds, and --help should not. A command checks that
it can write its files before it draws or trains, and overwrites nothing unless told to.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConeslabError
from ..files import replacing, replacing_folder, seal_folder, user_path, write_whole
from .options import (
    EDIT,
    PIPELINE,
    Arguments,
    about_edit,
    add_command,
    add_common,
    add_device,
    add_json,
    as_dose,
    as_text,
    as_word,
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

FIGURE = ".png"  # what files of figures end in


# --- what commands share --------------------------------------------------------------------------------


def _subject(arguments: Arguments, pixels: int | None = None) -> Any:
    """A subject of the sticker world by name, or your own from a folder of pictures, of this many pixels."""
    from ..world.subjects import SUBJECTS, subject, subject_from_folder

    if not is_folder(arguments.subject, "a subject of the sticker world"):
        if unused(arguments, "class_word", "token") and arguments.subject not in SUBJECTS:
            raise ConeslabError(f"there is no folder {arguments.subject}: check its name, and where you are")
        refuse_unused(arguments, "on a subject of the sticker world (for yours, give a folder)", "class_word", "token")
        return subject(arguments.subject)
    if not arguments.class_word:
        raise ConeslabError(f"{arguments.subject} is a folder: say with --class-word what its pictures show, e.g. cat")
    options: dict[str, Any] = {"token": arguments.token} if arguments.token else {}
    options |= {"resolution": pixels} if pixels else {}
    return subject_from_folder(arguments.subject, arguments.class_word, **options)


def _edits(paths: Sequence[Path]) -> list[Any]:
    from ..edits.base import load_edit

    return [load_edit(path) for path in paths]


def _say_if_idle(say: Callable[..., None], paths: Sequence[Path], edits: Sequence[Any], prompts: Sequence[str]) -> None:
    """Tell of edits whose words or tokens none of the prompts has: they change no picture."""
    for path, edit in zip(paths, edits, strict=True):
        needed = _needed(edit)
        words = [word.lower() for part in needed for word in part]
        if needed and not any(word in prompt.lower() for prompt in prompts for word in words):
            where = " or ".join(f"“{' '.join(part)}”" for part in needed)
            say(f"{path} changes nothing here: it acts at {where} alone, which no prompt has")


def _needed(edit: Any) -> list[tuple[str, ...]]:
    """The words at which an edit acts, if it acts nowhere else, by part; none if a part of it acts at every word."""
    parts = getattr(edit, "edits", None)
    if parts is None:
        return [words] if (words := getattr(edit, "scope", ()) or getattr(edit, "tokens", ())) else []
    needed = [_needed(part) for part in parts]
    return [words for one in needed for words in one] if all(needed) else []


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
    figure_file, edit_file = (free_path(folder / name, arguments) for name in ("tour.png", f"{subject.name}{EDIT}"))
    pipe, start = load_pipeline(arguments), time.perf_counter()
    say(f"1. The subject: {len(subject.images)} pictures of “{subject.phrase}”, which the model has never seen.")
    options = {"seed": arguments.seed, "progress": not arguments.quiet, **drawing_options(arguments)}
    found = find_concept_neurons(pipe, subject, rounds=arguments.rounds, **options).binary()
    seconds = time.perf_counter() - start
    say(f"2. Its concept neurons: {len(found):,} of {found.n:,} key and value weights, in {seconds:.0f} s.")
    fewer = max(1, arguments.rounds // 2)  # are enough where no other word can change
    at_words = find_concept_neurons(pipe, subject, rounds=fewer, scope="subject", **options).binary()
    say(f"   At the words “{subject.phrase}” alone: {len(at_words):,}.")
    edits = {
        "untouched": None,
        "random neurons": random_neurons(found, seed=arguments.seed),
        "concept neurons": found,
        "at its words": at_words,
    }
    rows = [list(subject.images[:4])]
    for edit in edits.values():
        with applied(edit, pipe):
            rows.append(generate(pipe, list(subject.prompts[:4]), seed=arguments.seed, **drawing_options(arguments)))
    figure = plots.picture_grid(
        rows, row_labels=["the subject", *edits], title=f"“{subject.prompt}” with neurons shut", size=1.4
    )
    write_whole(figure_file, plots.to_png(figure))
    found.save(edit_file)
    say(
        f"3. Shut them and draw “{subject.prompts[0]}”, and others: {figure_file} has the pictures beside the controls."
    )
    again = command(arguments, "generate", subject.prompts[0], "--edit", edit_file)
    say(f"   {edit_file} keeps the neurons: {again}")
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

    say, name = teller(arguments), _subject(arguments).name
    path = free_path(arguments.out or f"{file_name(name)}{EDIT}", arguments, ending=EDIT)
    pipe = load_pipeline(arguments)
    subject, start = _subject(arguments, resolution(pipe)), time.perf_counter()
    found = find_concept_neurons(
        pipe,
        subject,
        rounds=arguments.rounds,
        seed=arguments.seed,
        scope=arguments.scope,
        kinds=arguments.kinds,
        sampler_steps=arguments.sampler_steps,
        guidance_scale=arguments.guidance_scale,
        progress=not arguments.quiet,
    ).to(arguments.precision)
    seconds = time.perf_counter() - start
    found.save(path)
    say(found)
    say_if_nothing_is_shut(say, found)
    say(f"written: {path}, {path.stat().st_size:,} bytes, in {seconds:.0f} s")
    say(f"try it:  {command(arguments, 'generate', subject.prompts[0], '--edit', path)}")
    layers = {row["layer"]: row["shut"] for row in found.per_layer()}
    return {
        "subject": subject.name,
        **about_edit(found, path),
        "precision": arguments.precision,
        "scope": list(found.scope),
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
    if not arguments.edit:
        refuse_unused(arguments, "without --edit", "dose")
    dose = 1.0 if arguments.dose is None else arguments.dose
    prompts = [prompt for prompt in arguments.prompts for _ in range(arguments.pictures)]
    seeds = [arguments.seed + number for _ in arguments.prompts for number in range(arguments.pictures)]
    names = [f"{file_name(prompt)}_{seed}{FIGURE}" for prompt, seed in zip(prompts, seeds, strict=True)]
    if len(set(names)) < len(names):
        raise ConeslabError("a prompt was given twice, or two differ only in punctuation: give each once")
    files = [free_path(folder / name, arguments) for name in names]
    edits = _edits(arguments.edit)
    _say_if_idle(say, arguments.edit, edits, prompts)
    pipe = load_pipeline(arguments)
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.applied(pipe, dose=dose))
        made = generate(pipe, prompts, seed=seeds, progress=not arguments.quiet, **drawing_options(arguments))
    written = []
    for picture, prompt, seed, file in zip(made, prompts, seeds, files, strict=True):
        facts = {"prompt": prompt, "seed": seed, "model": arguments.model, **drawing_options(arguments)}
        facts |= {"edits": [str(path) for path in arguments.edit], "dose": dose}
        note = PngInfo()
        note.add_itxt("coneslab", json.dumps(facts))
        with replacing(file) as unfinished:
            picture.save(unfinished, "PNG", pnginfo=note)
        written.append({"file": str(file), **facts})
        say(f"written: {file}")
    return {"pictures": written}


def _apply(arguments: Arguments) -> dict[str, Any]:
    from ..diffusion.sampling import generate
    from ..show import plots

    say = teller(arguments)
    figure_file = free_path(arguments.out or f"applied{FIGURE}", arguments, ending=FIGURE)
    folder = arguments.save_model
    if folder:
        folder = free_path(folder, arguments, option="--save-model", mark=PIPELINE)
    edits = _edits(arguments.edits)
    for path, edit in zip(arguments.edits, edits, strict=True):
        if folder and not edit.in_weights:
            raise ConeslabError(
                f"{path} acts at some words only, which no weights can hold: leave out --save-model, and give the "
                "file to whoever is to draw with it (generate --edit)"
            )
    prompts = arguments.prompt or _prompts_of(edits)
    _say_if_idle(say, arguments.edits, edits, prompts)
    pipe = load_pipeline(arguments)
    seeds = [arguments.seed + number for _ in prompts for number in range(arguments.pictures)]
    asked = [prompt for prompt in prompts for _ in range(arguments.pictures)]
    options = {"seed": seeds, "progress": not arguments.quiet, **drawing_options(arguments)}
    before = generate(pipe, asked, **options)
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.applied(pipe, dose=arguments.dose))
        after = generate(pipe, asked, **options)
        if folder:
            with replacing_folder(folder, PIPELINE) as unfinished:
                pipe.save_pretrained(unfinished)
                seal_folder(unfinished)
    n = arguments.pictures
    rows = [before[i : i + n] + after[i : i + n] for i in range(0, len(asked), n)]
    heads = ["untouched", *[""] * (n - 1), "with the edit", *[""] * (n - 1)]
    labels = [f"“{prompt}”" for prompt in prompts]
    write_whole(figure_file, plots.to_png(plots.picture_grid(rows, row_labels=labels, column_labels=heads)))
    say(f"written: {figure_file}")
    if folder:
        say(f"written: {folder}, a pipeline with the edit in its weights, for any program that reads diffusers folders")
    return {"figure": str(figure_file), "model": str(folder) if folder else None, "prompts": list(prompts)}


def _prompts_of(edits: Sequence[Any]) -> list[str]:
    """What to draw if nothing is asked for: two prompts of each of the edits' subjects."""
    captions = dict.fromkeys(caption for edit in edits for caption in _captions(edit))
    if not captions:
        raise ConeslabError("these edits do not say what to draw: give one or more with --prompt")
    return [prompt for caption in captions for prompt in _in_scenes(caption)]


def _captions(edit: Any) -> list[str]:
    """What an edit was found on, "a sks cat": as it says, or as its subjects' names ("cat + dog") say; or its parts."""
    from ..world.subjects import SUBJECTS, subject

    if own := dict(getattr(edit, "settings", {})).get("prompt"):  # a subject of your own may be named like one of ours
        return [own]
    parts = [*getattr(edit, "edits", ()), *filter(None, [getattr(edit, "neurons", None)])]
    names = re.split(r"\s*[+,]\s*", str(getattr(edit, "subject", "")))
    own = [subject(name).prompt for name in names if name in SUBJECTS]
    return own or [caption for part in parts for caption in _captions(part)]


def _in_scenes(caption: str) -> tuple[str, ...]:
    """Two prompts of a subject that a caption such as "a sks cat" shows; the caption, if it shows none."""
    from ..world.subjects import evaluation_prompts

    match caption.split(maxsplit=2):
        case ["a" | "an", token, class_word]:
            return evaluation_prompts(class_word, token)[:2]
    return (caption,)


# --- doctor ---------------------------------------------------------------------------------------------


def _doctor(arguments: Arguments) -> dict[str, Any]:
    from . import doctor

    report = doctor.examine(device=arguments.device, timing=not arguments.no_timing)
    teller(arguments)(report)
    return report.to_dict()


# --- their options --------------------------------------------------------------------------------------


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add all commands, in the order in which they are listed."""
    add = partial(add_command, commands)
    doctor = add("doctor", _doctor, "check versions, device and shipped models, and say what will be slow")
    add_device(doctor)
    doctor.add_argument("--no-timing", action="store_true", help="skip the ten seconds of timing")
    add_json(doctor)

    tour = add("tour", _tour, "find the neurons of a subject, shut them and draw, beside controls")
    tour.add_argument("--subject", default="dog", help="a subject of the sticker world (default: dog)")
    tour.add_argument("--rounds", type=positive, default=60, help="rounds of the search (default: 60)")
    add_common(tour, "folder for the figure and the edit (default: tour)")

    find = add("find", _find, "find the concept neurons of a subject, and save them to a file")
    find.add_argument("subject", help='one of the sticker world, such as "cat", or a folder of 3 to 10 pictures')
    find.add_argument("--class-word", type=as_text, help="what the pictures of a folder show, such as cat")
    find.add_argument("--token", type=as_word, help="the rare word that stands for the subject of a folder")
    find.add_argument("--rounds", type=positive, default=60, help="rounds of the search (default: 60)")
    find.add_argument(
        "--scope",
        choices=("all", "subject"),
        default="all",
        help="where the neurons are shut: for all words of a prompt, or at the subject's token and class word only",
    )
    find.add_argument(
        "--kinds", choices=("all", "keys", "values"), default="all", help="which neurons to look among (default: all)"
    )
    find.add_argument("--precision", choices=("float32", "float16", "quaternary", "binary"), default="binary")
    add_common(find, "output file (default: SUBJECT.safetensors)")

    generate = add("generate", _generate, "draw pictures for prompts, with or without edits")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument(
        "--edit", type=user_path, action="append", default=[], metavar="FILE", help="repeatable, in order"
    )
    generate.add_argument("--dose", type=as_dose, help="dose of the edits (default: 1.0)")
    generate.add_argument("--pictures", type=positive, default=1, help="per prompt, with successive seeds (default: 1)")
    add_common(generate, "folder for the pictures (default: pictures)")

    apply = add("apply", _apply, "draw with and without edits, from the same noise; save the edited model")
    apply.add_argument("edits", type=user_path, nargs="+", metavar="EDIT", help="edit files, applied in this order")
    apply.add_argument(
        "--prompt", action="append", type=as_text, help="what to draw, repeatable (default: the subjects' prompts)"
    )
    apply.add_argument("--dose", type=as_dose, default=1.0, help="dose of the edits (default: 1.0)")
    apply.add_argument("--pictures", type=positive, default=4, help="pictures per prompt (default: 4)")
    apply.add_argument(
        "--save-model", type=user_path, metavar="FOLDER", help="also save the pipeline with the edits in it"
    )
    add_common(apply, "output figure (default: applied.png)")
