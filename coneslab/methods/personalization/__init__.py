"""Personalisation as others do it: the baselines that concept neurons are compared with, one file each.

Each takes a pipeline and one or more subjects and returns an edit; the pipeline is not changed. Latents and prior
pictures are encoded once, text once where it does not depend on what is trained, and only what is trained gets a
gradient. Builds on `finetuning` and `edits`.
"""
