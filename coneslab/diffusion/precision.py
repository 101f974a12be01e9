"""A frozen copy of a U-Net, in the precision that is fastest on its device.

Much is computed with weights that do not change: gradients of a few of them, long series of pictures. A copy does
that without touching the pipeline, and in bfloat16, where the processor supports it, two to three times as fast.
`mixed_precision` and `flushing_denormals` are for training.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..blocks import Block, Place, attribute
from ..errors import ConeslabError
from .checks import NETWORKS, parts_of, require_own_projections, require_pipeline, separate_weights, uncompiled
from .kvspace import unet_of
from .pipelines import Pipeline, require_float

# What diffusers keeps on modules and not in the config: FreeU's factors, and how activations are checkpointed.
_FREEU = ("s1", "s2", "b1", "b2")
_BESIDE_THE_CONFIG = {*_FREEU, "gradient_checkpointing", "_gradient_checkpointing_func"}
_TIMESTEP = 1  # its place among the arguments of a U-Net's forward


def bfloat16_pays(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 natively, not by emulation."""
    if device.type == "cuda":
        if torch.version.hip or not torch.cuda.is_available():
            return torch.cuda.is_bf16_supported()
        # `is_bf16_supported` counts emulation, as on T4 and V100, and asks about the current device.
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return False


def fast_dtype(unet: Any) -> torch.dtype:
    """bfloat16 if the device supports it natively and the U-Net is in float32, else the U-Net's own precision."""
    return torch.bfloat16 if unet.dtype == torch.float32 and bfloat16_pays(unet.device) else unet.dtype


def gradient_lift(*dtypes: torch.dtype) -> float:
    """What to multiply a loss by, and divide its gradient by afterwards: small gradients underflow in float16."""
    return 2.0**16 if torch.float16 in dtypes else 1.0


