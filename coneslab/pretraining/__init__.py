"""Train the shipped models from scratch: autoencoder, text encoder and U-Net, and the judge, with their model cards.

For maintainers, and for anyone training on a world of their own. Builds on `diffusion`, `measure` and the picture
world.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .judge import train_judge as train_judge
    from .loop import Log as Log
    from .loop import fit as fit
    from .model_cards import write_model_card as write_model_card
    from .recipe import Recipe as Recipe
    from .recipe import load_recipe as load_recipe
    from .run import export as export
    from .run import note_trial as note_trial
    from .run import train as train
    from .unet import build_tokenizer as build_tokenizer

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "judge": ("train_judge",),
        "loop": (
            "Log",
            "fit",
        ),
        "model_cards": ("write_model_card",),
        "recipe": (
            "Recipe",
            "load_recipe",
        ),
        "run": (
            "export",
            "note_trial",
            "train",
        ),
        "unet": ("build_tokenizer",),
    },
)
