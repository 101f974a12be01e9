"""Neurons that were found before: read where a search would find the same again.

A search takes half a minute and more, and lectures and pages that are about something else need several.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..diffusion.checks import require_editable
from ..diffusion.pipelines import Pipeline, pipeline_fingerprint
from ..errors import FileFormatError, MissingFileError
from ..files import data_folder, require_writable
from ..finetuning.samples import ConceptSubject, require_subject
from ..pictures import as_pictures, key_of
from ..settings import takes
from .mask import ConceptNeurons
from .search import SearchSettings, find_concept_neurons

SHIPPED = data_folder() / "shelf"


@takes(SearchSettings)
def ready_neurons(
    pipe: Pipeline,
    subject: ConceptSubject,
    settings: SearchSettings | Mapping[str, Any] | None = None,
    *,
    kept: str | Path | None = None,
    progress: bool = True,
    **changes: Any,
) -> ConceptNeurons:
    """A subject's concept neurons, binary: read if they were found before, searched for otherwise.

    Found before: on this model, with these pictures, prompts and settings, and kept in `data/shelf`, where there are
    some for the shipped model, or in the folder `kept`. What a search finds is written to `kept`, as a mask file;
    without such a folder it is not kept. A damaged file is searched for anew. settings, changes, progress: as in
    `find_concept_neurons`. Raises what that raises, and WriteError if nothing can be kept in the folder.

    >>> pipe, cat = coneslab.load("tiny"), coneslab.subject("cat")
    >>> found = coneslab.neurons.ready_neurons(pipe, cat, rounds=40, scope="subject")  # on the shelf: at once
    >>> found
    ConceptNeurons('cat': ... of ... neurons shut (3...%), ... scaled, model ..., at 'sks cat' only)
    """
    require_editable(pipe)
    chosen = SearchSettings.chosen(settings, changes)
    require_subject(subject)
    folder = None if kept is None else require_writable(kept, folder=True)
    name = f"{subject.name}-{_key(pipe, subject, chosen)}.mask"
    for place in (SHIPPED, folder):
        if place is not None:
            with suppress(MissingFileError, FileFormatError):
                return ConceptNeurons.load_mask(place / name, pipe)
    found = find_concept_neurons(pipe, subject, chosen, progress=progress).binary()
    if folder is not None:
        found.save_mask(folder / name)
    return found


def _key(pipe: Pipeline, subject: ConceptSubject, settings: SearchSettings) -> str:
    """What a search depends on, as 16 hex digits. The device and the precision of its passes are left out."""
    facts = [pipeline_fingerprint(pipe), subject.prompt, subject.prior_prompt, sorted(settings.record().items())]
    return key_of(facts, as_pictures(subject.images))
