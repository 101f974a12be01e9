"""LoRA: tune low-rank changes of a U-Net's linear layers, and preserve the class (Hu et al. 2022, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ... import checks
from ...callback import Callback
from ...diffusion.checks import require_editable
from ...diffusion.kvspace import unet_of
from ...diffusion.pipelines import Pipeline
from ...edits.low_rank import LowRankDelta
from ...edits.weights import model_fingerprint
from ...errors import ArgumentError
from ...finetuning.checkpoints import resumable
from ...finetuning.kv_gradient import require_passes
from ...finetuning.loop import TuningSettings, require_training_dtype, tune_unet
from ...finetuning.samples import ConceptSettings, ConceptSubject, joint_latents, names_of, numbered_batches, several
from ...seeds import derived, seeded_on_the_cpu
from ...settings import takes

Targets = Literal["cross-attention", "attention", "all"]


@dataclass(frozen=True, kw_only=True)
class LoRASettings(TuningSettings, ConceptSettings):
    """Settings of `lora`: those of `TuningSettings` and `ConceptSettings`, with other defaults, and

    rank: r. alpha: α, the change being α / r · B A; if None it is r. targets: which linear layers are changed, those of
    "cross-attention", of all "attention" (queries, keys, values and outputs, as in diffusers' scripts) or "all" of the
    U-Net's.
    """

    method: ClassVar[str] = "LoRA"

    learning_rate: float = 1e-3
    batch_size: int = 8
    prior_batch_size: int = 8
    rank: int = 8
    alpha: float | None = None
    targets: Targets = "cross-attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(checks.count, "rank")
        self._check(checks.number, "alpha", interval="(0, inf)", optional=True)
        self._check(checks.choice, "targets", among=get_args(Targets))


@resumable
@takes(LoRASettings)
def lora(
    pipe: Pipeline,
    subjects: ConceptSubject | Iterable[ConceptSubject],
    settings: LoRASettings | Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    resume: str | Path | None = None,
    **changes: Any,
) -> LowRankDelta:
    """Tune low-rank changes W + α / r · B A of a U-Net's linear layers on the subjects (Hu et al. 2022, Eq. 3).

    B begins at 0 and A at random (Sec. 4.1); with prior preservation, as DreamBooth has it. The text encoder stays as
    it is. Built by peft; `edits.export_lora` writes what `pipe.load_lora_weights` reads. dtype, chunk: see `tune_unet`;
    settings, changes: see `LoRASettings`; progress, callback, resume: see `RunOptions`.
    Raises ConeslabError for a rank above the width of a layer.

    >>> pipe, cat = coneslab.load("tiny"), coneslab.subject("cat")
    >>> learned = coneslab.lora(pipe, cat, rank=2, steps=1, batch_size=2, prior_batch_size=0)
    >>> learned
    LowRankDelta('cat': ... layers, ranks 2 to 2, ... bytes)
    """
    require_editable(pipe)
    require_passes(dtype, chunk, callback)
    require_training_dtype(dtype)
    settings = LoRASettings.chosen(settings, changes)
    taught = several(subjects)
    layers = _target_layers(pipe, settings.targets)
    narrow = min(min(layer.weight.shape) for layer in layers.values())
    if settings.rank > narrow:
        raise ArgumentError(f"rank is {settings.rank}, but the narrowest layer has {narrow} channels: give less")
    data = joint_latents(pipe, taught, settings)
    batch_at = numbered_batches(pipe, data, settings.seed)
    names, model = names_of(taught), model_fingerprint(pipe)
    adapted: list[nn.Module] = []

    def adapt(unet: nn.Module) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # imported here, as it takes seconds

        shape: dict[str, Any] = {"r": settings.rank, "lora_alpha": settings.alpha or settings.rank}
        config = LoraConfig(**shape, target_modules=list(layers), init_lora_weights="gaussian")
        with seeded_on_the_cpu(derived(settings.seed, "LoRA")):
            adapted.append(inject_adapter_in_model(config, unet))

    _, history = tune_unet(
        pipe,
        data,
        lambda number, unet: batch_at(number),
        settings,
        title=f"LoRA of {names}",
        identity={"model": model},
        adapt=adapt,
        only=lambda name: ".lora_" in name,
        dtype=dtype,
        chunk=chunk,
        progress=progress,
        callback=callback,
        resume=resume,
    )
    factors = {f"{name}.weight": _factors(adapted[0].get_submodule(name)) for name in layers}
    return LowRankDelta(factors, model, names, settings.record(), history)


def _target_layers(pipe: Pipeline, targets: Targets) -> dict[str, nn.Linear]:
    """The U-Net's linear layers that are meant: name -> module, in module order."""
    parts = {"cross-attention": (".attn2.",), "attention": (".attn1.", ".attn2."), "all": ("",)}[targets]
    modules = unet_of(pipe).named_modules()
    return {
        name: module
        for name, module in modules
        if isinstance(module, nn.Linear) and any(part in f".{name}." for part in parts)
    }


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """B, with the factor α / r, and A of a layer that peft has wrapped."""
    (name,) = layer.lora_A
    left, right = layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()
    return (layer.scaling[name] * left).cpu().contiguous(), right.cpu().contiguous()
