"""Tokens of your own: learned vectors in a text encoder, put there temporarily, and how they are learned.

A token is either a word that the tokenizer has ("sks"), whose row is replaced, or a new one ("<cat*>"), which is added.
The pipeline's embedding table and tokenizer are never modified: copies take their place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..blocks import Block, Place, attribute
from ..diffusion.checks import require_pipeline, uncompiled
from ..diffusion.encoding import encode_ids, warn_of_unread
from ..diffusion.pipelines import Pipeline, fingerprint
from ..errors import ArgumentError, ConeslabError, MismatchError
from .base import Edit
from .timed import TEXT, in_steps


def embedding_of(pipe: Pipeline) -> nn.Embedding:
    """The text encoder's table of token embeddings, (vocabulary, width)."""
    require_pipeline(pipe)
    return uncompiled(pipe.text_encoder).get_input_embeddings()


def vocabulary_fingerprint(pipe: Pipeline) -> str:
    """Hex SHA-256 of the embeddings of the tokenizer's own vocabulary: identifies the text encoder.

    Tokens that were added later, as `pipe.load_textual_inversion` does, do not count, nor does an edit that is applied:
    the words that a token was learned with mean the same as before.
    """
    return fingerprint({"token_embedding": _own_table(pipe)[: pipe.tokenizer.vocab_size]})


def _own_table(pipe: Pipeline) -> Tensor:
    """The table of token embeddings without the edits that are applied now."""
    table = embedding_of(pipe)
    return getattr(table, "_untouched", table).weight


def _require_vocabulary(expected: str, pipe: Pipeline, tokens: Sequence[str]) -> None:
    """Raise MismatchError unless `expected` is the text encoder's fingerprint, or, in old files, that of its table."""
    found = vocabulary_fingerprint(pipe)
    if expected not in (found, fingerprint({"token_embedding": _own_table(pipe)})):
        raise MismatchError(
            f"{', '.join(tokens)} was learned with text encoder {expected[:8]}…, this one is {found[:8]}…: its own "
            f"{pipe.tokenizer.vocab_size:,} words have other vectors (tokens added to them do not count); load the "
            "model it was learned on, or learn it again"
        )


def with_tokens(tokenizer: Any, tokens: Iterable[str]) -> tuple[Any, list[int]]:
    """A tokenizer that knows `tokens` as one token each, and their ids; the one given is not changed.

    A new token is recognised only as a word of its own, so that texts without it are tokenised as before: "rob" leaves
    "robot" alone. Raises ConeslabError for an empty, repeated or special token, one with a space in it, one that the
    tokenizer has as a piece of longer words, which share its vector, or two that are one to it, such as "SKS" and
    "sks".
    """
    tokens = checks.texts("tokens", tokens, blank=True)
    if len(set(tokens)) != len(tokens) or not all(token.split() == [token] for token in tokens):
        raise ArgumentError(f"the tokens are {tokens}: give words without spaces, each once")
    special = set(tokenizer.all_special_tokens) & set(tokens)
    if special:
        raise ConeslabError(f"{', '.join(sorted(special))}: a special token of the tokenizer cannot be learned")
    ids = tokenizer(list(tokens), add_special_tokens=False).input_ids
    new = [token for token, own in zip(tokens, ids, strict=True) if len(own) != 1]
    if new:
        pieces = [token for token in new if token.lower() in tokenizer.get_vocab()]
        if pieces:
            raise ConeslabError(
                f"the tokenizer has {', '.join(pieces)} as a piece of longer words, which would change with it: choose "
                f"another token, for example <{pieces[0]}>"
            )
        from transformers import AddedToken  # seconds to import, unless a model is loaded

        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens([AddedToken(token, single_word=True, normalized=True) for token in new])
        ids = tokenizer(list(tokens), add_special_tokens=False).input_ids
        broken = [token for token, own in zip(tokens, ids, strict=True) if len(own) != 1]
        if broken:
            raise ConeslabError(f"the tokenizer cannot take {', '.join(broken)} as a token: choose a plain word")
    written: dict[int, list[str]] = {}
    for token, (number,) in zip(tokens, ids, strict=True):
        written.setdefault(number, []).append(token)
    if same := [group for group in written.values() if len(group) > 1]:
        raise ArgumentError(
            f"{' and '.join(same[0])} are one token to this tokenizer, which has one vector: give one of them, or "
            "choose words that differ in more than capitals"
        )
    return tokenizer, [own[0] for own in ids]


