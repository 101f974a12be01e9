"""What experiments share: model, judge and options, measures of an edit, edits that are made only once.

`registry.py` lists the experiments, `table.py` writes their tables.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, checks
from ..diffusion.checks import require_editable, require_pipeline
from ..diffusion.pipelines import Pipeline, fingerprint, machine_name, pipeline_fingerprint
from ..diffusion.sampling import generate
from ..edits.base import Combined, Edit, applied, load_edit
from ..errors import ConeslabError, FileFormatError
from ..files import read_json, require_writable, write_whole
from ..finetuning.samples import several
from ..measure.judge import Judge
from ..measure.subject_truth import shows_subject
from ..neurons.controls import random_neurons
from ..neurons.loss import concept_loss
from ..neurons.mask import ConceptNeurons
from ..neurons.search import SearchSettings, find_concept_neurons
from ..neurons.union import TunedNeurons
from ..pictures import key_of
from ..seeds import derived
from ..settings import takes
from ..world.subjects import Subject, title_of
from .cluster import loaded
from .table import CELL_SECONDS, Row, rows_of

MEASURES = {
    "text alignment": "cosine of picture and prompt",
    "image alignment": "cosine of picture and references",
    "subject share": "share of pictures that the judge takes for the subject rather than for its kin",
    "concept loss": "denoising loss on the subject",
}

VARIANTS: dict[str, dict[str, Any]] = {  # searches beside the paper's, which masks keys and values, at every word
    "values only": {"kinds": "values"},
    "at its words": {"scope": "subject"},
    "at its words, values only": {"scope": "subject", "kinds": "values"},
}


def measure(
    pipe: Pipeline,
    judge: Judge,
    subject: Subject,
    edit: Edit | None,
    *,
    seed: int,
    pictures: int = 2,
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    samples: int = 160,
) -> dict[str, float]:
    """Every measure of `MEASURES` for one edit (None: the untouched model), on a subject's evaluation prompts.

    Draws `pictures` pictures per prompt, and averages the loss over `samples` noise samples. All edits of a subject
    measured with one `seed` start from the same noise; other subjects and seeds share none of it.
    """
    require_pipeline(pipe)
    pictures, samples = checks.count("pictures", pictures), checks.count("samples", samples)
    prompts = [prompt for prompt in subject.prompts for _ in range(pictures)]
    with applied(edit, pipe):
        drawn = generate(
            pipe,
            prompts,
            seed=derived(seed, "evaluation", subject.name),
            sampler_steps=sampler_steps,
            guidance_scale=guidance_scale,
            batch_size=20,
        )
    return {
        **alignments(judge, subject, drawn),
        "concept loss": concept_loss(pipe, subject, edit=edit, samples=samples).subject,
    }


def alignments(judge: Judge, subject: Subject, drawn: Sequence[Any]) -> dict[str, float]:
    """Text and image alignment and subject share of pictures of the evaluation prompts, equally many each, in order."""
    prompts = [subject.plain(prompt) for prompt in subject.prompts for _ in range(len(drawn) // len(subject.prompts))]
    return {
        "text alignment": judge.text_alignment(list(drawn), prompts),
        "image alignment": judge.image_alignment(list(drawn), subject.images),
        "subject share": float(shows_subject(judge, list(drawn), subject.name).mean()),
    }


def stored_bytes(edit: Any) -> float:
    """Bytes of an edit in its smallest stored form: a mask's file, else `nbytes`, of all its parts; NaN without."""
    if isinstance(edit, Combined):
        return sum(map(stored_bytes, edit.edits))
    if isinstance(edit, ConceptNeurons):
        return len(edit.to_bytes())
    return float(getattr(edit, "nbytes", np.nan))


def density_of(edit: Any) -> float:
    """Share of neurons that an edit shuts or tunes; of masks side by side, of all of them together; NaN without any."""
    if isinstance(edit, Combined):
        return sum(map(density_of, edit.edits))
    return float(getattr(edit.neurons if isinstance(edit, TunedNeurons) else edit, "density", np.nan))


def timed(make: Callable[[], Any]) -> tuple[Any, float]:
    """What `make` returns, and the seconds it took."""
    begun = time.perf_counter()
    made = make()
    return made, time.perf_counter() - begun


