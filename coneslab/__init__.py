"""Concept neurons in diffusion models: find them, shut them, measure what happens, on a laptop.

    pipe = coneslab.load("tiny")                     # a plain diffusers StableDiffusionPipeline
    cat = coneslab.subject("cat")                    # reference pictures, class word, prompts
    found = coneslab.find_concept_neurons(pipe, cat)
    with found.applied(pipe):                        # weights restored bit for bit afterwards
        pictures = coneslab.generate(pipe, cat.prompts)

The names below are loaded when they are first used: torch and diffusers take seconds to import.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# torchvision has no CPU build for this torch; transformers' PIL image processors serve as well, and need no warning.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

if TYPE_CHECKING:
    from .attention import record_attention as record_attention
    from .controls import finetune_kv as finetune_kv
    from .diffusion import generate as generate
    from .edits import load_edit as load_edit
    from .errors import ConeslabError as ConeslabError
    from .evaluation import evaluate_model as evaluate_model
    from .metrics import Judge as Judge
    from .metrics import bootstrap_interval as bootstrap_interval
    from .metrics import load_judge as load_judge
    from .models import load as load
    from .neurons import ConceptNeurons as ConceptNeurons
    from .search import find_concept_neurons as find_concept_neurons
    from .subjects import COMBINATIONS as COMBINATIONS
    from .subjects import SUBJECTS as SUBJECTS
    from .subjects import Subject as Subject
    from .subjects import subject as subject
    from .subjects import subject_from_folder as subject_from_folder
    from .world import compose as compose
    from .world import sample as sample

_HOME = {
    "attention": ("record_attention",),
    "controls": ("finetune_kv",),
    "diffusion": ("generate",),
    "edits": ("load_edit",),
    "errors": ("ConeslabError",),
    "evaluation": ("evaluate_model",),
    "metrics": ("Judge", "bootstrap_interval", "load_judge"),
    "models": ("load",),
    "neurons": ("ConceptNeurons",),
    "search": ("find_concept_neurons",),
    "subjects": ("COMBINATIONS", "SUBJECTS", "Subject", "subject", "subject_from_folder"),
    "world": ("compose", "sample"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'coneslab' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
