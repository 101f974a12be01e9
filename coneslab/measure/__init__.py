"""Measuring: a judge of pictures and texts, statistics, what a model draws, where it looks, what a sampler costs.

The judge is CLIP, used to measure and for nothing else. Builds on `diffusion`, `edits` and the picture worlds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .attention import AttentionMaps as AttentionMaps
    from .attention import attention_probabilities as attention_probabilities
    from .attention import record_attention as record_attention
    from .evaluation import CameThrough as CameThrough
    from .evaluation import Report as Report
    from .evaluation import Share as Share
    from .evaluation import came_through as came_through
    from .evaluation import evaluate_model as evaluate_model
    from .evaluation import finds_objects as finds_objects
    from .evaluation import judge_accuracy as judge_accuracy
    from .evaluation import questions as questions
    from .judge import Judge as Judge
    from .judge import as_pictures as as_pictures
    from .judge import load_judge as load_judge
    from .samplers import SCHEDULERS as SCHEDULERS
    from .samplers import Sampler as Sampler
    from .samplers import compare_samplers as compare_samplers
    from .samplers import use_scheduler as use_scheduler
    from .statistics import Interval as Interval
    from .statistics import bootstrap_interval as bootstrap_interval
    from .statistics import kid as kid

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "attention": (
            "AttentionMaps",
            "attention_probabilities",
            "record_attention",
        ),
        "evaluation": (
            "CameThrough",
            "Report",
            "Share",
            "came_through",
            "evaluate_model",
            "finds_objects",
            "judge_accuracy",
            "questions",
        ),
        "judge": (
            "Judge",
            "as_pictures",
            "load_judge",
        ),
        "samplers": (
            "SCHEDULERS",
            "Sampler",
            "compare_samplers",
            "use_scheduler",
        ),
        "statistics": (
            "Interval",
            "bootstrap_interval",
            "kid",
        ),
    },
)
