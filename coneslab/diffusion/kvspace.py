"""The cross-attention keys and values of a U-Net as one flat vector θ, whose entries are the neurons.

`KVSpace` lays every `attn2.to_k` and `attn2.to_v` weight end to end, in module order (Cones, arXiv 2303.05125,
Sec. 3.1). It is here rather than in `measure/attention.py`, which re-exports it, because masks and deltas need
only the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..errors import ArgumentError, ConeslabError, MismatchError
from .checks import require_own_projections, require_pipeline, require_plain_weights, uncompiled
from .pipelines import fingerprint

_ENDINGS = {"to_k": "K", "to_v": "V"}


@dataclass(frozen=True)
class KVLayer:
    """One key or value projection: a matrix (channels out, text width in) and its place in the flat vector θ.

    name: the weight's name in the U-Net; block: "down 0", "mid" or "up 1"; kind: "K" or "V"; level: how many times
    the latent has been halved there; resolution: side of the latent grid there, in latent pixels; start: first index
    of its slice.
    """

    name: str
    block: str
    kind: str
    level: int
    resolution: int
    shape: tuple[int, int]
    start: int

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def label(self) -> str:
        """Short name for figures, e.g. "up 1.0 K": block, attention in the block (and its layer if it has several)."""
        return f"{short_name(self.name.rsplit('.', 2)[0])} {self.kind}"


@dataclass(frozen=True)
class KVLayout:
    """The table of the K-V space: which slice of the flat vector belongs to which projection.

    It holds no weights, so masks and deltas can store it in their files.
    """

    layers: tuple[KVLayer, ...]

    @cached_property
    def n(self) -> int:
        """Number of neurons: the length of θ."""
        return sum(layer.size for layer in self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[KVLayer]:
        return iter(self.layers)

    def require_length(self, flat: Tensor) -> None:
        """Raise MismatchError unless `flat` is one vector with one entry per neuron."""
        checks.of_kind("the flat vector", flat, Tensor)
        if tuple(flat.shape) != (self.n,):
            raise MismatchError(
                f"got a tensor of shape {tuple(flat.shape)}, but this K-V space has {self.n} neurons in "
                f"{len(self)} layers: give one flat vector of that length, in the order of `names`"
            )

    def matrices(self, flat: Tensor) -> dict[str, Tensor]:
        """Split a flat vector (n,) into its matrices (channels out, text width in): name -> view of `flat`."""
        self.require_length(flat)
        return {layer.name: flat[layer.slice].view(layer.shape) for layer in self.layers}

    def per_layer(self, flat: Tensor) -> Tensor:
        """Mean of a flat vector (n,) within each layer -> (layers,) float64; for a bool mask, the density per layer."""
        return torch.stack([matrix.double().mean() for matrix in self.matrices(flat).values()])

    def rows(self, flat: Tensor) -> dict[str, Tensor]:
        """Mean over the text width, one number per output channel: name -> (channels,) float64."""
        return {name: matrix.double().mean(1) for name, matrix in self.matrices(flat).items()}

    def columns(self, flat: Tensor) -> Tensor:
        """Mean over the output channels: (layers, text width) float64, a heat map of what each layer reads.

        All layers of Stable Diffusion read text of the same width; raises MismatchError if they do not.
        """
        if len({layer.shape[1] for layer in self.layers}) > 1:
            raise MismatchError("the layers read text of different widths: use `matrices` and average each separately")
        return torch.stack([matrix.double().mean(0) for matrix in self.matrices(flat).values()])

    def heat_map(self, flat: Tensor, *, bins: int = 32) -> Tensor:
        """Mean over `bins` equal runs of output channels: (layers, bins) float64, one row per layer."""
        bins = checks.count("bins", bins)
        rows = [F.adaptive_avg_pool1d(values[None], bins)[0] for values in self.rows(flat).values()]
        return torch.stack(rows)

    def where(self, *, kind: str | None = None, level: int | None = None, block: str | None = None) -> Tensor:
        """Bool (n,): the neurons of the layers that match, e.g. `where(kind="V", level=0)`.

        Raises ArgumentError for a kind, level or block that no layer has, and if none has them together.
        """
        wanted = {"kind": kind, "level": level, "block": block}
        for name, value in wanted.items():
            if value is not None:
                checks.choice(name, value, tuple(dict.fromkeys(getattr(layer, name) for layer in self.layers)))
        chosen = torch.zeros(self.n, dtype=torch.bool)
        for layer in self.layers:
            if all(value in (None, getattr(layer, name)) for name, value in wanted.items()):
                chosen[layer.slice] = True
        if not chosen.any():
            there = ", ".join(dict.fromkeys(f"{layer.block} at level {layer.level}" for layer in self.layers))
            raise ArgumentError(f"no layer has block={block!r} and level={level!r}: there are {there}")
        return chosen

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(layer) for layer in self.layers]

    @classmethod
    def from_json(cls, rows: Iterable[dict[str, Any]]) -> KVLayout:
        """The inverse of `as_json`. Raises ConeslabError if the slices do not lie end to end."""
        layers = tuple(KVLayer(**{**row, "shape": tuple(row["shape"])}) for row in rows)
        start = 0
        for layer in layers:
            if layer.start != start or len(layer.shape) != 2 or min(layer.shape) < 1:
                raise ConeslabError(f"layer {layer.name} starts at {layer.start}, expected {start}")
            start += layer.size
        return cls(layers)


class KVSpace:
    """The K-V weights of one U-Net as a flat vector θ (Cones, Sec. 3.1): every neuron is one entry.

    Give a pipeline or a U-Net. The order is module order, in which diffusers lists the down blocks, then the up
    blocks, then the middle block; `layers` says which block and resolution a slice belongs to.
    Raises ConeslabError if there is no cross-attention, or it does not compute with these weights: they are wrapped,
    fused, quantised or offloaded.

    >>> space = KVSpace(coneslab.load("tiny"))
    >>> space
    KVSpace(... neurons in ... layers at ...)
    >>> sorted({layer.kind for layer in space.layers})
    ['K', 'V']
    >>> theta = space.gather()  # one long vector, and as matrices again
    >>> theta.shape == (space.n,), list(space.layout.matrices(theta)) == list(space.names)
    (True, True)
    """

    def __init__(self, model: Any) -> None:
        unet = unet_of(model)
        if isinstance(unet, nn.Module) and unet is uncompiled(model):
            require_plain_weights(unet, "U-Net")
        else:
            require_pipeline(model)
        require_own_projections(unet)
        self.modules: dict[str, Any] = cross_attentions(unet)
        self.parameters: dict[str, nn.Parameter] = {}
        layers, start = [], 0
        for path, module in self.modules.items():
            block, level = _block(unet, path)
            side = unet.config.sample_size
            side = side if isinstance(side, int) else max(side)
            for ending, kind in _ENDINGS.items():
                weight = getattr(module, ending).weight
                name = f"{path}.{ending}.weight"
                self.parameters[name] = weight
                shape = (weight.shape[0], weight.shape[1])
                layers.append(KVLayer(name, block, kind, level, math.ceil(side / 2**level), shape, start))
                start += weight.numel()
        self.layout = KVLayout(tuple(layers))

    @property
    def layers(self) -> tuple[KVLayer, ...]:
        return self.layout.layers

    @property
    def names(self) -> tuple[str, ...]:
        return self.layout.names

    @property
    def n(self) -> int:
        return self.layout.n

    def gather(self, values: dict[str, Tensor] | None = None) -> Tensor:
        """Return θ (n,): a copy of the weights, or of tensors with the same names, such as their gradients."""
        values = values if values is not None else dict(self.parameters)
        return torch.cat([values[name].detach().reshape(-1) for name in self.names])

    @torch.no_grad()
    def scatter(self, flat: Tensor) -> None:
        """Write a flat vector (n,) into the weights for good (`edits.swapped` does it for the length of a block)."""
        for name, matrix in self.layout.matrices(flat).items():
            self.parameters[name].copy_(matrix)

    def fingerprint(self) -> str:
        """Hex SHA-256 of the names and bytes of the K-V weights as they are now: it identifies the model."""
        return fingerprint(dict(self.parameters))

    def __repr__(self) -> str:
        levels = sorted({layer.resolution for layer in self.layers}, reverse=True)
        grids = ", ".join(f"{side}x{side}" for side in levels)
        return f"KVSpace({self.n:,} neurons in {len(self.layers)} layers at {grids})"


def unet_of(model: Any) -> Any:
    """The U-Net of a pipeline (or the U-Net itself), without torch.compile's wrapper."""
    return uncompiled(getattr(model, "unet", model))


