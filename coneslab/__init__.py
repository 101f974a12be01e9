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
    from .ablation import ablate as ablate
    from .ablation_report import evaluate_ablation as evaluate_ablation
    from .attention import record_attention as record_attention
    from .concatenation import concatenate as concatenate
    from .concatenation import finetune_together as finetune_together
    from .conceptor import Decomposition as Decomposition
    from .conceptor import decompose as decompose
    from .controls import finetune_kv as finetune_kv
    from .diffusion import generate as generate
    from .edits import load_edit as load_edit
    from .errors import ConeslabError as ConeslabError
    from .evaluation import evaluate_model as evaluate_model
    from .merging import compress as compress
    from .merging import merge as merge
    from .metrics import Judge as Judge
    from .metrics import bootstrap_interval as bootstrap_interval
    from .metrics import load_judge as load_judge
    from .models import load as load
    from .neurons import ConceptNeurons as ConceptNeurons
    from .personalize import custom_diffusion as custom_diffusion
    from .personalize import dreambooth as dreambooth
    from .personalize import textual_inversion as textual_inversion
    from .search import find_concept_neurons as find_concept_neurons
    from .single_image import decompose_image as decompose_image
    from .subjects import COMBINATIONS as COMBINATIONS
    from .subjects import SUBJECTS as SUBJECTS
    from .subjects import Subject as Subject
    from .subjects import subject as subject
    from .subjects import subject_from_folder as subject_from_folder
    from .vocabulary import encode_vocabulary as encode_vocabulary
    from .world import compose as compose
    from .world import sample as sample

_HOME = {
    "ablation": ("ablate",),
    "ablation_report": ("evaluate_ablation",),
    "attention": ("record_attention",),
    "concatenation": ("concatenate", "finetune_together"),
    "conceptor": ("Decomposition", "decompose"),
    "controls": ("finetune_kv",),
    "diffusion": ("generate",),
    "edits": ("load_edit",),
    "errors": ("ConeslabError",),
    "evaluation": ("evaluate_model",),
    "merging": ("compress", "merge"),
    "metrics": ("Judge", "bootstrap_interval", "load_judge"),
    "models": ("load",),
    "neurons": ("ConceptNeurons",),
    "personalize": ("custom_diffusion", "dreambooth", "textual_inversion"),
    "search": ("find_concept_neurons",),
    "single_image": ("decompose_image",),
    "subjects": ("COMBINATIONS", "SUBJECTS", "Subject", "subject", "subject_from_folder"),
    "vocabulary": ("encode_vocabulary",),
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
