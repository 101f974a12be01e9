"""Files of diffusers, read and written: Textual Inversion embeddings, LoRA and Custom Diffusion weights.

Only safetensors. What other programs write is read as far as diffusers reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from .. import checks
from ..diffusion.checks import require_pipeline
from ..diffusion.kvspace import KVSpace, unet_of
from ..diffusion.pipelines import Pipeline
from ..errors import ConeslabError, FileFormatError, MismatchError
from ..files import require_writable, safetensors_in, sealed, tensor_sum, user_path, write_whole
from .base import FORMAT, Combined
from .low_rank import LowRankDelta
from .tokens import TokenEdit, embedding_of, vocabulary_fingerprint
from .weights import WeightDelta, model_fingerprint

WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"  # as diffusers' own training scripts name them
LORA = "pytorch_lora_weights.safetensors"
_LORA_CONFIG = "lora_adapter_metadata"  # where diffusers writes peft's `LoraConfig`, as "unet.r" and so on
# Fields of it that have no part in what a trained file changes; the others must be as good as absent.
_NO_MATTER = frozenset(
    "target_modules exclude_modules layers_to_transform layers_pattern lora_dropout inference_mode task_type "
    "base_model_name_or_path revision auto_mapping peft_version megatron_core qalora_group_size runtime_config".split()
)
_SCALING = frozenset(("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"))
_ON_THE_MODEL_ITSELF = (True, False, "gaussian", "orthogonal", "eva")  # how matrices may begin: others change the model


def export_tokens(
    edit: TokenEdit, pipe: Pipeline, folder: str | Path, *, names: Mapping[str, str] | None = None
) -> list[Path]:
    """Write one file per token, for `pipe.load_textual_inversion(file)`; returns the files.

    names: token -> its name in the file, if it is to differ. diffusers refuses a word that the tokenizer already has,
    such as the rare word "sks". Raises ConeslabError for such a name, for one that two tokens have, or for a name of a
    token that the edit lacks.
    """
    require_pipeline(pipe)
    checks.of_kind("edit", edit, TokenEdit)
    given = checks.mapping("names", {} if names is None else names, least=0)
    if unknown := given.keys() - {*edit.tokens}:
        raise ConeslabError(
            f"names are given for {', '.join(sorted(unknown))}, but the tokens are {', '.join(edit.tokens)}: name those"
        )
    folder, files = require_writable(folder, folder=True), {}
    chosen = [checks.word("name", given.get(token, token)) for token in edit.tokens]
    if twice := [name for name in chosen if chosen.count(name) > 1]:
        raise ConeslabError(
            f"two tokens would be called {twice[0]} in their files: give each a name of its own (names=)"
        )
    words = pipe.tokenizer.get_vocab()
    taken = [name for name in chosen if name in words or f"{name}</w>" in words]
    if taken:
        raise ConeslabError(
            f"diffusers does not load a token that the tokenizer already has ({', '.join(taken)}): give another name, "
            f'for example names={{"{taken[0]}": "<{taken[0]}>"}}, and use it in prompts'
        )
    for name, vector in zip(chosen, edit.vectors, strict=True):
        stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
        while stem in files:
            stem += "_"
        files[stem] = _write(folder / f"{stem}.safetensors", {name: vector.contiguous()})
    return list(files.values())


def import_tokens(pipe: Pipeline, file: str | Path, *, token: str | None = None) -> TokenEdit:
    """Read a Textual Inversion file of diffusers or AUTOMATIC1111, also one with several vectors.

    token: its name in prompts, default the one in the file. Several vectors become the tokens "name", "name_1", …,
    which diffusers substitutes for "name" in prompts.
    Raises FileFormatError for any other file, MismatchError for a text encoder of another width.
    """
    require_pipeline(pipe)
    tensors = _read(file)
    if len(tensors) != 1:
        raise FileFormatError(f"{file} holds {len(tensors)} tensors, expected one embedding: give another file")
    ((name, vectors),) = tensors.items()
    name = name if token is None else checks.word("token", token)
    if name == "emb_params":
        raise ConeslabError(f"{file} does not name its token: give one, for example token='<{Path(file).stem}>'")
    vectors = vectors.float()[None] if vectors.ndim == 1 else vectors.float()
    width = embedding_of(pipe).weight.shape[1]
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise MismatchError(
            f"{file} holds vectors of shape {tuple(vectors.shape)}, this text encoder's have {width} numbers: it was "
            "learned for another model"
        )
    names = (name, *(f"{name}_{number}" for number in range(1, len(vectors))))
    return TokenEdit(names, vectors, vocabulary_fingerprint(pipe), settings={"file": Path(file).name})


def export_custom_diffusion(
    edit: Combined, pipe: Pipeline, folder: str | Path, *, names: Mapping[str, str] | None = None
) -> list[Path]:
    """Write what `custom_diffusion` or `merge` returned, for `unet.load_attn_procs` and `load_textual_inversion`.

    The file of weights holds the tuned keys and values themselves, not their change. names: see `export_tokens`. Read
    them with `pipe.unet.load_attn_procs(folder, weight_name=WEIGHTS, _pipeline=pipe)`: without the last argument
    diffusers 0.42 reads the file and then ignores it.
    """
    require_pipeline(pipe)
    token, delta = custom_diffusion_parts(edit)
    tensors: dict[str, Tensor] = {name: torch.zeros(0) for name in unet_of(pipe).attn_processors}  # untouched ones
    with delta.applied(pipe):
        for path, module in KVSpace(pipe).modules.items():
            del tensors[f"{path}.processor"]
            for ending in ("to_k", "to_v"):
                weight = getattr(module, ending).weight.detach().cpu().contiguous().clone()
                tensors[f"{path}.processor.{ending}_custom_diffusion.weight"] = weight
    written = export_tokens(token, pipe, folder, names=names)
    return [_write(user_path(folder) / WEIGHTS, tensors), *written]


def import_custom_diffusion(pipe: Pipeline, folder: str | Path, *, weights: str = WEIGHTS) -> Combined:
    """Read Custom Diffusion weights, and every token file beside them, as one edit.

    Raises FileFormatError if they are missing or of another kind, MismatchError for a model of another shape.
    """
    require_pipeline(pipe)
    folder, space, deltas = user_path(folder), KVSpace(pipe), {}
    tensors = _read(folder / weights)
    for name, parameter in space.parameters.items():
        path, ending, _ = name.rsplit(".", 2)
        key = f"{path}.processor.{ending}_custom_diffusion.weight"
        if key not in tensors:
            raise FileFormatError(f"{folder / weights} lacks {key}: it is not for Custom Diffusion on this U-Net")
        if tensors[key].shape != parameter.shape:
            raise MismatchError(f"{key} is {tuple(tensors[key].shape)}, this pipeline's is {tuple(parameter.shape)}")
        deltas[name] = tensors[key].float() - parameter.detach().float().cpu()
    if any("to_q_custom_diffusion" in key or "to_out_custom_diffusion" in key for key in tensors):
        raise FileFormatError(f"{folder / weights} tunes queries and outputs too; this reads keys and values only")
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != weights)
    tokens = [import_tokens(pipe, file) for file in files]
    return Combined((*tokens, WeightDelta(deltas, model_fingerprint(pipe), subject=folder.name)))


def export_lora(edit: LowRankDelta, folder: str | Path) -> Path:
    """Write a low-rank change of the U-Net's linear layers for `pipe.load_lora_weights(folder)`; returns the file.

    The factors hold the edit at dose 1, so diffusers' scale 1 is all of it.
    """
    checks.of_kind("edit", edit, LowRankDelta)
    tensors: dict[str, Tensor] = {}
    for name, (left, right) in edit.factors.items():
        layer = f"unet.{name.removesuffix('.weight')}"
        tensors |= {f"{layer}.lora_A.weight": right.contiguous(), f"{layer}.lora_B.weight": left.contiguous()}
    return _write(require_writable(folder, folder=True) / LORA, tensors)


def import_lora(pipe: Pipeline, path: str | Path) -> LowRankDelta:
    """Read a LoRA file for a U-Net as an edit: one of diffusers, peft or kohya's scripts, or the folder it is in.

    The factors hold the whole change, scaled by the file's alphas, or as diffusers' `lora_adapter_metadata` in it says.
    Raises FileFormatError for any other file, for one that changes more than linear layers of the U-Net, and for what
    adds up otherwise (DoRA) or is not known here; MismatchError for a model of another shape.
    """
    require_pipeline(pipe)
    from diffusers import StableDiffusionPipeline  # imported here, as it takes seconds
    from diffusers.utils import convert_unet_state_dict_to_peft

    file = user_path(path) / LORA if user_path(path).is_dir() else user_path(path)
    unet, (found, metadata) = unet_of(pipe), _read_all(file)
    if metadata.get("format") == FORMAT:
        raise FileFormatError(f"{file} is an edit of this package and no LoRA file: read it with coneslab.load_edit")
    if magnitudes := [name for name in found if "dora_scale" in name]:  # diffusers leaves them out, with a warning
        raise FileFormatError(f"{file} is a DoRA ({magnitudes[0]}), which is no product of two matrices: give a LoRA")
    try:
        state, alphas = StableDiffusionPipeline.lora_state_dict(dict(found), unet_config=unet.config)
    except Exception as error:  # each of diffusers' converters has its own ways to say so
        raise FileFormatError(f"{file} holds no LoRA that diffusers can read ({error}): give another file") from error
    if other := [name for name in state if not name.startswith("unet.")]:
        raise FileFormatError(
            f"{file} changes more than the U-Net ({other[0]}), which edits here leave as it is: give one of the U-Net"
        )
    state, alphas = (
        convert_unet_state_dict_to_peft({name.removeprefix("unet."): value for name, value in given.items()})
        for given in (state, alphas or {})
    )
    config = _lora_config(file, metadata)
    if config is not None and alphas:
        raise FileFormatError(
            f"{file} gives alphas in its tensors and in its metadata: export it again with one of them"
        )
    layers = dict.fromkeys(name.rpartition(".lora_")[0] for name in state)
    more = state.keys() - {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    weights, factors = dict(unet.named_parameters()), {}
    for layer in layers:
        left, right = (state.get(f"{layer}.lora_{part}.weight") for part in "BA")
        if more or left is None or right is None or not left.ndim == right.ndim == 2 or left.shape[1] != len(right):
            raise FileFormatError(
                f"{file} holds more than pairs of matrices for linear layers ({min(more, default=layer)})"
            )
        name = layer.replace(".processor.", ".")
        weight = weights.get(f"{name}.weight")
        shape = None if weight is None else tuple(weight.shape)
        change = (left.shape[0], right.shape[1])
        if shape != change:
            raise MismatchError(
                f"{file} changes {name} by a matrix of shape {change}, and it is {shape or 'not there'} in this "
                "pipeline's U-Net: it was trained for another model"
            )
        rank = left.shape[1]
        scale = alphas.get(f"{layer}.lora_A.weight.alpha", rank) / rank
        if config is not None:
            scale = _lora_scale(file, config, name, rank)
        factors[f"{name}.weight"] = left.float() * scale, right.float()
    return LowRankDelta(factors, model_fingerprint(pipe), file.stem, {"file": file.name})


def _lora_config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What a file says about the U-Net's LoRA: the fields of peft's `LoraConfig`; None if it says nothing.

    Raises FileFormatError for fields that would change more than the scale, such as those of a DoRA.
    """
    if not metadata.get(_LORA_CONFIG):
        return None
    from peft import LoraConfig

    try:
        given = json.loads(metadata[_LORA_CONFIG])
        own = {name.removeprefix("unet."): value for name, value in given.items() if name.startswith("unet.")}
    except (ValueError, AttributeError) as error:
        raise FileFormatError(f"{file} has {_LORA_CONFIG} that is no JSON object ({error}): export it again") from error
    if not own:
        raise FileFormatError(f"{file} has {_LORA_CONFIG} without a field of the U-Net's: export it again")
    usual = LoraConfig()
    config = {name: own.get(name, getattr(usual, name)) for name in _SCALING}
    for name, value in own.items():
        fine = name in _NO_MATTER or name in _SCALING or value in (None, False, "none", {}, [])
        if name == "peft_type":
            fine = value == "LORA"
        if name == "init_lora_weights":
            fine = value in _ON_THE_MODEL_ITSELF
        if not fine:
            raise FileFormatError(
                f"{file} was made with {name}={value!r}, which is not understood here: it would change the U-Net in "
                "another way; give a plain LoRA, such as diffusers' training scripts write"
            )
    return config


