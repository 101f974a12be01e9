"""Record cross-attention: which part of the picture attends to which word, layer by layer and step by step.

`record_attention` watches a pipeline draw and keeps the probabilities that its attention never materialises.
`KVSpace`, where the keys and values are in the U-Net, is in `diffusion/kvspace.py` and re-exported here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..blocks import Block, Made, Place
from ..diffusion.checks import require_own_projections, require_pipeline, uncompiled
from ..diffusion.encoding import encode_prompts
from ..diffusion.kvspace import KVLayer, KVLayout, KVSpace, cross_attentions, short_name
from ..diffusion.pipelines import Pipeline, require_float
from ..diffusion.precision import without_compiling
from ..errors import ArgumentError, ConeslabError

__all__ = ["AttentionMaps", "KVLayer", "KVLayout", "KVSpace", "attention_probabilities", "record_attention"]

_RECORDABLE = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "AttnProcessorNPU",
    "_RecordingProcessor",
)


@torch.no_grad()
def attention_probabilities(
    attn: Any, hidden_states: Tensor, text: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """softmax(Q Kᵀ / sqrt(d)) of a diffusers `Attention`, which its default processor never materialises.

    hidden_states: (batch, queries, channels); text: (batch, tokens, width); attention_mask: the U-Net's additive
    bias, (batch, 1, tokens). Returns (batch, heads, queries, tokens) float32, or float64 for a float64 model.
    """
    if attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    query, key = attn.to_q(hidden_states), attn.to_k(text)
    precision = torch.promote_types(query.dtype, torch.float32)
    query, key = (x.to(precision).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key))
    scores = query @ key.transpose(-1, -2) * attn.scale
    if attention_mask is not None:
        scores = scores + attention_mask.to(scores)[:, None]
    return scores.softmax(-1)


@dataclass
class _Run:
    """One trajectory: a batch of pictures drawn together, from the first step to the last."""

    text: Tensor
    prompts: list[list[str] | None]
    grid: tuple[int, int]
    timesteps: list[float]
    maps: dict[str, list[Tensor]]  # label -> for each step (pictures, [heads,] tokens, height, width)


class AttentionMaps:
    """The cross-attention probabilities that `record_attention` has kept, by picture, token, layer and step.

    Pictures are numbered in the order they were drawn, over all calls inside the block. Values are raw
    probabilities: at each place they sum to 1 over the tokens. Methods raise ConeslabError if nothing was recorded.
    """

    def __init__(self, tokenizer: Any, *, keep_heads: bool, dtype: torch.dtype, max_bytes: int) -> None:
        self.keep_heads = keep_heads
        self._tokenizer, self._dtype, self._max_bytes = tokenizer, dtype, max_bytes
        self._runs: list[_Run] = []
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
        tokens, wanted = self._pieces(picture), self._tokenizer.tokenize(checks.text("word", word, blank=True))
        starts = [i for i in range(len(tokens)) if wanted and tokens[i : i + len(wanted)] == wanted]
        if not starts:
            special = self._tokenizer.all_special_tokens
            shown = " ".join(piece.replace("</w>", "") for piece in tokens if piece not in special)
            raise ConeslabError(f"{word!r} is not in the prompt, whose tokens are: {shown}")
        return [i + offset for i in starts for offset in range(len(wanted))]

    def layer(self, label: str, *, picture: int = 0) -> Tensor:
        """Everything recorded from one layer for one picture: (steps, [heads,] tokens, height, width) float32."""
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
        run, row = self._find(picture)
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
            kept = self.layer(label, picture=picture)[steps]
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

        A word of several tokens, or one that occurs more than once, gives the mean of its maps.
        """
        return self.average(picture=picture, **choice)[self._positions(token, picture)].mean(0)

    def per_layer(self, token: str | int | Iterable[int], *, picture: int = 0) -> dict[str, Tensor]:
        """The maps of one word, layer by layer and step by step: label -> (steps, height, width), heads averaged."""
        positions = self._positions(token, picture)
        stacks = {label: self.layer(label, picture=picture) for label in self._find(picture)[0].maps}
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
        if isinstance(token, str):
            return self.indices(token, picture)
        run, _ = self._find(picture)
        return self._numbers("positions", token, run.text.shape[1])

    @staticmethod
    def _numbers(name: str, given: int | Iterable[int], end: int, *, least: int = 0) -> list[int]:
        """One number or several below `end`."""
        several = isinstance(given, Iterable) and getattr(given, "ndim", 1) > 0
        return [
            checks.count(f"one of {name}", one, least=least, most=end - 1)
            for one in (checks.items(name, given) if several else [given])
        ]

    def _find(self, picture: int) -> tuple[_Run, int]:
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


