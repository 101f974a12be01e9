"""What a pipeline must be for this package to work on it, told in one sentence before anything is done with it.

`require_pipeline` stands at the door of every public function that takes a pipeline, `require_editable` of those that
read or change the weights of its U-Net. Compiled parts need no refusal: `uncompiled` looks behind torch.compile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConeslabError

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
NETWORKS = {"unet": "U-Net", "vae": "autoencoder", "text_encoder": "text encoder"}
#: Pipelines with the parts of Stable Diffusion; those after the first draw from pictures.
KINDS = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FUSED_COPIES = {"to_qkv", "to_kv"}
_OFFLOADING = ("group_offloading", "lazy_prefetch_group_offloading")  # as diffusers names its hooks


def uncompiled(module: Any) -> Any:
    """A module without the wrapper that torch.compile puts around it; it shares the weights."""
    return getattr(module, "_orig_mod", module)


def require_pipeline(pipe: Any) -> None:
    """Raise ConeslabError unless this is a Stable Diffusion pipeline whose weights are in memory, in one precision.

    It may be one that draws from pictures, by img2img or inpainting (`require_from_text` refuses those).
    Refused in words: other kinds of pipelines, such as SDXL, missing parts, parts that do not fit together, weights
    that are quantised, cast to 8 bits, offloaded or on the meta device, and schedulers without a noise schedule.
    """
    kind = type(pipe).__name__
    bases = _bases(pipe)
    if ("DiffusionPipeline" in bases and not bases & {*KINDS}) or hasattr(pipe, "text_encoder_2"):
        raise ConeslabError(
            f"got a {kind}, expected a StableDiffusionPipeline: this works with Stable Diffusion 1 and 2, which have "
            "one text encoder; load such a model with coneslab.load"
        )
    missing = [part for part in PARTS if getattr(pipe, part, None) is None]
    if len(missing) == len(PARTS):
        raise ConeslabError(
            f"got {pipe!r:.80}, expected a StableDiffusionPipeline: load one with coneslab.load"
            if isinstance(pipe, str | int | float | None)
            else f"got a {kind}, expected a StableDiffusionPipeline: load one with coneslab.load"
        )
    if missing:
        raise ConeslabError(
            f"the pipeline has no {', '.join(missing)}: load all parts of the model, for example with coneslab.load"
        )
    for part, name in NETWORKS.items():
        require_plain_weights(uncompiled(getattr(pipe, part)), name)
    require_schedule(pipe.scheduler)
    _require_fitting_parts(pipe)
    _require_fitting_words(pipe.tokenizer, uncompiled(pipe.text_encoder))


def _bases(pipe: Any) -> set[str]:
    """Names of the classes that an object is of."""
    return {base.__name__ for base in type(pipe).__mro__}


def require_from_text(pipe: Any) -> None:
    """Raise ConeslabError for a pipeline (`require_pipeline`) that draws from pictures and not from texts alone."""
    require_pipeline(pipe)
    bases = _bases(pipe)
    if bases & {*KINDS} and KINDS[0] not in bases:
        raise ConeslabError(
            f"got a {type(pipe).__name__}, which draws from pictures, expected a StableDiffusionPipeline: make one of "
            "the same parts, StableDiffusionPipeline(**pipe.components), or call this one itself"
        )


def require_schedule(scheduler: Any) -> None:
    """Raise ConeslabError unless a scheduler has a noise schedule abar_t, and a prediction type that is known here."""
    kind = type(scheduler).__name__
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), torch.Tensor):
        raise ConeslabError(
            f"the scheduler is a {kind}, which has no noise schedule alphas_cumprod: load the model with its own "
            "scheduler, or give the pipeline another one, such as diffusers.DDIMScheduler"
        )
    prediction = scheduler.config.get("prediction_type")
    if prediction not in PREDICTION_TYPES:
        raise ConeslabError(
            f"the scheduler's prediction_type is {prediction!r}, expected 'epsilon', 'v_prediction' or 'sample': "
            "load the model with its own scheduler config"
        )


def require_plain_weights(module: nn.Module, name: str) -> None:
    """Raise ConeslabError if a network's weights are not in memory as they are used; name: what to call it."""
    for part in parts_of(module):
        own = part.__dict__
        hooks = own["_diffusers_hook"].hooks if "_diffusers_hook" in own else {}
        if "_hf_hook" in own or (hooks and any(hook in hooks for hook in _OFFLOADING)):
            raise ConeslabError(
                f"the {name} is offloaded: call pipe.remove_all_hooks(), then pipe.to('cuda') or pipe.to('cpu'), or "
                "load the model again without offloading"
            )
        if "layerwise_casting" in hooks:
            raise ConeslabError(
                f"the weights of the {name} are cast layer by layer: load the model again without layerwise casting"
            )
        if "quantized" in type(part).__module__:
            raise ConeslabError(f"the {name} is quantised: load the model without quantisation")
        for weight in part._parameters.values():
            if weight is None:
                continue
            if weight.is_meta:
                raise ConeslabError(
                    f"the {name} has weights on the meta device, which holds no numbers: load the model again, onto "
                    "cpu or cuda and without offloading"
                )
            if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
                raise ConeslabError(
                    f"the weights of the {name} are {str(weight.dtype).removeprefix('torch.')} "
                    f"({type(weight).__name__}), expected float32, bfloat16 or float16: load the model without "
                    "quantisation"
                )