_ONE_CELL = threading.Lock()  # a worker's threads share the pipeline, which has only one state


def on_record(pipe: Pipeline, measured: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a cell, each with the seconds that the whole cell took and the machine that computed it.

    One cell at a time in a process.
    """
    require_pipeline(pipe)
    with _ONE_CELL:
        rows, seconds = timed(measured)
    about = {CELL_SECONDS: seconds, "machine": machine_name(pipe.device)}
    return [row | about for row in rows]


def identity_of(pipe: Pipeline, judge: Judge, **options: Any) -> dict[str, Any]:
    """What numbers depend on besides their cell: fingerprints of model and judge, the package's version, options."""
    return {
        "model": pipeline_fingerprint(pipe)[:16],
        "judge": fingerprint(judge.model)[:16],
        "version": __version__,
        "options": options,
    }


@takes(SearchSettings)
def neurons(pipe: Pipeline, subject: Subject, *, seed: int, **settings: Any) -> ConceptNeurons:
    """A search without a progress bar. Its prior pictures are drawn once for all searches from one seed."""
    return find_concept_neurons(pipe, subject, seed=seed, progress=False, **settings)


def kept(
    make: Callable[..., Any],
    pipe: Pipeline,
    subjects: Subject | Sequence[Subject],
    parts: Sequence[Edit] | None = None,
    *,
    seed: int,
    folder: str | Path | None,
    **settings: Any,
) -> tuple[Any, float]:
    """The edit make(pipe, subjects, seed=..., **settings) and the seconds it takes, from `folder` if it is kept there.

    parts: the edits that `make` joins, if it joins any: its third argument then.
    For another function, model, subject, part, version of the package or settings, defaults included, the edit is made
    again, and kept beside the first. A function is known by its name and its text; without a folder nothing is kept,
    nor what is one of the parts, is no `Edit` or was made by what is no plain function, such as one that another
    function made, since what it depends on cannot be seen.
    Raises FileFormatError if what is kept is damaged, WriteError if nothing can be kept there.
    """
    require_pipeline(pipe)
    about, joined, known = several(subjects), list(parts or ()), _known_by(make)
    given = (subjects,) if parts is None else (subjects, parts)
    make_it = partial(make, pipe, *given, seed=derived(seed, *(one.name for one in about)), **settings)
    if folder is None or known is None or not all(isinstance(part, Edit) for part in joined):
        return timed(make_it)
    prompts = [prompt for one in about for prompt in (one.prompt, one.prior_prompt)]
    facts = [*known, pipeline_fingerprint(pipe), prompts, _filled(make, settings), __version__]
    facts += [part.digest() for part in joined]
    key = key_of(facts, [picture for one in about for picture in one.images])
    title = title_of([one.name for one in about])
    file = require_writable(folder, folder=True) / f"{title}-{seed}-{key}.safetensors"
    noted = file.with_suffix(".json")
    if noted.is_file():  # written last
        note = read_json(noted)
        if not file.is_file() or note.get("sha256") != _sum_of(file, note.get("seconds")):
            raise FileFormatError(f"{noted} or the edit beside it is damaged: delete it, and the edit is made again")
        return load_edit(file), float(note["seconds"])
    edit, seconds = timed(make_it)
    if isinstance(edit, Edit) and not any(edit is part for part in joined):
        edit.save(file)
        note = {"seconds": seconds, "sha256": _sum_of(file, seconds)}
        write_whole(noted, json.dumps(note).encode())  # as one file, because several workers may write it at a time
    return edit, seconds


def _known_by(make: Callable[..., Any]) -> tuple[str, str, str] | None:
    """Module, name and text of a function; None if it depends on more than its text and arguments, or has no text."""
    if not inspect.isfunction(make) or make.__closure__:
        return None
    try:
        return make.__module__, make.__qualname__, inspect.getsource(make)
    except OSError:  # typed at a prompt
        return None


def _sum_of(file: Path, seconds: Any) -> str:
    """The checksum of a kept edit, its name, and the seconds that it took to make."""
    return hashlib.sha256(f"{file.name} {seconds!r} ".encode() + file.read_bytes()).hexdigest()


def _filled(make: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the defaults of those that are not given, in the order of their names."""
    parameters = inspect.signature(make).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    return dict(sorted({**defaults, **settings}.items()))


@dataclass(frozen=True)
class Setting:
    """What all cells of an experiment share.

    rounds: of a search; pictures: per prompt; sampler_steps, guidance_scale: of pictures; samples: of a denoising
    loss; masks: folder in which found neurons are kept between experiments; source: of the models, see `named`.
    Raises ConeslabError for a pipeline that cannot be edited, or a count below 1.
    """

    pipe: Pipeline
    judge: Judge
    rounds: int = 60
    finetune_steps: int = 100
    pictures: int = 1
    sampler_steps: int = 25
    guidance_scale: float = 3.0
    samples: int = 160
    masks: Path | None = None
    source: tuple[str, str, str | None] | None = None

    @classmethod
    def named(cls, model: str = "tiny", judge: str = "judge", *, device: str | None = None, **options: Any) -> Setting:
        """A setting whose models are loaded by name, once per process: it can be sent to the workers of a cluster.

        model, judge: names, folders or hub ids, as every worker finds them; device: default a GPU where there is one.
        options: the other fields. Raises what `load` and `load_judge` raise.
        """
        pipe, own_judge = loaded(str(model), str(judge), device)
        return cls(pipe, own_judge, source=(str(model), str(judge), device), **options)

    def __reduce__(self) -> Any:
        if self.source is None:
            raise ConeslabError(
                "the models of this setting were loaded beforehand and cannot be sent to a worker: make the setting "
                "with Setting.named(model, judge)"
            )
        model, judge, device = self.source
        names = [field.name for field in fields(self) if field.name not in ("pipe", "judge", "source")]
        options = {name: getattr(self, name) for name in names}
        return partial(Setting.named, model, judge, device=device, **options), ()

    def __post_init__(self) -> None:
        require_editable(self.pipe)
        for name in ("rounds", "finetune_steps", "pictures", "sampler_steps", "samples"):
            object.__setattr__(self, name, checks.count(name, getattr(self, name)))
        checks.number("guidance_scale", self.guidance_scale, checks.GUIDED)

    @property
    def identity(self) -> dict[str, Any]:
        """What every number measured in this setting depends on, as columns of its table."""
        names = ("rounds", "finetune_steps", "pictures", "sampler_steps", "guidance_scale", "samples")
        return identity_of(self.pipe, self.judge, **{name: getattr(self, name) for name in names})

    @property
    def drawing(self) -> dict[str, Any]:
        """Options of `generate`."""
        return {"sampler_steps": self.sampler_steps, "guidance_scale": self.guidance_scale}

    def quick(self, sampler_steps: int = 15) -> Setting:
        """The same with at most this many sampler steps: for experiments that draw thousands of pictures."""
        return replace(self, sampler_steps=min(self.sampler_steps, sampler_steps))

    def search(self, subject: Subject, seed: int, **options: Any) -> ConceptNeurons:
        """A new search. options: of `find_concept_neurons`."""
        return neurons(self.pipe, subject, seed=derived(seed, subject.name), rounds=self.rounds, **options)

    def found_in(self, subject: Subject, seed: int, **options: Any) -> tuple[ConceptNeurons, float]:
        """The subject's neurons, searched for once for all experiments, and the seconds of that search.

        options: of `find_concept_neurons`, such as those in `VARIANTS`.
        """
        return kept(neurons, self.pipe, subject, seed=seed, folder=self.masks, rounds=self.rounds, **options)

    def found(self, subject: Subject, seed: int, **options: Any) -> ConceptNeurons:
        return self.found_in(subject, seed, **options)[0]

    def random_mask(self, found: ConceptNeurons, subject: Subject, seed: int) -> ConceptNeurons:
        """A random mask as dense as the one found, another one for every subject and seed."""
        return random_neurons(found, seed=derived(seed, "random mask", subject.name))

    def measure(self, subject: Subject, edit: Edit | None, seed: int, **columns: Any) -> list[Row]:
        """The rows of one condition; `columns` go beside each measure."""
        options = {"pictures": self.pictures, "samples": self.samples, **self.drawing}
        values = measure(self.pipe, self.judge, subject, edit, seed=seed, **options)
        return rows_of(values, **{"density": density_of(edit), **columns})