class _RecordingProcessor:
    """Calls the processor it replaces, unchanged, and also keeps the probabilities."""

    def __init__(self, original: Any, keep: Callable[[Tensor], None]) -> None:
        self.original, self.keep = original, keep

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            self.keep(attention_probabilities(attn, hidden_states, encoder_hidden_states, attention_mask))
        if temb is not None:  # not every processor takes one
            kwargs["temb"] = temb
        return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


class record_attention(Block):
    """Record every cross-attention map while a pipeline draws, and put everything back afterwards.

    The pictures are bit for bit those of an unrecorded run: the maps are computed beside the attention. (A compiled
    pipeline computes uncompiled in the block.) With classifier-free guidance only the conditional half is kept.

    keep_heads: keep the heads apart instead of their mean; dtype: of the maps, which are kept on the CPU;
    max_bytes: how much may be kept. guided: whether the first half of each batch is the unconditional one; default:
    recognised by its latents being those of the second half, unless the pipeline's last guidance scale says no.
    Raises ConeslabError for a processor whose probabilities cannot be known, such as one with fused projections, and
    when `max_bytes` is used up.

    >>> pipe = coneslab.load("tiny")
    >>> with coneslab.record_attention(pipe) as maps:
    ...     images = coneslab.generate(pipe, "a cat on the grass", sampler_steps=2)
    >>> maps
    AttentionMaps(1 pictures, ... layers, 2 steps, ... MiB)
    >>> maps.indices("cat")  # after the start token and "a"
    [2]
    >>> where = maps.token("cat")  # (height, width), averaged over layers, steps and heads
    >>> everything = maps.average()  # (tokens, height, width)
    >>> where.shape == everything.shape[1:], bool((everything.sum(0) - 1).abs().max() < 0.01)
    (True, True)
    """

    def __init__(
        self,
        pipe: Pipeline,
        *,
        keep_heads: bool = False,
        dtype: torch.dtype = torch.float16,
        max_bytes: int = 2 * 2**30,
        guided: bool | None = None,
    ) -> None:
        require_pipeline(pipe)
        checks.flag("keep_heads", keep_heads)
        dtype, max_bytes = require_float(dtype), checks.count("max_bytes", max_bytes, most=2**63)
        if guided is not None:
            checks.flag("guided", guided)
        maps = AttentionMaps(pipe.tokenizer, keep_heads=keep_heads, dtype=dtype, max_bytes=max_bytes)
        self._recorder = _Recorder(pipe, maps, guided)
        super().__init__(partial(_processors, pipe, self._recorder), maps, pipe=pipe)

    def open(self, made: Made) -> AttentionMaps:
        recorder, pipe = self._recorder, self._pipe
        require_own_projections(uncompiled(pipe.unet))
        made.enter(without_compiling(pipe))
        recorder.stopped = False
        hooked = (
            (pipe.unet, "forward_pre_hook", recorder.before_step),
            (pipe.text_encoder, "forward_hook", recorder.after_text),
        )
        for module, kind, _ in hooked:
            made.undo(partial(_unhook, module=module, kind=kind, recorder=recorder))
        maps = super().open(made)
        for module, kind, function in hooked:
            getattr(module, f"register_{kind}")(function, with_kwargs=True)
        return maps


