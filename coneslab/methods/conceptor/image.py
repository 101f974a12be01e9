"""What one picture of a concept is made of: words are left out until the picture would change (Conceptor, Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ... import checks
from ...callback import Callback
from ...diffusion.checks import require_pipeline
from ...diffusion.encoding import require_read
from ...diffusion.pipelines import Pipeline
from ...diffusion.sampling import generate, require_steps
from ...edits.tokens import TokenEdit
from ...errors import ArgumentError, ConeslabError
from ...measure.judge import Judge, require_judge
from ...pictures import Picture, as_pictures
from .decomposition import Decomposition


@dataclass(frozen=True)
class ImageDecomposition:
    """The words that one picture needs, and how the others were removed.

    words: from the largest coefficient to the smallest; target: the picture to keep; picture: what the remaining words
    draw from the same noise; similarity: of the two; removed: (word, similarity at that point), in order; drawn: how
    many pictures that took, in `passes` batches.
    """

    words: tuple[str, ...]
    target: Image.Image
    picture: Image.Image
    similarity: float
    removed: tuple[tuple[str, float], ...]
    drawn: int
    passes: int

    def __repr__(self) -> str:
        facts = f"similarity {self.similarity:.3f}, {self.drawn} pictures drawn"
        return f"ImageDecomposition({', '.join(self.words)}: {facts})"


def decompose_image(
    pipe: Pipeline,
    decomposition: Decomposition,
    judge: Judge,
    *,
    seed: int = 0,
    threshold: float = 0.95,
    target: Literal["concept", "decomposition"] | Picture = "decomposition",
    prompt: str | None = None,
    max_words: int = 50,
    near_synonyms: Sequence[Sequence[str]] = (),
    sampler_steps: int = 25,
    guidance_scale: float = 3.0,
    batch_size: int = 25,
    progress: bool = True,
    callback: Callback | None = None,
) -> ImageDecomposition:
    """Leave out word after word while the picture from `seed` stays like the target (Conceptor, Sec. 3.3).

    target: what the pseudo-token draws from that seed, or what the concept's own prompt does ("concept", with `prompt`
    in place of the decomposition's name if given), or a picture. Words may go as long as the cosine of the judge's
    features stays at `threshold` or above. near_synonyms: groups of words that go together.
    Words go from the smallest coefficient up, one, two, four, eight of them, ..., as many as possible: the trials of
    such a pass are drawn in one batch. A word that cannot go is skipped. At the end each remaining word is tried alone,
    and then all that could go alone, half of them, a quarter, down to the one that matters least, until none can go.
    callback: see `coneslab.callback`, after each pass; a further key: "words", those left.
    Raises ConeslabError for a threshold that is not a cosine, a count below 1, or a prompt that nothing is drawn from.
    """
    require_pipeline(pipe)
    require_judge(judge)
    checks.of_kind("decomposition", decomposition, Decomposition)
    threshold, seed = checks.number("threshold", threshold, "[-1, 1]", kind="cosine"), checks.seed("seed", seed)
    max_words, batch_size = checks.count("max_words", max_words), checks.count("batch_size", batch_size)
    sampler_steps = require_steps(pipe, sampler_steps)
    near_synonyms = [
        checks.texts("a group of near_synonyms", _as_group(own))
        for own in checks.items("near_synonyms", near_synonyms, least=0)
    ]
    checks.function("callback", callback)
    if isinstance(target, str) and target not in ("concept", "decomposition"):
        raise ArgumentError(f"target is {checks.shown(target)}: give 'concept', 'decomposition' or a picture")
    if prompt is not None:
        require_read(pipe, checks.text("prompt", prompt))
        if not isinstance(target, str) or target != "concept":
            raise ConeslabError(f"prompt is {prompt!r}, which only the target 'concept' is drawn from: leave it out")
    count = {"drawn": 0, "passes": 0}
    groups = {word: {word} for word in decomposition.words}
    for group in near_synonyms:
        for word in group:
            groups.get(word, set()).update(group)

    def draw(vectors: Sequence[Tensor]) -> list[Image.Image]:
        tokens = tuple(f"<part{number}>" for number in range(len(vectors)))
        prompts = [decomposition.template.format(token) for token in tokens]
        count["drawn"] += len(vectors)
        options: dict[str, Any] = {"sampler_steps": sampler_steps, "guidance_scale": guidance_scale}
        with TokenEdit(tokens, torch.stack(list(vectors)), decomposition.fingerprint).applied(pipe):
            return generate(pipe, prompts, seed=[seed] * len(prompts), batch_size=batch_size, **options)

    def vector(words: Sequence[str]) -> Tensor:
        return decomposition.only(*words).vector(pipe).cpu()

    words = [word for word, share in decomposition.top(min(max_words, decomposition.explain)) if share > 0]
    if not isinstance(target, str):
        goal, *others = as_pictures(target, name="target")
        if others:
            raise ArgumentError(f"target holds {1 + len(others)} pictures: give one")
    elif target == "concept":
        options: dict[str, Any] = {"sampler_steps": sampler_steps, "guidance_scale": guidance_scale}
        goal = generate(pipe, [prompt or decomposition.concept], seed=seed, **options)[0]
    else:
        goal = draw([vector(words)])[0]
    seen = judge.image_features(goal)[0]
    drawn: dict[frozenset[str], Image.Image] = {}

    def closeness(sets: Sequence[Sequence[str]]) -> list[float]:
        pictures = draw([vector(own) for own in sets])
        drawn.update(zip(map(frozenset, sets), pictures, strict=True))
        return (judge.image_features(pictures) @ seen).tolist()

    left = _Left(words, groups, closeness, threshold)
    bar = tqdm(desc="leaving words out", unit="pass", disable=not progress)
    for one_pass in (left.upward, left.alone):
        went = True
        while went and len(left.words) > 1:
            count["passes"] += 1
            bar.update()
            went = one_pass()
            if callback is not None:
                callback({"step": count["passes"] - 1, "steps": None, "words": tuple(left.words)})
    bar.close()
    (similarity,), picture = left.scores([left.words]), drawn[frozenset(left.words)]
    kept, removed = tuple(left.words), tuple(left.removed)
    return ImageDecomposition(kept, goal, picture, similarity, removed, count["drawn"], count["passes"])


class _Left:
    """The words that are left of a sum, from the largest coefficient to the smallest, and passes that leave some out.

    groups: word -> the words that go with it; closeness: similarity to the target of the pictures that lists of words
    draw, computed once for any set of words.
    """

    def __init__(
        self,
        words: Sequence[str],
        groups: Mapping[str, set[str]],
        closeness: Callable[[Sequence[Sequence[str]]], list[float]],
        threshold: float,
    ) -> None:
        self.words, self.groups, self.closeness, self.threshold = list(words), groups, closeness, threshold
        self.untried, self.reach = list(reversed(words)), len(words)
        self.removed: list[tuple[str, float]] = []
        self.known: dict[frozenset[str], float] = {}

    def scores(self, sets: Sequence[Sequence[str]]) -> list[float]:
        new = {frozenset(own): own for own in sets if frozenset(own) not in self.known}
        if new:
            self.known.update(zip(new, self.closeness(list(new.values())), strict=True))
        return [self.known[frozenset(own)] for own in sets]

    def without(self, gone: set[str]) -> list[str]:
        return [word for word in self.words if word not in gone]

    def drop(self, gone: set[str], score: float) -> None:
        self.removed += [(word, score) for word in self.words if word in gone]
        self.words = self.without(gone)

    def upward(self) -> bool:
        """Leave out as many of the one, two, four, ... smallest untried words as possible; False once all were tried.

        A word that cannot go once those below it are gone is skipped. A pass has as many trials as the last had
        successes, or twice as many as the last if its largest one succeeded.
        """
        prefixes: list[set[str]] = []
        for word in self.untried:
            gone = self.groups[word].union(*prefixes[-1:])
            if not self.without(gone):
                break
            prefixes.append(gone)
        if not prefixes:
            return False
        sizes = [number for number in range(1, len(prefixes)) if number & (number - 1) == 0] + [len(prefixes)]
        sizes = sizes[: self.reach]
        scores = self.scores([self.without(prefixes[size - 1]) for size in sizes])
        good = [number for number, score in enumerate(scores) if score >= self.threshold]
        last = good[-1] if good else -1
        size = sizes[last] if good else 0
        needed = 1 if sizes[last + 1 : last + 2] == [size + 1] else 0
        rest = self.untried[size + needed :]
        if good:
            self.drop(prefixes[size - 1], scores[last])
        self.reach = 2 * len(sizes) if last + 1 == len(sizes) else max(1, len(good))
        self.untried = [word for word in rest if word in self.words]
        return bool(self.untried)

    def alone(self) -> bool:
        """Try each word alone, then leave out as many of the free ones together as possible; False if none is free."""
        rest = {word: left for word in self.words if (left := self.without(self.groups[word]))}
        scores = dict(zip(rest, self.scores(list(rest.values())), strict=True))
        free = sorted((word for word in scores if scores[word] >= self.threshold), key=lambda word: -scores[word])
        while free:
            gone = set().union(*(self.groups[word] for word in free))
            left = self.without(gone)
            score = scores[free[0]] if len(free) == 1 else (self.scores([left])[0] if left else -1.0)
            if left and score >= self.threshold:
                self.drop(gone, score)
                return True
            free = free[: len(free) // 2]
        return False


def _as_group(given: Any) -> Any:
    """A text would count as a group of one word, which says nothing."""
    if isinstance(given, str):
        raise ArgumentError(f"a group of near_synonyms is the text {given!r}: give several words for each group")
    return given