def parts_of(module: nn.Module) -> list[nn.Module]:
    """All modules of a network, itself first: as `nn.Module.modules`, in a tenth of the time.

    Every public call asks for them, so nothing is done for a module but to look at its children.
    """
    found = [module]
    for part in found:  # grows meanwhile
        if part._modules:
            found += [child for child in part._modules.values() if child is not None]
    return found


def _require_fitting_parts(pipe: Any) -> None:
    unet, vae, text = (uncompiled(getattr(pipe, part)) for part in NETWORKS)
    places = zip(NETWORKS.values(), (unet, vae, text), strict=True)
    devices = {name: str(next(iter(module.parameters())).device) for name, module in places}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"the {name} on {device}" for name, device in devices.items())
        raise ConeslabError(f"the pipeline's parts are on different devices ({where}): move it with pipe.to(...)")
    for what in ("addition_embed_type", "class_embed_type", "num_class_embeds"):
        if unet.config.get(what) is not None:
            raise ConeslabError(
                f"the U-Net has {what}={unet.config[what]!r} and needs more than a text: this works with those of "
                "Stable Diffusion 1 and 2"
            )
    latent = vae.config.get("latent_channels")
    if unet.config.in_channels != latent:
        raise ConeslabError(
            f"the U-Net takes {unet.config.in_channels} channels, the autoencoder makes {latent}: load parts that "
            "belong together (a U-Net for inpainting takes more, and does not work here)"
        )
    widths, width = unet.config.cross_attention_dim, getattr(text.config, "hidden_size", None)
    if width is not None and any(own != width for own in (widths if isinstance(widths, list | tuple) else [widths])):
        raise ConeslabError(
            f"the U-Net reads text embeddings of width {widths}, the text encoder makes {width}: load parts that "
            "belong together"
        )


def text_width(unet: Any) -> int:
    """Width of the text embeddings that a U-Net reads; a config may give one for each of its blocks."""
    widths = uncompiled(unet).config.cross_attention_dim
    return int(widths[0] if isinstance(widths, list | tuple) else widths)


