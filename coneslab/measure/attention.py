"""Cross-attention: which part of the picture attends to which word, by picture, token, layer and step.

`record_attention` in `recording.py` watches a pipeline draw and fills these maps. `KVSpace`, where the keys and values
are in the U-Net, is in `diffusion/kvspace.py` and re-exported here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..diffusion.kvspace import KVLayer, KVLayout, KVSpace
from ..errors import ArgumentError, ConeslabError

__all__ = ["AttentionMaps", "KVLayer", "KVLayout", "KVSpace", "attention_probabilities"]


def attention_probabilities(
    attn: Any, hidden_states: Tensor, text: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """softmax(Q Kᵀ / sqrt(d)) of a diffusers `Attention`, which its default processor never materialises.

    hidden_states: (batch, queries, channels); text: (batch, tokens, width); attention_mask: the U-Net's additive
    bias, (batch, 1, tokens). Returns (batch, heads, queries, tokens) float32, or float64 for a float64 model.
    """
    return attention_scores(attn, hidden_states, text, attention_mask).softmax(-1)


@torch.no_grad()
def attention_scores(attn: Any, hidden_states: Tensor, text: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Q Kᵀ / sqrt(d), (batch, heads, queries, tokens)."""
    if attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    query, key = attn.to_q(hidden_states), attn.to_k(text)
    precision = torch.promote_types(query.dtype, torch.float32)
    query, key = (x.to(precision).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key))
    scores = query @ key.transpose(-1, -2) * attn.scale
    return scores if attention_mask is None else scores + attention_mask.to(scores)[:, None]


def with_words(scores: Tensor, words: Iterable[Tensor]) -> Tensor:
    """Probabilities from scores (..., tokens), with those that the tokens of each word would have beside the prompt's.

    words: the scores (..., own tokens) of each word. With Z the prompt's sum of exp(score), a word's tokens get
    exp(score) / (Z + the sum of its own): it is added to the prompt, alone, and the others are none the less for it.
    """
    total = scores.logsumexp(-1, keepdim=True)
    added = [own - torch.logaddexp(total, own.logsumexp(-1, keepdim=True)) for own in words]
    return torch.cat([scores.softmax(-1), *(one.exp() for one in added)], -1)


@dataclass
class Run:
    """One trajectory: a batch of pictures drawn together, from the first step to the last.

    tokenizers: of each picture, as its text was encoded (an edit may have added a token meanwhile), or None if that was
    not heard; asked: where the words asked for are, after the tokens of the prompt.
    """

    tokens: int
    prompts: list[list[str] | None]
    tokenizers: list[Any]
    asked: dict[str, list[int]]
    grid: tuple[int, int]
    timesteps: list[float]
    maps: dict[str, list[Tensor]]  # label -> for each step (pictures, [heads,] tokens and words asked, height, width)


