"""The words of a text encoder: which they are, their vectors, and a judge's features of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ... import checks
from ...diffusion.checks import require_pipeline
from ...diffusion.pipelines import Pipeline, fingerprint
from ...edits.tokens import embedding_of
from ...errors import ConeslabError, FileFormatError
from ...files import read_tensors, require_writable, sealed, write_whole
from ...measure.judge import Judge, require_judge
from ...settings import ByValue

FORMAT = "coneslab.vocabulary/1"
TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}", "the {}")


@dataclass(frozen=True, eq=False, repr=False)
class Vocabulary(ByValue):
    """Words that are one token each.

    ids: (n,) in the tokenizer; vectors: (n, width), their rows in the table of token embeddings; features: (n, d),
    a judge's mean embedding of the word in templates, of length 1.
    """

    words: tuple[str, ...]
    ids: np.ndarray
    vectors: Tensor
    features: Tensor

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self):,} words: {', '.join(self.words[:4])}, …)"

    def rows(self, words: Sequence[str]) -> list[int]:
        """Rows of words in this vocabulary. Raises ConeslabError for one that it lacks."""
        words, place = checks.texts("words", words, least=0), {word: number for number, word in enumerate(self.words)}
        unknown = [word for word in words if word not in place]
        if unknown:
            raise ConeslabError(f"{', '.join(unknown)}: not in this vocabulary of {len(self):,} words")
        return [place[word] for word in words]

    def part(self, rows: Sequence[int]) -> Vocabulary:
        """The words in these rows, in this order."""
        rows = [checks.count("row", row, least=0, most=len(self) - 1) for row in checks.items("rows", rows)]
        chosen = torch.tensor(rows, dtype=torch.long)
        words = tuple(self.words[row] for row in rows)
        return replace(
            self, words=words, ids=self.ids[rows], vectors=self.vectors[chosen], features=self.features[chosen]
        )


def whole_words(tokenizer: Any) -> dict[str, int]:
    """Every token that is a whole word of two letters or more, and its id, in the order of the ids."""
    found = {}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        word = token.removesuffix("</w>")
        whole = token.endswith("</w>") or token in getattr(tokenizer, "added_tokens_encoder", {})
        if whole and len(word) > 1 and word.isalnum() and word not in tokenizer.all_special_tokens:
            found[word] = number
    return found


def encode_vocabulary(
    pipe: Pipeline,
    judge: Judge,
    *,
    words: str | Iterable[str] | None = None,
    templates: str | Iterable[str] = TEMPLATES,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Vocabulary:
    """All words of the pipeline's tokenizer with their vectors, and with a judge's features (Conceptor, Sec. 3).

    words: only these. templates: with {} for the word; features are averaged over them. cache: a folder; features are
    stored there by the judge's weights, words and templates, and read the next time.
    Raises ConeslabError if a word is not one token, or a template lacks {}; WriteError if the folder cannot be written.
    """
    require_pipeline(pipe)
    require_judge(judge)
    templates, known = checks.templates("templates", templates), whole_words(pipe.tokenizer)
    chosen = list(known) if words is None else checks.texts("words", words, least=0)
    unknown = [word for word in chosen if word not in known]
    if unknown or not chosen:
        raise ConeslabError(f"not one token each: {', '.join(unknown) or 'no words at all'}; give whole words")
    ids = np.array([known[word] for word in chosen])
    vectors = embedding_of(pipe).weight.detach()[torch.tensor(ids)].float().cpu()
    file = None
    if cache is not None:
        folder = require_writable(cache, folder=True)
        model = fingerprint(dict(judge.model.named_parameters()))
        key = hashlib.sha256(repr((model, chosen, tuple(templates))).encode()).hexdigest()[:24]
        file = folder / f"vocabulary-{key}.safetensors"
    features = _read(file)
    if features is None:
        total = torch.zeros(len(chosen), judge.width)
        for template in tqdm(templates, desc="vocabulary", disable=not progress):
            total += judge.text_features([template.format(word) for word in chosen])
        features = total / total.norm(dim=1, keepdim=True)
        if file is not None:
            metadata = {"format": FORMAT, "key": file.stem}
            write_whole(file, save({"features": features}, sealed({"features": features}, metadata)))
    return Vocabulary(tuple(chosen), ids, vectors, features)


def _read(file: Path | None) -> Tensor | None:
    """Features stored before, or None; a damaged cache counts as none."""
    if file is None or not file.is_file():
        return None
    try:
        tensors, metadata = read_tensors(file, FORMAT)
    except FileFormatError:
        return None
    return tensors.get("features") if metadata.get("key") == file.stem else None
