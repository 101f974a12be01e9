"""Masks that act at some words of a prompt only (ours; Cones masks the weights for every word alike).

Cross-attention computes keys and values token by token, so a mask can act at the tokens of a subject alone: there the
masked weights project the text, everywhere else the model's own. A prompt without the subject's token gives the same
picture to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import Block, Made
from ..diffusion.checks import parts_of, require_own_projections, require_pipeline
from ..diffusion.encoding import tokenize
from ..diffusion.kvspace import cross_attentions, unet_of
from ..diffusion.pipelines import Pipeline
from ..diffusion.precision import without_compiling
from ..diffusion.steps import KnownTexts
from ..errors import ConeslabError

#: The words at which a mask acts: a rare token, and the class word after it; empty for all words.
Scope: TypeAlias = tuple[str, ...]


def positions(ids: Sequence[int], words: Sequence[Sequence[int]]) -> list[int]:
    """Where a subject stands among token ids: its token, wherever it occurs, and the class word that follows.

    words: the ids of the token, and those of the class word if there is one; each word may be several tokens. The class
    word need not follow at once ("a sks red cat"), but it is only the first after each token.

    >>> positions([0, 5, 7, 3, 1, 5, 3], [[7], [3]])
    [2, 3]
    """
    ids, (token, *others) = list(ids), [list(word) for word in words]

    def occurrences(word: list[int], start: int, end: int) -> list[int]:
        return [at for at in range(start, end - len(word) + 1) if ids[at : at + len(word)] == word]

    found: set[int] = set()
    starts = occurrences(token, 0, len(ids))
    for start, end in pairwise([*starts, len(ids)]):
        found |= {*range(start, start + len(token))}
        for word in others:
            for first in occurrences(word, start + len(token), end)[:1]:
                found |= {*range(first, first + len(word))}
    return sorted(found)


def word_ids(tokenizer: Any, scope: Scope) -> list[list[int]]:
    """The token ids of each word of a scope. Raises ConeslabError unless each has some."""
    ids = [list(tokenizer(word, add_special_tokens=False).input_ids) for word in scope]
    if not ids or not all(ids):
        raise ConeslabError(f"the scope is {scope}: give the rare token, and its class word if it has one")
    return ids


def scope_of(pipe: Pipeline, subject: Any) -> Scope:
    """A subject's rare token and class word. Raises ConeslabError without a token, or a prompt that names it."""
    require_pipeline(pipe)
    token, class_word = getattr(subject, "token", ""), getattr(subject, "class_word", "")
    scope = (token, class_word) if class_word else (token,)
    if not token or not where_scope(pipe, [subject.prompt], scope).any():
        raise ConeslabError(
            f"the subject {subject.name!r} has the token {token!r} and the prompt {subject.prompt!r}: a mask at its "
            "words needs a token that its prompt names"
        )
    return scope


def where_scope(pipe: Pipeline, prompts: Sequence[str], scope: Scope) -> Tensor:
    """Which tokens of prompts are words of a scope, (prompts, tokens) bool."""
    ids, words = tokenize(pipe, prompts), word_ids(pipe.tokenizer, scope)
    where = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    for row, own in enumerate(ids.tolist()):
        where[row, positions(own, words)] = True
    return where


@dataclass(frozen=True, eq=False)
class ScopedChange:
    """What projects the words of a scope: weight name -> function of a float32 copy of the weights as they then are."""

    scope: Scope
    weights: Mapping[str, Callable[[Tensor], Tensor]]


class at_words(Block):
    """Let masks act at the words of their scopes, for the length of a block.

    Masks on the same words multiply, as nested masks on all words do. Drawing, losses, recorded attention and the fast
    copy that pictures are drawn with all see them. (A compiled pipeline computes uncompiled in the block.) Prompts must
    be given as text inside the block.
    Raises ConeslabError for a U-Net whose cross-attention does not see the text encoder's output as it is, or whose
    projections are fused.
    """

    def __init__(self, pipe: Pipeline, masks: Callable[[], Iterable[ScopedChange]]) -> None:
        require_pipeline(pipe)
        super().__init__(pipe=pipe)
        self._masks = masks

    def open(self, made: Made) -> Any:
        pipe, masks = self._pipe, list(self._masks())
        unet = unet_of(pipe)
        require_own_projections(unet)
        made.enter(without_compiling(pipe))  # compiled code calls no hooks that come now
        attentions = cross_attentions(unet)
        if unet.config.get("encoder_hid_dim") or any(module.norm_cross for module in attentions.values()):
            raise ConeslabError("this U-Net changes the text before it attends to it: masks at words need it unchanged")
        acting = _ACTING.get(unet)
        if acting is None:
            acting = _ACTING[unet] = _Acting(pipe)
        made.undo(partial(_remove, pipe, unet, acting, tuple(masks)))
        if not acting.masks:
            pipe.text_encoder.register_forward_hook(acting.texts.after_text, with_kwargs=True)
            for path, module in attentions.items():
                for kind in ("to_k", "to_v"):
                    getattr(module, kind).register_forward_hook(_Projection(acting, f"{path}.{kind}.weight"))
        acting.masks = (*acting.masks, *masks)
        return self._value


