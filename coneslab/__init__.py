"""Concept neurons in diffusion models: find them, shut them, measure what happens, on a laptop."""

__version__ = "0.1.0"