class AttentionMaps:
    """The cross-attention probabilities that `record_attention` has kept, by picture, token, layer and step.

    Pictures are numbered in the order they were drawn, over all calls inside the block. Values are raw
    probabilities: at each place they sum to 1 over the tokens. Methods raise ConeslabError if nothing was recorded.
    """

    def __init__(
        self, tokenizer: Any, *, keep_heads: bool, dtype: torch.dtype, max_bytes: int, words: Sequence[str] = ()
    ) -> None:
        self.keep_heads, self.words = keep_heads, tuple(words)
        self._tokenizer, self._dtype, self._max_bytes = tokenizer, dtype, max_bytes
        self._runs: list[Run] = []
        self.nbytes = 0  # of the maps kept so far

    @property
    def pictures(self) -> int:
        return sum(len(run.prompts) for run in self._runs)

    @property
    def layers(self) -> tuple[str, ...]:
        """Labels of the layers recorded, in the order they run, e.g. "up 1.0"."""
        return tuple(self._find(0)[0].maps)

    def timesteps(self, picture: int = 0) -> tuple[float, ...]:
        """The timesteps of a picture, from first (most noise) to last."""
        return tuple(self._find(picture)[0].timesteps)

    def tokens(self, picture: int = 0) -> list[str]:
        """The tokens of a picture's prompt by position, including padding."""
        return [token.removesuffix("</w>") for token in self._pieces(picture)]

    def _pieces(self, picture: int) -> list[str]:
        run, row = self._find(picture)
        found = run.prompts[row]
        if found is None:
            raise ConeslabError(
                "the prompt of this picture is not known, because its text was encoded outside the block: "
                "encode it inside, or give token positions (0 is the start token) instead of words"
            )
        return found

    def indices(self, word: str, picture: int = 0) -> list[int]:
        """Every position of a word, or of a phrase such as "sks cat", in a picture's prompt.

        Raises ConeslabError if the prompt does not contain it.
        """
        found, tokens = self._occurrences(word, picture), self._pieces(picture)
        if not found:
            special = self._tokenizer.all_special_tokens
            shown = " ".join(piece.replace("</w>", "") for piece in tokens if piece not in special)
            raise ConeslabError(
                f"{word!r} is not in the prompt, whose tokens are: {shown} (for the map that it would have, name it in "
                "record_attention(words=...))"
            )
        return found

    def _occurrences(self, word: str, picture: int) -> list[int]:
        run, row = self._find(picture)
        tokens, tokenizer = self._pieces(picture), run.tokenizers[row] or self._tokenizer
        wanted = tokenizer.tokenize(checks.text("word", word, blank=True))
        starts = [i for i in range(len(tokens)) if wanted and tokens[i : i + len(wanted)] == wanted]
        return [i + offset for i in starts for offset in range(len(wanted))]

    def layer(self, label: str, *, picture: int = 0) -> Tensor:
        """Everything recorded from one layer for one picture: (steps, [heads,] tokens, height, width) float32."""
        return self._layer(label, picture)[..., : self._find(picture)[0].tokens, :, :]

    def _layer(self, label: str, picture: int) -> Tensor:
        """The same, with the tokens of the words asked for after those of the prompt."""
        run, row = self._find(picture)
        checks.choice("layer", label, tuple(run.maps))
        return torch.stack([step[row] for step in run.maps[label]]).float()

    def average(
        self,
        *,
        picture: int = 0,
        layers: str | Iterable[str] | None = None,
        resolution: int | None = None,
        steps: slice | int | Iterable[int] = slice(None),
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Mean over layers, steps and heads, after bilinear scaling to one size: (tokens, height, width) float32.

        layers: labels, default all; resolution: keep only maps of that height; steps: a slice, or the numbers of
        steps, from the end if negative; size: of the result, default the latent grid.
        Raises ConeslabError for a layer or step that was not recorded, and if nothing is left.
        """
        found = self._average(picture=picture, layers=layers, resolution=resolution, steps=steps, size=size)
        return found[: self._find(picture)[0].tokens]

    def _average(
        self,
        *,
        picture: int,
        layers: str | Iterable[str] | None = None,
        resolution: int | None = None,
        steps: slice | int | Iterable[int] = slice(None),
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        run, _ = self._find(picture)
        chosen = list(run.maps) if layers is None else checks.texts("layers", layers)
        if resolution is not None:
            resolution = checks.count("resolution", resolution)
        if size is not None:
            sides = [checks.count("one of size", side, most=8192) for side in checks.items("size", size)]
            if len(sides) != 2:
                raise ArgumentError(f"size is {size}: give height and width")
            size = sides[0], sides[1]
        if not isinstance(steps, slice):
            steps = self._numbers("steps", steps, len(run.timesteps), least=-len(run.timesteps))
        maps = []
        for label in chosen:
            kept = self._layer(label, picture)[steps]
            if len(kept) and resolution in (None, kept.shape[-2]):
                mean = kept.mean((0, 1)) if self.keep_heads else kept.mean(0)
                maps.append(F.interpolate(mean[None], size=size or run.grid, mode="bilinear")[0])
        if not maps:
            raise ConeslabError(
                f"no map is left of {len(run.maps)} layers and {len(run.timesteps)} steps for layers={layers}, "
                f"resolution={resolution}, steps={steps}: choose fewer conditions"
            )
        return torch.stack(maps).mean(0)

    def token(self, token: str | int | Iterable[int], *, picture: int = 0, **choice: Any) -> Tensor:
        """The map of one word (or of one or more positions): (height, width) float32; options as in `average`.

        A word of several tokens, or one that occurs more than once, gives the mean of its maps. A word that is not in
        the prompt but was asked for (`record_attention(words=...)`) has the map that it would have.
        """
        return self._average(picture=picture, **choice)[self._positions(token, picture)].mean(0)

    def per_layer(self, token: str | int | Iterable[int], *, picture: int = 0) -> dict[str, Tensor]:
        """The maps of one word, layer by layer and step by step: label -> (steps, height, width), heads averaged."""
        positions = self._positions(token, picture)
        stacks = {label: self._layer(label, picture) for label in self._find(picture)[0].maps}
        return {
            label: (stack.mean(1) if self.keep_heads else stack)[:, positions].mean(1)
            for label, stack in stacks.items()
        }

    def __repr__(self) -> str:
        if not self._runs:
            return "AttentionMaps(nothing recorded yet)"
        run = self._runs[0]
        return (
            f"AttentionMaps({self.pictures} pictures, {len(run.maps)} layers, {len(run.timesteps)} steps, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    def _positions(self, token: str | int | Iterable[int], picture: int) -> list[int]:
        run, row = self._find(picture)
        if not isinstance(token, str):
            return self._numbers("positions", token, run.tokens)
        if token in run.asked and (run.prompts[row] is None or not self._occurrences(token, picture)):
            return run.asked[token]
        return self.indices(token, picture)

    @staticmethod
    def _numbers(name: str, given: int | Iterable[int], end: int, *, least: int = 0) -> list[int]:
        """One number or several below `end`."""
        several = isinstance(given, Iterable) and getattr(given, "ndim", 1) > 0
        return [
            checks.count(f"one of {name}", one, least=least, most=end - 1)
            for one in (checks.items(name, given) if several else [given])
        ]

    def _find(self, picture: int) -> tuple[Run, int]:
        """The run a picture was drawn in, and its row there."""
        if not self._runs or not self._runs[0].maps:
            raise ConeslabError(
                "nothing was recorded: was a picture drawn inside the block, with the same pipeline and a non-empty "
                "prompt, and does that pipeline run its own U-Net (not a copied one)?"
            )
        row = checks.count("picture", picture, least=0)
        for run in self._runs:
            if 0 <= row < len(run.prompts):
                return run, row
            row -= len(run.prompts)
        raise ConeslabError(f"there is no picture {picture}: {self.pictures} were recorded, numbered from 0")

    def _keep(self, run: Run, label: str, probabilities: Tensor) -> None:
        """Add what one attention gave (pictures, heads, places, tokens) to the maps of its layer."""
        height, width = _grid(run.grid, probabilities.shape[2])
        # (pictures, heads, tokens, height, width)
        kept = probabilities.transpose(-1, -2).unflatten(-1, (height, width))
        kept = (kept if self.keep_heads else kept.mean(1)).to("cpu", self._dtype).contiguous()
        self.nbytes += kept.nbytes
        if self.nbytes > self._max_bytes:
            raise ConeslabError(
                f"the attention maps exceed max_bytes={self._max_bytes:,}: draw fewer pictures or steps in the block, "
                "set keep_heads=False, or raise max_bytes"
            )
        run.maps.setdefault(label, []).append(kept)


def _grid(latent: tuple[int, int], places: int) -> tuple[int, int]:
    """Height and width of a layer that sees `places` positions of a latent grid, halved some number of times."""
    height, width = latent
    while height * width > places:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != places:
        raise ConeslabError(f"{places} places do not come from halving a {latent[0]}x{latent[1]} latent")
    return height, width
