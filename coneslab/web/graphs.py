"""A pipeline's three networks as ONNX graphs of fixed shape, and how far they are from PyTorch.

The U-Net's graph takes the keys and values of cross-attention as inputs, one for each matrix of the K-V space. Whatever
an edit does to these matrices is then arithmetic outside the graph, on a few hundred kilobytes, and no graph is written
twice. It also gives the attention maps, which no processor of diffusers materialises.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..diffusion.checks import require_editable, uncompiled
from ..diffusion.encoding import latent_shape, tokenize
from ..diffusion.kvspace import KVSpace, cross_attentions
from ..diffusion.pipelines import Pipeline
from ..diffusion.precision import is_plain
from ..errors import ConeslabError

Precision = Literal["float32", "float16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
_OPSET = 20  # the first with GELU, which WebGPU computes in one go
_SMALL = 64  # numbers: what is smaller stays in float32,
_LARGEST = float(np.finfo(np.float16).max)  # as does what has larger ones, such as the mask of causal attention


@dataclass(frozen=True, repr=False)
class Graph:
    """One network: the bytes of its ONNX file, and an example of what goes in (name -> array) and comes out of PyTorch.

    name: "text_encoder", "unet" or "decoder".
    """

    name: str
    data: bytes
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def __repr__(self) -> str:
        return f"Graph({self.name}, {len(self.data):,} bytes)"


def graphs(pipe: Pipeline, *, precision: Precision = "float16", prompt: str = "a cat") -> dict[str, Graph]:
    """The three graphs of a pipeline: "text_encoder", "unet" and "decoder", by name. The pipeline is not changed.

    text_encoder: ids (1, tokens) int32 -> text (1, tokens, width).
    unet: sample (2, channels, h, w), timestep (1,), and for every layer of the K-V space, under its name, keys or
    values (2, tokens, channels out) -> output (2, channels, h, w), and attention (tokens, h, w): that of the second
    row, which has the prompt; the mean over layers and heads, as `AttentionMaps.average` makes it of one step.
    decoder: latents (1, channels, h, w), scaled -> pixels (1, 3, height, width) in about [-1, 1].
    precision: of the weights in the file; they are computed with in float32. "int8" keeps one scale for each output
    channel. prompt: of the example.
    Raises ConeslabError without the packages onnx and onnxscript, for a U-Net whose attention is not diffusers' own,
    and for a pipeline that cannot be edited (`require_editable`).
    """
    require_editable(pipe)
    checks.choice("precision", precision, PRECISIONS)
    checks.text("prompt", prompt)
    _require_onnx()
    ids = tokenize(pipe, ["", prompt]).cpu()
    noise = torch.randn(1, *latent_shape(pipe), generator=torch.Generator().manual_seed(0))
    encoder, unet, decoder = _TextEncoder(pipe).eval(), _UNet(pipe).eval(), _Decoder(pipe).eval()
    with torch.no_grad():
        text = torch.cat([encoder(row[None].int()) for row in ids])
        projected = {name: F.linear(text, unet.matrices[name]) for name in unet.matrices}
    last = float(pipe.scheduler.config.num_train_timesteps - 1)
    return {
        "text_encoder": _graph("text_encoder", encoder, {"ids": ids[1:].int()}, ["text"], precision),
        "unet": _graph(
            "unet",
            unet,
            {"sample": noise.repeat(2, 1, 1, 1), "timestep": torch.tensor([last]), **projected},
            ["output", "attention"],
            precision,
        ),
        "decoder": _graph("decoder", decoder, {"latents": noise}, ["pixels"], precision),
    }


def difference(graph: Graph) -> float:
    """The largest difference between what a graph gives in ONNX Runtime and what PyTorch gave, over all outputs.

    Raises ConeslabError without the package onnxruntime.
    """
    checks.of_kind("graph", graph, Graph)
    try:
        import onnxruntime
    except ImportError as error:
        raise ConeslabError(_missing("onnxruntime")) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph.data, options, providers=["CPUExecutionProvider"])
    found = session.run(list(graph.outputs), dict(graph.inputs))
    return max(float(np.abs(a - b).max()) for a, b in zip(found, graph.outputs.values(), strict=True))


# --- the networks, as they are traced -------------------------------------------------------------------


def _float32(module: Any) -> Any:
    """A copy in float32 on the CPU, so that the pipeline's own part is left alone."""
    return copy.deepcopy(uncompiled(module)).cpu().float().requires_grad_(False)


class _TextEncoder(nn.Module):
    """Token ids -> text embeddings, as `encode_ids` computes them."""

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__()
        self.encoder = _float32(pipe.text_encoder)
        self.pad = pipe.tokenizer.pad_token_id if getattr(self.encoder.config, "use_attention_mask", False) else None

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.long()
        return self.encoder(ids, attention_mask=None if self.pad is None else (ids != self.pad).long())[0]


class _Decoder(nn.Module):
    """Scaled latents -> pixels, as `decode_latents` computes them."""

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__()
        self.vae = _float32(pipe.vae)
        self.vae.encoder = None
        self.scale = pipe.vae.config.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.scale).sample