def start_vector(pipe: Pipeline, word: str) -> Tensor:
    """The embedding (width,) of a word: the mean over its tokens, or over all tokens for an empty word."""
    table = embedding_of(pipe).weight.detach().float()
    checks.text("word", word, blank=True)
    ids = pipe.tokenizer(word, add_special_tokens=False).input_ids if word else []
    return table[ids].mean(0) if ids else table.mean(0)


@dataclass(frozen=True, eq=False, repr=False)
class TokenEdit(Edit):
    """Learned vectors for one or more tokens; an edit.

    tokens: as they are written in prompts; vectors: (tokens, width) float32; fingerprint: of the text encoder they
    were learned with (`vocabulary_fingerprint`); initial: the word that each new token starts from, whose vector it has
    at dose 0.
    Raises ConeslabError unless there is a finite vector for every token.
    """

    tokens: tuple[str, ...]
    vectors: Tensor
    fingerprint: str
    initial: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens = tuple(checks.word("token", token) for token in checks.texts("tokens", self.tokens))
        initial = tuple(checks.texts("initial", self.initial, least=0, blank=True)) or ("",) * len(tokens)
        vectors = checks.of_kind("vectors", self.vectors, Tensor).detach().to("cpu", torch.float32).clone()
        if vectors.ndim != 2 or len(vectors) != len(tokens) or not vectors.isfinite().all():
            raise ConeslabError(
                f"got vectors of shape {tuple(vectors.shape)} for {len(tokens)} tokens: give a finite one for each"
            )
        if len(initial) != len(tokens):
            raise ArgumentError(
                f"got {len(initial)} initial words for {len(tokens)} tokens: give one for each, or none"
            )
        checks.text("fingerprint", self.fingerprint)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "initial", initial)
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes

    def __repr__(self) -> str:
        return f"TokenEdit({', '.join(self.tokens)}: {self.vectors.shape[1]} numbers each)"

    @property
    def acts_on(self) -> frozenset[str]:
        return frozenset((TEXT,))

    @in_steps
    def applied(
        self, pipe: Pipeline, dose: float = 1.0, *, check_model: bool = True
    ) -> AbstractContextManager[Pipeline]:
        """Give the tokens their learned vectors inside a `with` block; tokenizer and table are restored afterwards.

        dose: 0 is the vector a token started from, 1 the learned one.
        Raises MismatchError, with the pipeline untouched, if text encoder or width differ.
        """
        return Block(lambda: self._changes(pipe, dose, check_model), pipe=pipe)

    def _changes(self, pipe: Pipeline, dose: float, check_model: bool) -> list[tuple[Place, Any]]:
        """The embedding table with the learned vectors, and the tokenizer that knows their tokens."""
        table = embedding_of(pipe)
        if table.weight.shape[1] != self.vectors.shape[1]:
            raise MismatchError(
                f"the vectors of {', '.join(self.tokens)} have {self.vectors.shape[1]} numbers, this text encoder's "
                f"have {table.weight.shape[1]}: load the model they were learned on"
            )
        if check_model:
            _require_vocabulary(self.fingerprint, pipe, self.tokens)
        tokenizer, ids = with_tokens(pipe.tokenizer, self.tokens)
        learned: dict[int, TokenEdit] = getattr(table, "_learned", {})  # by the edits that are on, with a dose
        pairs = zip(self.tokens, ids, strict=True)
        if dose and (again := [token for token, number in pairs if learned.get(number, self) != self]):
            checks.warn(
                f"{', '.join(again)} has the vector of another edit already, which does not count while this one is "
                "applied: learn one of them with another token to have both"
            )
        before = pipe.tokenizer(list(self.tokens), add_special_tokens=False).input_ids
        old_rows, width = table.weight.shape
        new_rows = max(0, max(ids) + 1 - old_rows)
        weight = torch.cat([table.weight.detach(), table.weight.new_zeros(new_rows, width)])
        for token, known, vector, word in zip(ids, before, self.vectors.to(weight), self.initial, strict=True):
            # a table may have spare rows, so a new token's row can be there and mean nothing
            start = weight[token] if known == [token] and token < old_rows else start_vector(pipe, word).to(weight)
            weight[token] = (1 - dose) * start + dose * vector
        edited = nn.Embedding.from_pretrained(weight, freeze=True)
        object.__setattr__(edited, "_untouched", getattr(table, "_untouched", table))  # no module of its own
        object.__setattr__(edited, "_learned", learned | (dict.fromkeys(ids, self) if dose else {}))
        encoder = uncompiled(pipe.text_encoder)
        embeddings = Place(encoder, "input embeddings", encoder.get_input_embeddings, encoder.set_input_embeddings)
        places = [(embeddings, edited), (attribute(pipe, "tokenizer"), tokenizer)]
        # by which a pipeline that is saved meanwhile can be loaded again
        return [*places, *([(attribute(encoder.config, "vocab_size"), len(weight))] if new_rows else [])]

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        description = {"tokens": list(self.tokens), "fingerprint": self.fingerprint, "initial": list(self.initial)}
        history = {key: list(values) for key, values in self.history.items()}
        return {"vectors": self.vectors}, {**description, "settings": dict(self.settings), "history": history}

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], description: dict[str, Any]) -> TokenEdit:
        return cls(description.pop("tokens"), tensors["vectors"], **description)