def _lora_scale(file: Path, config: Mapping[str, Any], layer: str, rank: int) -> float:
    """What the product of a layer's matrices is multiplied with: alpha / r, or alpha / sqrt(r) (rsLoRA), as in peft."""
    from peft.utils.other import get_pattern_key

    try:
        r, alpha = (
            config[pattern].get(get_pattern_key(config[pattern], layer), config[name])
            for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
        )
        alpha = checks.number("lora_alpha", alpha)
    except (AttributeError, re.error, ConeslabError) as error:
        raise FileFormatError(f"{file} has {_LORA_CONFIG} that says no scale ({error}): export it again") from error
    if r != rank:
        raise FileFormatError(
            f"{file} has matrices of rank {rank} for {layer}, and its {_LORA_CONFIG} says {r}: export it again"
        )
    return alpha / (rank**0.5 if config["use_rslora"] else rank)


def _write(file: Path, tensors: dict[str, Tensor]) -> Path:
    return write_whole(file, save(tensors, sealed(tensors, {"format": "pt"})))


def _read(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; see `_read_all`."""
    return _read_all(file)[0]


def _read_all(file: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, with the right checksum if it has one; other programs write none.

    Raises FileFormatError for any other file, MissingFileError if there is none.
    """
    remedy = "export it again; pickle files (.bin, .pt) are never loaded: convert them first"
    tensors, metadata = safetensors_in(file, what="safetensors file", remedy=remedy)
    if metadata.pop("checksum", None) not in (None, tensor_sum(tensors, metadata)):
        raise FileFormatError(f"{file} is damaged: its contents do not match their checksum; {remedy}")
    return tensors, metadata


def custom_diffusion_parts(edit: Combined) -> tuple[TokenEdit, WeightDelta]:
    """The tokens' vectors and the weights' change. Raises ConeslabError if the edit is not made of these two."""
    kinds = {type(part): part for part in getattr(edit, "edits", ())}
    if set(kinds) != {TokenEdit, WeightDelta}:
        raise ConeslabError(f"{type(edit).__name__} is not a Custom Diffusion edit: give one of `custom_diffusion`")
    if edit.dose != 1:
        raise ConeslabError(
            f"this edit is on at {edit.dose:g} of its parts, and a file holds whole ones: give Combined(edit.edits)"
        )
    return kinds[TokenEdit], kinds[WeightDelta]
