"""Concept neurons in diffusion models: find them, shut them, measure what happens, on a laptop.

    pipe = coneslab.load("tiny")                     # a plain diffusers StableDiffusionPipeline
    cat = coneslab.subject("cat")                    # reference pictures, class word, prompts
    found = coneslab.find_concept_neurons(pipe, cat)
    with found.applied(pipe):                        # weights restored bit for bit afterwards
        pictures = coneslab.generate(pipe, cat.prompts)

The names below are loaded when they are first used: torch and diffusers take seconds to import.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .lazy import attach

__version__ = "0.1.0"

# torchvision has no CPU build for this torch; transformers' PIL image processors serve as well, and need no warning.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

if TYPE_CHECKING:
    from .diffusion import generate as generate
    from .diffusion import load as load
    from .diffusion import patch as patch
    from .diffusion import watch as watch
    from .edits import compress as compress
    from .edits import load_edit as load_edit
    from .errors import ConeslabError as ConeslabError
    from .measure import Judge as Judge
    from .measure import bootstrap_interval as bootstrap_interval
    from .measure import evaluate_model as evaluate_model
    from .measure import load_judge as load_judge
    from .measure import record_attention as record_attention
    from .methods import Decomposition as Decomposition
    from .methods import ablate as ablate
    from .methods import custom_diffusion as custom_diffusion
    from .methods import decompose as decompose
    from .methods import decompose_image as decompose_image
    from .methods import dreambooth as dreambooth
    from .methods import encode_vocabulary as encode_vocabulary
    from .methods import evaluate_ablation as evaluate_ablation
    from .methods import lora as lora
    from .methods import merge as merge
    from .methods import textual_inversion as textual_inversion
    from .neurons import ConceptNeurons as ConceptNeurons
    from .neurons import concatenate as concatenate
    from .neurons import find_concept_neurons as find_concept_neurons
    from .neurons import finetune_kv as finetune_kv
    from .neurons import finetune_together as finetune_together
    from .show import set_up_notebook as set_up_notebook
    from .world import COMBINATIONS as COMBINATIONS
    from .world import SUBJECTS as SUBJECTS
    from .world import Subject as Subject
    from .world import compose as compose
    from .world import sample as sample
    from .world import subject as subject
    from .world import subject_from_folder as subject_from_folder

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "diffusion": (
            "generate",
            "load",
            "patch",
            "watch",
        ),
        "edits": (
            "compress",
            "load_edit",
        ),
        "errors": ("ConeslabError",),
        "measure": (
            "Judge",
            "bootstrap_interval",
            "evaluate_model",
            "load_judge",
            "record_attention",
        ),
        "methods": (
            "Decomposition",
            "ablate",
            "custom_diffusion",
            "decompose",
            "decompose_image",
            "dreambooth",
            "encode_vocabulary",
            "evaluate_ablation",
            "lora",
            "merge",
            "textual_inversion",
        ),
        "neurons": (
            "ConceptNeurons",
            "concatenate",
            "find_concept_neurons",
            "finetune_kv",
            "finetune_together",
        ),
        "show": ("set_up_notebook",),
        "world": (
            "COMBINATIONS",
            "SUBJECTS",
            "Subject",
            "compose",
            "sample",
            "subject",
            "subject_from_folder",
        ),
    },
)