def _remove(pipe: Pipeline, unet: nn.Module, acting: _Acting, masks: tuple[ScopedChange, ...]) -> None:
    """Let masks act no longer; remove the hooks with the last of them."""
    acting.masks = tuple(mask for mask in acting.masks if not any(mask is one for one in masks))
    acting.forget(masks)
    if acting.masks:
        return
    for hooks, extra in _hooks_of(pipe.text_encoder, unet):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__self__", None) is acting.texts or getattr(hook, "acting", None) is acting:
                hooks.pop(key, None)
                extra.pop(key, None)
    _ACTING.pop(unet, None)


def _hooks_of(*roots: nn.Module) -> list[tuple[dict, dict]]:
    modules = [module for root in roots for module in parts_of(root)]
    return [(module._forward_hooks, module._forward_hooks_with_kwargs) for module in modules]


_ACTING: WeakKeyDictionary[nn.Module, _Acting] = WeakKeyDictionary()  # by U-Net


class _Acting:
    """The masks that act on one U-Net now, and what is known of the texts that it is given."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe
        self.masks: tuple[ScopedChange, ...] = ()
        self.texts = KnownTexts()
        self._last: tuple[Tensor, tuple[ScopedChange, ...], dict[tuple[int, ...], Tensor]] | None = None
        self._made: WeakKeyDictionary[nn.Module, dict[tuple[ScopedChange, ...], tuple[_State, Tensor]]] = (
            WeakKeyDictionary()
        )

    def groups(self, text: Tensor) -> dict[tuple[int, ...], Tensor]:
        """Which masks act where in a batch of texts (n, tokens, width): numbers of masks -> bool (n, tokens)."""
        if self._last is not None and self._last[0] is text and self._last[1] is self.masks:
            return self._last[2]
        acting: dict[tuple[int, int], tuple[int, ...]] = {}
        words = [word_ids(self._pipe.tokenizer, mask.scope) for mask in self.masks]
        for row, embedding in enumerate(text.detach()):
            ids = self.texts.ids(embedding)
            if ids is None:
                raise ConeslabError(
                    "a mask acts at some words only, and the words of this text are not known: give prompts as text, "
                    "inside the block, and no embeddings that were computed before or changed since"
                )
            for number, own in enumerate(words):
                for at in positions(ids, own):
                    acting[row, at] = (*acting.get((row, at), ()), number)
        groups: dict[tuple[int, ...], Tensor] = {}
        for (row, at), numbers in acting.items():
            if numbers not in groups:
                groups[numbers] = torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)
            groups[numbers][row, at] = True
        self._last = text, self.masks, groups
        return groups

    def changed(self, own: Tensor, name: str, numbers: tuple[int, ...]) -> Tensor | None:
        """A layer's weights as some of the masks change them, with a gradient in `own`; None if none of them does."""
        changes = [self.masks[number].weights[name] for number in numbers if name in self.masks[number].weights]
        if not changes:
            return None
        exact = own.to(torch.promote_types(own.dtype, torch.float32), copy=True)
        for change in changes:
            exact = change(exact)
        return exact.to(own.dtype)

    def weight(self, module: nn.Linear, name: str, numbers: tuple[int, ...]) -> Tensor | None:
        """A layer's own weights as `changed`, made once while they stay as they are."""
        masks, own = tuple(self.masks[number] for number in numbers), module.weight
        made = self._made.setdefault(module, {})
        if masks not in made or not made[masks][0].holds(own):
            weight = self.changed(own.detach(), name, numbers)
            if weight is None:
                return None
            made[masks] = _State.of(own), weight
        return made[masks][1]

    def forget(self, masks: tuple[ScopedChange, ...]) -> None:
        """Drop the weights made with masks that act no longer."""
        for made in self._made.values():
            for key in [key for key in made if any(one in masks for one in key)]:
                del made[key]


@dataclass(frozen=True, eq=False)
class _State:
    """What tells whether weights are still those that something was made of: another's may lie at the same address."""

    weight: ref[Tensor]
    address: int
    version: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> _State:
        return cls(ref(weight), weight.data_ptr(), weight._version, weight.dtype)

    def holds(self, weight: Tensor) -> bool:
        now = weight.data_ptr(), weight._version, weight.dtype
        return self.weight() is weight and now == (self.address, self.version, self.dtype)


class _Projection:
    """Forward hook of a key or value projection: where masks act, their weights project the text."""

    copied_with_the_unet = True  # `precision.frozen_copy` takes it along

    def __init__(self, acting: _Acting, name: str) -> None:
        self.acting, self.name = acting, name

    def __call__(self, module: nn.Linear, args: tuple, output: Tensor) -> Tensor | None:
        (text,) = args
        changed = None
        for numbers, where in self.acting.groups(text).items():
            weight = self.acting.weight(module, self.name, numbers)
            if weight is not None:
                changed = output.clone() if changed is None else changed
                changed[where] = F.linear(text[where], weight, module.bias)
        return changed

    def of_weights(
        self,
        text: Tensor,
        output: Tensor,
        weight: Tensor,
        project: Callable[[Tensor], Tensor],
        chosen: Tensor | None = None,
    ) -> Tensor:
        """The same for a projection by other weights, with gradients in them and in the text.

        output: what `project` makes of `weight`: (n, tokens, channels), of all the text (n, tokens, width), or
        (k, channels) of its `chosen` tokens.
        """
        for numbers, everywhere in self.acting.groups(text).items():
            changed = self.acting.changed(weight, self.name, numbers)
            if changed is not None:
                where = everywhere if chosen is None else everywhere[chosen]
                output = torch.where(where[..., None], project(changed), output)
        return output
