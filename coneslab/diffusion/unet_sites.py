"""The parts of a U-Net by readable names, with the shapes of what they hand on: where one can look in, and change.

`sites` lists them for any pipeline; `activations` acts there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import ArgumentError
from .checks import require_pipeline, text_width
from .encoding import latent_shape
from .kvspace import unet_of
from .pipelines import Pipeline


def sites(pipe: Pipeline) -> dict[str, tuple[int, ...]]:
    """The sites of a pipeline's U-Net in the order they run: name -> shape of what one picture has there.

    Shapes, at the pipeline's own resolution, are (channels, height, width) for convolutions and whole blocks, (places,
    channels) for attention and feed-forward layers, and (heads, places, channels) for the heads of an attention before
    they are mixed. "in" and "out" are the first and last convolution, "down 0", "mid" and "up 1" what a block hands on;
    attention layers hand on what they add to the residual stream. Nothing is computed.

    >>> found = sites(coneslab.load("tiny"))
    >>> list(found)[:5]
    ['in', 'down 0 resnet', 'down 0 self-attention heads', 'down 0 self-attention', 'down 0 cross-attention heads']
    >>> channels, height, width = found["mid"]
    """
    require_pipeline(pipe)
    unet = unet_of(pipe)
    with torch.device("meta"):
        copy = type(unet).from_config(unet.config).eval()
        latents = torch.zeros(1, *latent_shape(pipe))
        text = torch.zeros(1, 1, text_width(unet))
        timestep = torch.zeros(1)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, site in sites_of(copy).items():
        site.register(partial(_note_shape, shapes, name))
    with torch.no_grad():
        copy(latents, timestep, encoder_hidden_states=text)
    return {name: shapes[name] for name in sites_of(unet) if name in shapes}


def _note_shape(shapes: dict[str, tuple[int, ...]], name: str, activation: Tensor) -> None:
    shapes[name] = tuple(activation.shape[1:])


class Site:
    """A module whose output is meant, or the input of an attention's last projection, which are its heads."""

    def __init__(self, module: nn.Module, heads: int = 0) -> None:
        self.module, self.heads = module, heads

    @property
    def kind(self) -> str:
        return "forward_pre_hook" if self.heads else "forward_hook"

    def register(self, act: Callable[[Tensor], Tensor | None]) -> None:
        getattr(self.module, f"register_{self.kind}")(Tap(self.heads, act), with_kwargs=True)


class Tap:
    """Hook of a site: `act` sees what one hands on there, and may return something to put in its place."""

    def __init__(self, heads: int, act: Callable[[Tensor], Tensor | None]) -> None:
        self._heads, self._act = heads, act

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> Any:
        if not output:  # before the projection that mixes the heads
            mixed, *rest = args
            new = self._act(mixed.unflatten(-1, (self._heads, -1)).transpose(1, 2))
            return None if new is None else ((new.transpose(1, 2).flatten(2), *rest), kwargs)
        (given,) = output
        old = given if isinstance(given, Tensor) else given[0]
        new = self._act(old)
        return None if new is None else _in_place_of(old, new, given)


def _in_place_of(old: Tensor, new: Tensor, output: Any) -> Any:
    """A module's output with one tensor exchanged, also where a down block hands it on over its skip connections."""
    if output is old:
        return new
    if isinstance(output, tuple):
        return tuple(_in_place_of(old, new, part) for part in output)
    if isinstance(output, Mapping):  # an output class of diffusers
        return type(output)(**{name: _in_place_of(old, new, part) for name, part in output.items()})
    return output


def sites_of(unet: Any) -> dict[str, Site]:
    """Every site of a U-Net in the order they run: name -> site."""
    found = {"in": Site(unet.conv_in)}
    mid = [("mid", unet.mid_block)] if unet.mid_block is not None else []
    downs = [(f"down {i}", block) for i, block in enumerate(unet.down_blocks)]
    for name, block in downs + mid + [(f"up {i}", block) for i, block in enumerate(unet.up_blocks)]:
        found |= _in_block(name, block)
    return found | {"out": Site(unet.conv_out)}


def _in_block(name: str, block: Any) -> dict[str, Site]:
    resnets = list(getattr(block, "resnets", None) or [])
    attentions = [one for one in getattr(block, "attentions", None) or [] if one is not None]
    found: dict[str, Site] = {}
    for i, resnet in enumerate(resnets):
        found[_numbered(f"{name} resnet", i, resnets)] = Site(resnet)
        if i < len(attentions):  # the middle block has one resnet more
            found |= _in_attention(name, attentions[i], i, attentions)
    for kind in ("downsampler", "upsampler"):
        layers = list(getattr(block, f"{kind}s", None) or [])
        found |= {_numbered(f"{name} {kind}", i, layers): Site(layer) for i, layer in enumerate(layers)}
    return found | {name: Site(block)}


def _numbered(name: str, i: int, among: list[Any], *more: str) -> str:
    """A name with its number, which is left out where there is only one."""
    number = ".".join([*([str(i)] if len(among) > 1 else []), *more])
    return f"{name} {number}".strip()


def _in_attention(name: str, attention: Any, i: int, among: list[Any]) -> dict[str, Site]:
    blocks = list(getattr(attention, "transformer_blocks", []))
    if not blocks:  # plain self-attention over places
        return {_numbered(f"{name} self-attention", i, among): Site(attention)}
    found: dict[str, Site] = {}
    for k, block in enumerate(blocks):
        more = [str(k)] if len(blocks) > 1 else []
        for part, kind in (("attn1", "self-attention"), ("attn2", "cross-attention")):
            layer = getattr(block, part, None)
            if layer is not None:
                label = _numbered(f"{name} {kind}", i, among, *more)
                found |= {f"{label} heads": Site(layer.to_out[0], layer.heads), label: Site(layer)}
        found[_numbered(f"{name} feed-forward", i, among, *more)] = Site(block.ff)
    return found | {_numbered(f"{name} transformer", i, among): Site(attention)}


def chosen_sites(pipe: Pipeline, chosen: str | Iterable[str]) -> list[str]:
    """The sites of a pipeline that match names or patterns, in the order they run.

    A pattern has * and ? as those of file names. A name without its last number means all of them: "up 1 resnet" those
    of that block, "down" the outputs of all down blocks.
    Raises ArgumentError for one that matches no site.
    """
    require_pipeline(pipe)
    names = list(sites_of(unet_of(pipe)))
    found: set[str] = set()
    for pattern in checks.texts("sites", chosen):
        matching = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(_unnumbered(name), pattern)]
        if not matching:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ArgumentError(
                f"no site is named {pattern!r}: give names or patterns such as {', '.join(map(repr, near))} or "
                "'*cross-attention'; coneslab.diffusion.sites(pipe) lists them all"
            )
        found |= {*matching}
    return [name for name in names if name in found]


def _unnumbered(name: str) -> str:
    return re.sub(r" [\d.]+(?=( heads)?$)", "", name)
