"""A concept as a weighted sum of words, which is an edit: what Conceptor finds (Chefer et al., arXiv 2306.00966)."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import checks
from ...diffusion.checks import require_pipeline
from ...diffusion.pipelines import Pipeline
from ...edits.base import Edit
from ...edits.timed import TEXT, in_steps
from ...edits.tokens import TokenEdit, embedding_of
from ...errors import ConeslabError
from ...neurons.encoding import numbers

TEMPLATE = "a photo of a {}"


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition(Edit):
    """A concept as a sum of words; as an edit it gives the pseudo-token `token` their weighted sum.

    words, coefficients: (M,) from the largest to the smallest, not negative; explain: N, how many of them the
    pseudo-token is made of; norm: its length; fingerprint: of the table of token embeddings; validation: step ->
    similarity of what w*_N draws to the concept's pictures; best_step: the step that these coefficients are from.
    """

    concept: str
    words: tuple[str, ...]
    coefficients: np.ndarray
    explain: int
    norm: float
    fingerprint: str
    token: str = "<concept>"
    template: str = TEMPLATE
    validation: Mapping[int, float] = field(default_factory=dict)
    best_step: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(checks.texts("words", self.words, least=0)))
        object.__setattr__(self, "explain", checks.count("explain", self.explain))
        object.__setattr__(self, "norm", checks.number("norm", self.norm, "[0, inf)"))
        checks.template("template", self.template)
        for name in ("concept", "fingerprint", "token"):
            checks.text(name, getattr(self, name))
        checks.word("token", self.token)
        values = numbers("coefficients", self.coefficients)
        if values.shape != (len(self.words),) or not len(self.words) or not ((values >= 0) & np.isfinite(values)).all():
            raise ConeslabError(
                f"got coefficients of shape {values.shape} for {len(self.words)} words: give each a number, 0 or more"
            )
        ((word, times),) = Counter(self.words).most_common(1)
        if times > 1:
            raise ConeslabError(f"{word!r} is among the words twice: give each of them once, with one coefficient")
        if not values.any():
            raise ConeslabError("all coefficients are 0: leave at least one word in")
        order = np.argsort(-values, kind="stable")
        values = values[order]
        values.flags.writeable = False
        object.__setattr__(self, "words", tuple(self.words[i] for i in order))
        object.__setattr__(self, "coefficients", values)
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    # --- what it says ---

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The words with the largest coefficients, as shares of the sum over the `explain` words in use.

        At most those in use: the pseudo-token is made of no other word, so no other has a share.
        """
        n, total = checks.count("n", n, least=0), float(self.coefficients[: self.explain].sum())
        used = self.words[: min(n, self.explain)]
        return [(word, float(value) / total) for word, value in zip(used, self.coefficients, strict=False)]

    def share(self, words: str | Sequence[str]) -> float:
        """Share of one word or several in the sum over the words in use."""
        wanted = set(checks.texts("words", words, least=0))
        return sum(value for word, value in self.top(self.explain) if word in wanted)

    @property
    def prompt(self) -> str:
        """The prompt that shows the pseudo-token, e.g. "a photo of a <concept>"."""
        return self.template.format(self.token)

    def __repr__(self) -> str:
        words = ", ".join(f"{word} {share:.2f}" for word, share in self.top(6))
        return f"Decomposition({self.concept!r}: {words}, …)"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{html.escape(word)}</td><td>{share:.1%}</td></tr>" for word, share in self.top(10))
        return f"<p><b>{html.escape(self.concept)}</b></p><table><tr><th>word</th><th>share</th></tr>{rows}</table>"

    # --- changing it ---

    def scaled(self, word: str, factor: float) -> Decomposition:
        """The decomposition with one coefficient multiplied. Raises ConeslabError for a word it lacks."""
        self._require([word])
        checks.number("factor", factor, "[0, inf)")
        return self._changed({word: factor})

    def without(self, *words: str) -> Decomposition:
        """The decomposition without these words."""
        self._require(words)
        return self._changed(dict.fromkeys(words, 0.0))

    def only(self, *words: str) -> Decomposition:
        """The decomposition with only these words."""
        self._require(words)
        return self._changed({word: 0.0 for word in self.words if word not in words})

    def _require(self, words: Sequence[str]) -> None:
        unknown = [word for word in checks.texts("words", words, least=0) if word not in self.words]
        if unknown:
            raise ConeslabError(f"{', '.join(unknown)}: not among the {len(self.words)} words of {self.concept!r}")

    def _changed(self, factors: Mapping[str, float]) -> Decomposition:
        """Multiply coefficients; no other word moves up into the place of one that is left out."""
        values = [
            float(value) * factors.get(word, 1.0) if number < self.explain else 0.0
            for number, (word, value) in enumerate(zip(self.words, self.coefficients, strict=True))
        ]
        return replace(self, coefficients=np.array(values, np.float32))

    # --- as an edit ---

    def vector(self, pipe: Pipeline) -> Tensor:
        """The pseudo-token's vector w*_N (width,): the words in use, weighted, rescaled to `norm`."""
        require_pipeline(pipe)
        ids = pipe.tokenizer(list(self.words[: self.explain]), add_special_tokens=False).input_ids
        rows = embedding_of(pipe).weight.detach().float()[[own[0] for own in ids]]
        return rescaled(torch.tensor(self.coefficients[: self.explain]).to(rows) @ rows, self.norm)

    @property
    def nbytes(self) -> int:
        """Bytes of the coefficients in use."""
        return 4 * int((self.coefficients[: self.explain] > 0).sum())

    @property
    def acts_on(self) -> frozenset[str]:
        return frozenset((TEXT,))

    @in_steps
    def applied(
        self, pipe: Pipeline, dose: float = 1.0, *, check_model: bool = True
    ) -> AbstractContextManager[Pipeline]:
        """Teach the pipeline the pseudo-token inside a `with` block: see `TokenEdit.applied`."""
        return self.token_edit(pipe).applied(pipe, dose, check_model=check_model)

    def token_edit(self, pipe: Pipeline) -> TokenEdit:
        return TokenEdit((self.token,), self.vector(pipe)[None], self.fingerprint)

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        record = {
            "concept": self.concept,
            "words": list(self.words),
            "explain": self.explain,
            "norm": self.norm,
            "fingerprint": self.fingerprint,
            "token": self.token,
            "template": self.template,
            "validation": {str(step): value for step, value in self.validation.items()},
            "best_step": self.best_step,
            "settings": dict(self.settings),
            "history": {key: list(values) for key, values in self.history.items()},
        }
        return {"coefficients": torch.tensor(self.coefficients)}, record

    @classmethod
    def _unpack(cls, tensors: dict[str, Tensor], description: dict[str, Any]) -> Decomposition:
        validation = {int(step): value for step, value in description.pop("validation").items()}
        words = tuple(description.pop("words"))
        return cls(words=words, coefficients=tensors["coefficients"].numpy(), validation=validation, **description)


def rescaled(vector: Tensor, norm: float) -> Tensor:
    """A vector of this length in the same direction."""
    return vector * (norm / vector.norm().clamp_min(1e-12))