def _require_fitting_words(tokenizer: Any, encoder: Any) -> None:
    longest, most = tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", None)
    rows = len(encoder.get_input_embeddings().weight)
    if most is not None and longest > most:
        raise ConeslabError(
            f"the tokenizer gives texts of up to {longest:.0e} tokens, the text encoder takes {most}: "
            "load the tokenizer of this model, with its tokenizer_config.json"
        )
    if len(tokenizer) > rows:
        raise ConeslabError(
            f"the tokenizer knows {len(tokenizer)} tokens, the text encoder {rows}: load the tokenizer of this model, "
            "or call pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer)) after adding tokens to it"
        )


def require_editable(pipe: Any) -> None:
    """Raise ConeslabError unless this is a pipeline (`require_from_text`) whose U-Net training and searches can act on.

    Its attention must use its own, separate projections (`require_own_projections`), and all weights must be finite.
    """
    require_from_text(pipe)
    require_own_projections(uncompiled(pipe.unet))
    require_finite(pipe)


def require_own_projections(unet: nn.Module) -> None:
    """Raise ConeslabError if a U-Net does not compute with the weights of its own projections.

    Fused projections are copies of them; adapters (LoRA) and processors with weights of their own bring others.
    """
    if fused_attentions(unet):
        raise ConeslabError(
            "the U-Net's attention projections are fused, so that it computes with copies of its weights: unfuse them "
            "first (pipe.unet.unfuse_qkv_projections())"
        )
    for module in parts_of(unet):
        if "base_layer" in module._modules:
            raise ConeslabError(
                f"{_path(module, unet)} is wrapped, perhaps by a LoRA adapter: unload it first "
                "(pipe.unload_lora_weights(); to keep what it does, call pipe.fuse_lora() before that)"
            )
        processor = _processor(module)
        if isinstance(processor, nn.Module) and any(True for _ in processor.parameters()):
            raise ConeslabError(
                f"{_path(module, unet)} computes with the weights of a {type(processor).__name__} instead of its own: "
                "call pipe.unet.set_default_attn_processor() first"
            )


def _processor(module: nn.Module) -> Any:
    """A module's attention processor or None, without the error that PyTorch makes for each module that has none."""
    return module._modules.get("processor") or module.__dict__.get("processor")


def _path(module: nn.Module, unet: nn.Module) -> str:
    return next(path for path, part in unet.named_modules() if part is module)


def fused_attentions(unet: nn.Module) -> list[Any]:
    """The attention modules of a U-Net that compute with fused copies of their projections."""
    return [part for part in parts_of(unet) if type(_processor(part)).__name__.startswith("Fused")]


def fuse_again(unet: nn.Module) -> None:
    """Make the fused copies of projections anew, if the U-Net computes with any: its weights have changed."""
    for module in fused_attentions(unet):
        module.fuse_projections()


def separated(unet: Any) -> Any:
    """A U-Net, changed in place: without the fused copies of projections that diffusers leaves after unfusing."""
    for module in unet.modules():
        for name in _FUSED_COPIES & module._modules.keys():
            delattr(module, name)
    return unet


def separate_weights(unet: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a U-Net, without the fused copies of projections that diffusers leaves behind after unfusing."""
    return {name: weight for name, weight in unet.state_dict().items() if not _FUSED_COPIES & {*name.split(".")}}


def require_finite(pipe: Any) -> None:
    """Raise ConeslabError if a weight of the pipeline is NaN or infinite."""
    for part, name in NETWORKS.items():
        require_finite_weights(dict(uncompiled(getattr(pipe, part)).named_parameters()), name)


def require_finite_weights(weights: Mapping[str, torch.Tensor], owner: str) -> None:
    """Raise ConeslabError, naming the first, if a weight is NaN or infinite; sums are enough to see that none is."""
    sums = [weight.detach().sum(dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights.values()]
    if not sums or torch.stack([one.float() for one in sums]).isfinite().all():
        return
    for name, weight in weights.items():
        if not weight.detach().isfinite().all():
            raise ConeslabError(
                f"the {owner} has weights that are NaN or infinite, for example in {name}: load the model again, or "
                "train it again with a lower learning rate"
            )