def cross_attentions(unet: nn.Module) -> dict[str, Any]:
    """The cross-attention modules of a U-Net: name -> module, in module order.

    Raises ConeslabError if there are none.
    """
    found: dict[str, Any] = {}

    def look_into(module: nn.Module, path: str) -> None:
        for name, child in module._modules.items():
            if child is not None:
                if name == "attn2" and getattr(child, "is_cross_attention", False):
                    found[path + name] = child
                look_into(child, f"{path}{name}.")

    look_into(unet, "")
    if not found:
        raise ConeslabError(
            f"{type(unet).__name__} has no cross-attention (no module attn2 with to_k and to_v): "
            "give a StableDiffusionPipeline or its U-Net"
        )
    return found


def _block(unet: Any, path: str) -> tuple[str, int]:
    """Block name and level (halvings of the latent so far) of a module inside a U-Net."""
    halvings = [getattr(block, "downsamplers", None) is not None for block in unet.down_blocks]
    doublings = [getattr(block, "upsamplers", None) is not None for block in unet.up_blocks]
    kind, *rest = path.split(".")
    if kind == "down_blocks":
        return f"down {rest[0]}", sum(halvings[: int(rest[0])])
    if kind == "up_blocks":
        return f"up {rest[0]}", sum(halvings) - sum(doublings[: int(rest[0])])
    return "mid", sum(halvings)


def short_name(path: str) -> str:
    """ "down_blocks.0.attentions.1.transformer_blocks.0.attn2" -> "down 0.1"."""
    parts = path.split(".")
    numbers = [part for part in parts if part.isdigit()]
    if numbers and numbers[-1] == "0" and "transformer_blocks" in parts:
        numbers.pop()  # most models have one transformer block; name it only where there are more
    return f"{parts[0].split('_')[0]} {'.'.join(numbers)}".strip()
