"""Edits: anything that can be applied to a pipeline inside a `with` block, and stored in a file.

What all of them share, the kinds that belong to no single method, and other programs' files. Builds on `diffusion`.
"""

from __future__ import annotations

from .base import Combined, Edit, applied, load_edit
from .interchange import (
    custom_diffusion_parts,
    export_custom_diffusion,
    export_lora,
    export_tokens,
    import_custom_diffusion,
    import_lora,
    import_tokens,
)
from .low_rank import LowRankDelta, compress
from .timed import in_steps, require_dose
from .tokens import LearnedText, TokenEdit, embedding_of, start_vector, vocabulary_fingerprint, with_tokens
from .weights import WeightDelta, model_fingerprint, require_model, swapped, untouched

__all__ = [
    "Combined",
    "Edit",
    "LearnedText",
    "LowRankDelta",
    "TokenEdit",
    "WeightDelta",
    "applied",
    "compress",
    "custom_diffusion_parts",
    "embedding_of",
    "export_custom_diffusion",
    "export_lora",
    "export_tokens",
    "import_custom_diffusion",
    "import_lora",
    "import_tokens",
    "in_steps",
    "load_edit",
    "model_fingerprint",
    "require_dose",
    "require_model",
    "start_vector",
    "swapped",
    "untouched",
    "vocabulary_fingerprint",
    "with_tokens",
]