def frozen_copy(unet: Any, dtype: torch.dtype, *, gradients: bool = False) -> Any:
    """A copy of a U-Net without gradients, hooks or adapters; it shares the memory of weights already in `dtype`.

    Only hooks that say so, by an attribute `copied_with_the_unet`, are taken along, and FreeU and gradient
    checkpointing if they are on. Inputs but the timestep are cast to `dtype`. A compiled U-Net's copy is not compiled.
    gradients: the copy is for backward passes (`speed_up_backward`).
    Raises ConeslabError if the U-Net's weights do not match its config, or are not those it computes with (an adapter,
    fused projections).
    """
    dtype, unet = require_float(dtype), uncompiled(unet)
    require_own_projections(unet)
    if not _calls_its_own(unet):
        raise ConeslabError(
            "something acts on the U-Net at some steps only, such as an edit that is applied with steps=..., which a "
            "copy of its weights would not have: leave that block first"
        )
    weights = {name: weight.detach().to(dtype) for name, weight in separate_weights(unet).items()}
    made = _tree_of(_structure(unet.__class__, unet.to_json_string()))
    try:
        made.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ConeslabError(
            f"the U-Net cannot be rebuilt from its config ({str(error)[:200]}): unload adapters first"
        ) from error
    own = any(module._forward_hooks or _told(module) for module in parts_of(unet))
    for name, module in unet.named_modules() if own else ():
        if told := _told(module):  # a part that the copy lacks, as unfused projections leave, has been told nothing
            vars(made.get_submodule(name)).update(told)
        for hook in module._forward_hooks.values():
            if _goes_along(hook):
                made.get_submodule(name).register_forward_hook(hook)
    if gradients:
        speed_up_backward(made)

    def cast(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        def as_dtype(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        # In bfloat16 a timestep of 999 would be 1000; the U-Net embeds it in float32, and casts that.
        placed = (x if place == _TIMESTEP else as_dtype(x) for place, x in enumerate(args))
        return tuple(placed), {name: x if name == "timestep" else as_dtype(x) for name, x in kwargs.items()}

    made.register_forward_pre_hook(cast, with_kwargs=True)
    return made


@lru_cache(maxsize=2)
def _structure(kind: Any, config: str) -> nn.Module:
    """A U-Net of this config (JSON) on the meta device: building one takes longer than the rest of a copy."""
    with torch.device("meta"):
        return kind.from_config(json.loads(config)).eval().requires_grad_(False)


def _tree_of(module: nn.Module) -> Any:
    """A module whose parts, weights and hooks can be replaced without changing this one; `deepcopy` is far slower."""
    made = copy(module)
    own = {name: value.copy() for name, value in vars(module).items() if type(value) in (dict, OrderedDict)}
    vars(made).update(own)
    for name, part in made._modules.items():
        made._modules[name] = None if part is None else _tree_of(part)
    return made


def speed_up_backward(unet: Any) -> None:
    """On a CPU with small latents, switch a U-Net to diffusers' classic attention processor.

    There the backward pass of scaled_dot_product_attention is several times slower.
    """
    side = unet.config.sample_size
    places = side**2 if isinstance(side, int) else side[0] * side[1]
    if unet.device.type == "cpu" and places <= 32**2:
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())


def freeu_of(unet: Any) -> tuple[tuple[float | None, ...], ...]:
    """The factors of FreeU in each block on the way up: pictures differ by them, and weights and config do not."""
    return tuple(tuple(vars(block).get(name) for name in _FREEU) for block in unet.up_blocks)


def _told(module: nn.Module) -> dict[str, Any]:
    """What a module has been told beside its config, but for what is off."""
    known = _BESIDE_THE_CONFIG & vars(module).keys()
    return {name: vars(module)[name] for name in known if vars(module)[name]}


def _goes_along(hook: Any) -> bool:
    return getattr(hook, "copied_with_the_unet", False)


def _calls_its_own(unet: nn.Module) -> bool:
    """Whether a U-Net computes with the `forward` of its class."""
    return getattr(unet.forward, "__func__", None) is type(unet).forward


def is_plain(unet: Any) -> bool:
    """Whether a copy does what the U-Net does: no hooks, adapters, custom attention processors or other `forward`."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    if hasattr(unet, "_orig_mod") or getattr(unet, "peft_config", None) or not _calls_its_own(unet):
        return False
    if any(
        module._forward_pre_hooks or not all(map(_goes_along, module._forward_hooks.values()))
        for module in parts_of(unet)
    ):
        return False
    return all(type(used) in (AttnProcessor, AttnProcessor2_0) for used in unet.attn_processors.values())


def drawing(pipe: Pipeline, dtype: torch.dtype | None = None) -> Block:
    """Let a pipeline draw with a copy of its U-Net for the length of a block; latents keep their own precision.

    dtype: default `fast_dtype`. The U-Net itself draws if it already has it or is not plain. No other thread may use
    the pipeline meanwhile.
    """
    require_pipeline(pipe)
    if dtype is not None:
        require_float(dtype)

    def changes() -> list[tuple[Place, Any]]:
        unet = unet_of(pipe)
        wanted = dtype or fast_dtype(unet)
        if wanted == unet.dtype or unet is not pipe.unet or not is_plain(unet):
            return []
        drawn, own = frozen_copy(unet, wanted), unet.dtype

        def cast_back(module: nn.Module, args: tuple, output: Any) -> Any:
            if isinstance(output, tuple):
                return tuple(x.to(own) for x in output)
            return type(output)(output.sample.to(own))

        drawn.register_forward_hook(cast_back)
        return [(attribute(pipe, "unet"), drawn)]

    return Block(changes, pipe=pipe)


def without_compiling(pipe: Pipeline) -> Block:
    """Let a pipeline compute without torch.compile for the length of a block, so that it calls hooks that come now."""
    require_pipeline(pipe)

    def changes() -> list[tuple[Place, Any]]:
        made: list[tuple[Place, Any]] = []
        for part in NETWORKS:
            own, module = getattr(pipe, part), uncompiled(getattr(pipe, part))
            made += [(attribute(pipe, part), module)] if own is not module else []
            compiled = module.__dict__.get("_compiled_call_impl")  # what module.compile() sets
            made += [(attribute(module, "_compiled_call_impl"), None)] if compiled is not None else []
        return made

    return Block(changes, pipe, pipe=pipe)


def mixed_precision(device: torch.device, dtype: torch.dtype | None = None) -> AbstractContextManager:
    """Autocast to bfloat16 if that is `dtype` (default: where it pays), else do nothing."""
    checks.of_kind("device", device, torch.device)
    if dtype is not None:
        require_float(dtype)
    wanted = bfloat16_pays(device) if dtype is None else dtype == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Flush denormals to 0 for the length of a block or function: they are slow, and gradients are full of them.

    Enter it before worker threads start: they inherit it.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