class LearnedText:
    """Text embeddings of fixed captions, as a function of the vectors of a few tokens.

    Only the vectors get gradients; every other row of the table is frozen.
    Raises ConeslabError if a token occurs in none of the captions, as far as the text encoder reads them: it would
    never be learned.
    """

    def __init__(self, pipe: Pipeline, captions: Iterable[str], tokens: Iterable[str]) -> None:
        require_pipeline(pipe)
        captions, tokens = checks.texts("captions", captions), checks.texts("tokens", tokens, blank=True)
        tokenizer, self.ids = with_tokens(pipe.tokenizer, tokens)
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = tokenizer(captions, max_length=tokenizer.model_max_length, **options).input_ids
        self._which = torch.full(ids.shape, -1)
        for number, token in enumerate(self.ids):
            self._which[ids == token] = number
        missing = [token for number, token in enumerate(tokens) if not (self._which == number).any()]
        if missing:
            raise ConeslabError(
                f"{', '.join(missing)} occurs in none of the captions, of which the text encoder reads "
                f"{tokenizer.model_max_length} tokens: it cannot be learned from them"
            )
        warn_of_unread(pipe, captions, tokenizer)
        self._pipe = pipe
        table = embedding_of(pipe)
        self._which = self._which.to(table.weight.device)
        self._input = ids.to(table.weight.device).clamp(max=len(table.weight) - 1)  # new ids: any row, replaced below

    def __call__(self, vectors: Tensor) -> Tensor:
        """vectors (tokens, width) -> (captions, positions, width); float32 from a text encoder in float16.

        There its backward pass works on a gradient scaled to 1, which would otherwise underflow.
        """
        half = embedding_of(self._pipe).weight.dtype == torch.float16
        scale = _GradientScale()
        if half:
            vectors = scale.undone(vectors)

        def learned(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            own = vectors.to(output)[self._which.clamp(min=0)]  # learned elsewhere, perhaps: on the CPU
            return torch.where((self._which >= 0)[..., None], own, output.detach())

        handle = embedding_of(self._pipe).register_forward_hook(learned)
        try:
            text = encode_ids(self._pipe, self._input)
        finally:
            handle.remove()
        return scale.done(text.float()) if half else text


class _GradientScale:
    """A gradient that is scaled to a largest entry of 1 where it comes in, and back where it goes out."""

    def __init__(self) -> None:
        self.largest = torch.ones(())

    def done(self, values: Tensor) -> Tensor:
        return self._hooked(values, self._do)

    def undone(self, values: Tensor) -> Tensor:
        return self._hooked(values, lambda gradient: gradient * self.largest.to(gradient))

    def _do(self, gradient: Tensor) -> Tensor:
        largest = gradient.abs().max()
        self.largest = torch.where(largest > 0, largest, 1.0)
        return gradient / self.largest

    @staticmethod
    def _hooked(values: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
        values = values.view_as(values)
        if values.requires_grad:
            values.register_hook(hook)
        return values
