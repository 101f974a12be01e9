"""Record cross-attention while a pipeline draws: the probabilities that its attention never materialises."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..blocks import Block, Made, Place
from ..diffusion.checks import require_own_projections, require_pipeline, uncompiled
from ..diffusion.encoding import encode_prompts, require_read
from ..diffusion.kvspace import cross_attentions, short_name
from ..diffusion.pipelines import Pipeline, require_float
from ..diffusion.precision import without_compiling
from ..diffusion.steps import Clock
from ..errors import ConeslabError
from .attention import AttentionMaps, Run, attention_scores, with_words

_RECORDABLE = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "AttnProcessorNPU",
    "_RecordingProcessor",
)


class _RecordingProcessor:
    """Calls the processor it replaces, unchanged, and also lets a recorder see what it is called with."""

    def __init__(self, original: Any, see: Callable[[Any, Tensor, Tensor, Tensor | None], None]) -> None:
        self.original, self.see = original, see

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
            self.see(attn, hidden_states, encoder_hidden_states, attention_mask)
        if temb is not None:  # not every processor takes one
            kwargs["temb"] = temb
        return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


class record_attention(Block):
    """Record every cross-attention map while a pipeline draws, and put everything back afterwards.

    The pictures are bit for bit those of an unrecorded run: the maps are computed beside the attention. (A compiled
    pipeline computes uncompiled in the block.) With classifier-free guidance only the conditional half is kept.

    words: others than the prompt's, whose maps are recorded as well: how much each place would attend to such a word if
    it stood beside the prompt (its keys, from the word encoded alone, against the run's queries; see `with_words`).
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
        words: str | Iterable[str] = (),
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
        asked = tuple(dict.fromkeys(checks.texts("words", words, least=0)))
        require_read(pipe, *asked)
        maps = AttentionMaps(pipe.tokenizer, keep_heads=keep_heads, dtype=dtype, max_bytes=max_bytes, words=asked)
        self._recorder = _Recorder(pipe, maps, guided)
        super().__init__(partial(_processors, pipe, self._recorder), maps, pipe=pipe)

    def open(self, made: Made) -> AttentionMaps:
        recorder, pipe = self._recorder, self._pipe
        require_own_projections(uncompiled(pipe.unet))
        made.enter(without_compiling(pipe))
        recorder.stopped = False
        made.undo(recorder.stop)
        made.hook(pipe.unet, "forward_pre_hook", recorder.before_step)
        made.hook(pipe.text_encoder, "forward_hook", recorder.after_text)
        return super().open(made)


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
        yield place, _RecordingProcessor(original, partial(recorder.see, short_name(path)))


class _Recorder:
    """What the hooks and processors of `record_attention` share: it sorts what they see into maps."""

    def __init__(self, pipe: Pipeline, maps: AttentionMaps, guided: bool | None) -> None:
        self._pipe, self.maps = pipe, maps
        self.stopped = True  # a recorder that was left before one that was entered later is still called by it
        self._clock = Clock(pipe, guided)
        self._encoded: list[tuple[Tensor, Tensor, Any]] = []  # token ids (tokens,), their text embedding, the tokenizer
        self._words: dict[int, list[tuple[Tensor, slice]]] = {}  # run -> embedding of each word asked for, its tokens
        self._of_clock: dict[int, Run] = {}
        self._run: Run | None = None  # where maps go now; None while an unconditional batch is drawn

    def stop(self) -> None:
        self.stopped = True

    def after_text(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Remember which token ids gave which embedding, to name the tokens of a picture."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None:
            tokenizer = self._pipe.tokenizer  # an edit applied since may have put another in place
            self._encoded += [(*pair, tokenizer) for pair in zip(ids, output[0].detach(), strict=True)]

    def before_step(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        self._clock.before(unet, args, kwargs)
        now = self._clock.now
        assert now is not None
        if "text" not in now.halves:
            self._run = None  # the unconditional half, drawn as its own batch (as in `ddim_sample`)
            return
        self._run = self._of_clock.get(now.run)
        if self._run is None:
            call = inspect.signature(unet.forward).bind_partial(*args, **kwargs).arguments
            sample, text = call["sample"], call["encoder_hidden_states"]
            heard = [self._prompt(row) for row in text[now.rows("text", len(text))]]
            prompts, tokenizers = [pieces for pieces, _ in heard], [tokenizer for _, tokenizer in heard]
            words = self._words[now.run] = [self._encoded_word(word) for word in self.maps.words]
            asked, end = {}, text.shape[1]
            for word, (_, tokens) in zip(self.maps.words, words, strict=True):
                asked[word] = [*range(end, end := end + tokens.stop - tokens.start)]
            grid = sample.shape[-2], sample.shape[-1]
            self._run = Run(text.shape[1], prompts, tokenizers, asked, grid, [], {})
            self._of_clock[now.run] = self._run
            self.maps._runs.append(self._run)
        self._run.timesteps.append(now.timestep)

    def _prompt(self, embedding: Tensor) -> tuple[list[str] | None, Any]:
        """The tokens of a text, and the tokenizer they are of; None for both if it was not heard."""
        for ids, known, tokenizer in reversed(self._encoded):  # at dose 0, a new token is heard as the word it began as
            if known.shape == embedding.shape and torch.equal(known.to(embedding), embedding):
                return tokenizer.convert_ids_to_tokens(ids.tolist()), tokenizer
        return None, None

    @torch.no_grad()
    def _encoded_word(self, word: str) -> tuple[Tensor, slice]:
        """The embedding (1, tokens, width) of a word alone, and where its tokens are: after the start token."""
        return encode_prompts(self._pipe, word), slice(1, 1 + len(self._pipe.tokenizer.tokenize(word)))

    def see(self, label: str, attn: Any, hidden_states: Tensor, text: Tensor, attention_mask: Tensor | None) -> None:
        """Keep the probabilities of one attention, from what it is called with."""
        run, now = self._run, self._clock.now
        if run is None or now is None or self.stopped:
            return
        rows = now.rows("text", len(hidden_states))
        assert rows is not None
        scores = attention_scores(attn, hidden_states, text, attention_mask)[rows]
        self.maps._keep(run, label, with_words(scores, self._scores_of_words(now.run, attn, hidden_states[rows], text)))

    def _scores_of_words(self, run: int, attn: Any, hidden_states: Tensor, text: Tensor) -> Iterator[Tensor]:
        for embedding, tokens in self._words[run]:
            yield attention_scores(attn, hidden_states, embedding.to(text).expand(len(hidden_states), -1, -1))[
                ..., tokens
            ]
