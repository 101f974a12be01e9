"""Measure: a judge of pictures and texts, statistics, what a model draws, where it attends, what a sampler costs.

The judge is a CLIP model that only measures. How good attention maps are, and which activations make a picture what it
is, is measured here too. Builds on `diffusion` and the picture world.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import attach

if TYPE_CHECKING:
    from .asking import finds_objects as finds_objects
    from .asking import questions as questions
    from .attention import AttentionMaps as AttentionMaps
    from .attention import attention_probabilities as attention_probabilities
    from .evaluation import Report as Report
    from .evaluation import Share as Share
    from .evaluation import evaluate_model as evaluate_model
    from .evaluation import judge_accuracy as judge_accuracy
    from .judge import Judge as Judge
    from .judge import as_pictures as as_pictures
    from .judge import load_judge as load_judge
    from .merit import attention_merit as attention_merit
    from .merit import chance_iou as chance_iou
    from .merit import map_iou as map_iou
    from .merit import points_at as points_at
    from .recording import record_attention as record_attention
    from .samplers import SCHEDULERS as SCHEDULERS
    from .samplers import Sampler as Sampler
    from .samplers import compare_samplers as compare_samplers
    from .samplers import use_scheduler as use_scheduler
    from .statistics import Interval as Interval
    from .statistics import bootstrap_interval as bootstrap_interval
    from .statistics import kid as kid
    from .statistics import share_interval as share_interval
    from .subject_truth import CameThrough as CameThrough
    from .subject_truth import came_through as came_through
    from .tracing import trace_activations as trace_activations

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "asking": (
            "finds_objects",
            "questions",
        ),
        "attention": (
            "AttentionMaps",
            "attention_probabilities",
        ),
        "evaluation": (
            "Report",
            "Share",
            "evaluate_model",
            "judge_accuracy",
        ),
        "judge": (
            "Judge",
            "as_pictures",
            "load_judge",
        ),
        "merit": (
            "attention_merit",
            "chance_iou",
            "map_iou",
            "points_at",
        ),
        "recording": ("record_attention",),
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
            "share_interval",
        ),
        "subject_truth": (
            "CameThrough",
            "came_through",
        ),
        "tracing": ("trace_activations",),
    },
)