def _processors(pipe: Pipeline, recorder: _Recorder) -> Iterator[tuple[Place, _RecordingProcessor]]:
    """Every cross-attention's processor, and one that records around it. (Not a method: see `Made.undo`.)"""
    for path, module in cross_attentions(pipe.unet).items():
        original = module.processor
        kind = type(original).__name__
        if kind not in _RECORDABLE:
            raise ConeslabError(
                f"cannot record {path}: the attention inside {kind} is not known; "
                "call pipe.unet.set_default_attn_processor() first"
            )
        place = Place(module, "processor", partial(getattr, module, "processor"), module.set_processor)
        yield place, _RecordingProcessor(original, partial(recorder.add, short_name(path)))


def _unhook(*, module: nn.Module, kind: str, recorder: _Recorder) -> None:
    """Remove a recorder's hook from a module, whether or not it has one, and let it record nothing more."""
    recorder.stopped = True
    hooks, with_arguments = getattr(module, f"_{kind}s"), getattr(module, f"_{kind}s_with_kwargs")
    for key, function in list(hooks.items()):
        if getattr(function, "__self__", None) is recorder:
            with_arguments.pop(key, None)
            hooks.pop(key, None)


class _Recorder:
    """What the hooks and processors of `record_attention` share: it sorts what they see into maps."""

    def __init__(self, pipe: Pipeline, maps: AttentionMaps, guided: bool | None) -> None:
        self._pipe, self.maps, self._guided = pipe, maps, guided
        self.stopped = True  # a recorder that was left before one that was entered later is still called by it
        self._encoded: list[tuple[Tensor, Tensor]] = []  # token ids (tokens,) and their text embedding
        self._empty: Tensor | None = None  # embedding of the empty prompt (tokens, width)
        self._run: _Run | None = None  # where maps go now; None while an unconditional batch is drawn
        self._keep = slice(None)

    def after_text(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Remember which token ids gave which embedding, to name the tokens of a picture."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None:
            self._encoded += [(row, embedding.detach()) for row, embedding in zip(ids, output[0], strict=True)]

    def before_step(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        call = inspect.signature(unet.forward).bind_partial(*args, **kwargs).arguments
        sample, text = call["sample"], call["encoder_hidden_states"]
        timestep = float(torch.as_tensor(call["timestep"]).max())
        guided, half = self._guided, len(sample) // 2
        if guided is None:
            scale = getattr(self._pipe, "_guidance_scale", None)
            guided = len(sample) % 2 == 0 and (scale is None or scale > 1) and torch.equal(sample[:half], sample[half:])
        self._keep = slice(half, None) if guided else slice(None)
        if self._empty is None:
            self._empty = encode_prompts(self._pipe, "")[0]
        if all(torch.equal(row, self._empty.to(row)) for row in text):
            self._run = None  # the unconditional half, drawn as its own batch (as in `ddim_sample`)
            return
        runs = self.maps._runs
        same = (run for run in reversed(runs) if run.text is text and timestep <= run.timesteps[-1])
        self._run = next(same, None)
        if self._run is None:
            prompts = [self._prompt(row) for row in text[self._keep]]
            self._run = _Run(text, prompts, (sample.shape[-2], sample.shape[-1]), [], {})
            runs.append(self._run)
        self._run.timesteps.append(timestep)

    def _prompt(self, embedding: Tensor) -> list[str] | None:
        for ids, known in self._encoded:
            if known.shape == embedding.shape and torch.equal(known.to(embedding), embedding):
                return self.maps._tokenizer.convert_ids_to_tokens(ids.tolist())
        return None

    def add(self, label: str, probabilities: Tensor) -> None:
        maps, run = self.maps, self._run
        if run is None or self.stopped:
            return
        kept = probabilities[self._keep]
        height, width = _grid(run.grid, kept.shape[2])
        kept = kept.transpose(-1, -2).unflatten(-1, (height, width))  # (pictures, heads, tokens, height, width)
        kept = (kept if maps.keep_heads else kept.mean(1)).to("cpu", maps._dtype).contiguous()
        maps.nbytes += kept.nbytes
        if maps.nbytes > maps._max_bytes:
            raise ConeslabError(
                f"the attention maps exceed max_bytes={maps._max_bytes:,}: draw fewer pictures or steps in the block, "
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