class _Given:
    """Attention processor: cross-attention with keys and values that come from outside, or plain self-attention."""

    def __init__(self, path: str | None, given: dict[str, Tensor], maps: list[Tensor]) -> None:
        self.path, self.given, self.maps = path, given, maps

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.path is None:
            key, value = attn.to_k(hidden_states), attn.to_v(hidden_states)
        else:
            key, value = (self.given[f"{self.path}.{kind}.weight"] for kind in ("to_k", "to_v"))
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(hidden_states), key, value)
        )
        shares = (query @ key.transpose(-1, -2) * attn.scale).softmax(-1)  # (batch, heads, places, tokens)
        if self.path is not None:
            self.maps.append(shares[-1].mean(0).T)
        out = attn.to_out[1](attn.to_out[0]((shares @ value).transpose(1, 2).flatten(2)))
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor


class _UNet(nn.Module):
    """The U-Net with keys and values as inputs, which also gives its cross-attention maps."""

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__()
        self.unet = _float32(pipe.unet)
        cross = cross_attentions(self.unet)
        if not is_plain(self.unet) or any(module.norm_cross for module in cross.values()):
            raise ConeslabError(
                "the U-Net has hooks, adapters or an attention of its own, which its graph would not have: unload "
                "them, or call pipe.unet.set_default_attn_processor()"
            )
        self.matrices: dict[str, Tensor] = {
            name: weight.detach() for name, weight in KVSpace(self.unet).parameters.items()
        }
        self.given: dict[str, Tensor] = {}
        self.maps: list[Tensor] = []
        for path, module in list(self.unet.named_modules()):
            if hasattr(module, "set_processor"):
                module.set_processor(_Given(path if path in cross else None, self.given, self.maps))

    def forward(self, sample: Tensor, timestep: Tensor, *projected: Tensor) -> tuple[Tensor, Tensor]:
        self.given.update(zip(self.matrices, projected, strict=True))
        self.maps.clear()
        height, width = sample.shape[-2:]
        out = self.unet(sample, timestep.expand(len(sample)), encoder_hidden_states=projected[0]).sample
        maps = []
        for shares in self.maps:
            halvings = round(math.log2(height * width / shares.shape[1]) / 2)
            side = math.ceil(height / 2**halvings)
            grid = shares.unflatten(1, (side, shares.shape[1] // side))
            maps.append(F.interpolate(grid[None], size=(height, width), mode="bilinear")[0])
        return out, torch.stack(maps).mean(0)


# --- files ----------------------------------------------------------------------------------------------


def _graph(name: str, module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], precision: Precision) -> Graph:
    """Trace a module and write it as ONNX, with narrow weights."""
    with torch.no_grad(), _quietly():
        given = module(*inputs.values())
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _strip(model)
    _narrow(model, precision)
    made = [given] if isinstance(given, Tensor) else given
    return Graph(
        name,
        model.SerializeToString(deterministic=True),
        {key: value.numpy() for key, value in inputs.items()},
        {key: value.numpy() for key, value in zip(outputs, made, strict=True)},
    )


def _strip(model: Any) -> None:
    """Leave out what only describes how the graph was made: half a megabyte, with paths of this machine."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    model.graph.doc_string = ""
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
        del value.metadata_props[:]


def _narrow(model: Any, precision: Precision) -> None:
    """Store weights in fewer bits, and widen them where the graph begins: ONNX Runtime does that once, on loading."""
    from onnx import TensorProto, helper, numpy_helper

    if precision == "float32":
        return
    before: list[Any] = []
    kept, graph = [], model.graph
    for weight in graph.initializer:
        values = numpy_helper.to_array(weight)
        if weight.data_type != TensorProto.FLOAT or values.size < _SMALL or np.abs(values).max() > _LARGEST:
            kept.append(weight)
            continue
        name, narrow = weight.name, f"{weight.name}:{precision}"
        if precision == "float16" or values.ndim < 2:
            kept.append(numpy_helper.from_array(values.astype(np.float16), narrow))
            before.append(helper.make_node("Cast", [narrow], [name], to=TensorProto.FLOAT))
            continue
        axis = 0 if values.ndim == 4 else int(np.argmax(values.shape))
        others = tuple(number for number in range(values.ndim) if number != axis)
        scale = np.maximum(np.abs(values).max(others, keepdims=True), 1e-12) / 127
        kept.append(numpy_helper.from_array(np.round(values / scale).astype(np.int8), narrow))
        kept.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}:scale"))
        before.append(helper.make_node("Cast", [narrow], [f"{name}:wide"], to=TensorProto.FLOAT))
        before.append(helper.make_node("Mul", [f"{name}:wide", f"{name}:scale"], [name]))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    after = list(graph.node)
    del graph.node[:]
    graph.node.extend([*before, *after])


def _missing(package: str) -> str:
    return f"the package {package} is missing, which writing a model for the browser needs: pip install 'coneslab[web]'"


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConeslabError(_missing(str(error.name or "onnx"))) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch.onnx says about its own insides."""
    loggers: Sequence[logging.Logger] = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
